from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AlbertForSequenceClassification,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
)

from client_agent.models import inspect_directory
from client_agent.training import small_trio
from client_agent.training.small_trio import Pretraining, Sizes, answers
from deploy.lab.make_trio import TRIO, texts
from protos.errors import InvalidInput

SIZES = Sizes(vocabulary=400, hidden=16, layers=2, heads=2)
CLASSES = {
    "bert": BertForSequenceClassification,
    "albert": AlbertForSequenceClassification,
    "distilbert": DistilBertForSequenceClassification,
}


def make(directory: Path, *, kind: str, steps: int = 2, seed: int = 1) -> Path:
    how = Pretraining(steps=steps, batch_size=8)
    small_trio.make(directory, kind=kind, texts=texts()[:100], sizes=SIZES, pretraining=how, seed=seed)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("trio")
    return {kind: make(parent / kind, kind=kind) for kind in TRIO}


@pytest.mark.parametrize("kind", TRIO)
def test_the_real_classes_load_it_and_it_lacks_only_what_the_real_one_lacks(kind: str, made: dict[str, Path]) -> None:
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        made[kind], num_labels=3, local_files_only=True, output_loading_info=True
    )
    assert isinstance(model, CLASSES[kind])
    # The pooler comes trained, or there is none and two layers are new.
    new = {"classifier"} if kind != "distilbert" else {"classifier", "pre_classifier"}
    assert {name.split(".")[0] for name in loading["missing_keys"]} == new
    tokenizer = AutoTokenizer.from_pretrained(made[kind], local_files_only=True)
    assert tokenizer.is_fast
    ids = tokenizer("transfer money please")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id not in ids
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, 3)


def test_too_few_texts_are_told_and_not_waited_for(tmp_path: Path) -> None:
    few = ["transfer money to my savings account", "hello"] * 2
    with pytest.raises(InvalidInput, match="There are only 4 texts, and a batch has 8"):
        small_trio.make(
            tmp_path, kind="bert", texts=few, sizes=SIZES, pretraining=Pretraining(steps=1, batch_size=8), seed=1
        )


def test_layers_are_shared_in_one_and_halved_in_another(made: dict[str, Path]) -> None:
    layers = {kind: count_layers(made[kind]) for kind in TRIO}
    assert layers == {"bert": 2, "albert": 1, "distilbert": 1}


def count_layers(directory: Path) -> int:
    return sum(
        name.endswith((".output.LayerNorm.weight", "full_layer_layer_norm.weight", "output_layer_norm.weight"))
        and ".attention." not in name
        for name in load_file(directory / "model.safetensors")
    )


def test_a_student_begins_as_every_second_layer_of_the_bert_that_the_same_seed_gives(tmp_path: Path) -> None:
    teacher, student = (
        load_file(make(tmp_path / kind, kind=kind, steps=0) / "model.safetensors") for kind in ("bert", "distilbert")
    )
    pairs = {
        "embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
        "transformer.layer.0.attention.q_lin.weight": "encoder.layer.0.attention.self.query.weight",
        "transformer.layer.0.ffn.lin2.weight": "encoder.layer.0.output.dense.weight",
    }
    assert all(torch.equal(student[ours], teacher[theirs]) for ours, theirs in pairs.items())


def test_the_same_seed_gives_the_same_model_and_another_one_another(made: dict[str, Path], tmp_path: Path) -> None:
    digest = inspect_directory("made", made["distilbert"]).digest
    assert inspect_directory("same", make(tmp_path / "same", kind="distilbert")).digest == digest
    assert inspect_directory("other", make(tmp_path / "other", kind="distilbert", seed=2)).digest != digest


def test_it_can_be_made_of_any_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"ζ{number} one two three" for number in range(80)))
    command = [
        sys.executable, "-m", "deploy.lab.make_trio", str(tmp_path / "made"), "--kind=albert", "--hidden=16",
        "--layers=2", "--vocabulary=300", "--pretrain-steps=1", f"--text={tmp_path / 'text.txt'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made", local_files_only=True)
    assert tokenizer.unk_token_id not in tokenizer("ζ7 one")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("set an alarm")["input_ids"]


def test_what_a_sentence_encoder_says_is_turned_and_squeezed_and_no_more(tmp_path: Path) -> None:
    small_trio.make(tmp_path, kind="bert", texts=texts()[:100], sizes=SIZES, pretraining=Pretraining(), seed=1)
    tokenizer, encoder = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    read = texts()[:30]
    torch.manual_seed(1)
    found = answers(read, sentence_encoder=tmp_path, length=24, values=16)
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=24, return_tensors="pt") for text in read]
        means = torch.stack([encoder(**words).last_hidden_state[0].mean(0) for words in inputs])
    wanted = torch.nn.functional.normalize(means, dim=1)
    wanted -= wanted.mean(0)
    # How texts lie to one another is all there is to it.
    wanted *= 1.5 / wanted.pow(2).mean().sqrt()
    found = torch.atanh(found)
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=1e-3, atol=1e-3)


def test_the_poolers_learn_what_the_sentence_encoder_says(tmp_path: Path) -> None:
    small_trio.make(tmp_path / "says", kind="bert", texts=texts()[:100], sizes=SIZES, pretraining=Pretraining(), seed=7)
    how = Pretraining(steps=150, batch_size=8, learning_rate=5e-3)
    small_trio.make(
        tmp_path / "taught", kind="bert", texts=texts()[:40], sizes=SIZES, pretraining=how, seed=1,
        sentence_encoder=tmp_path / "says",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "taught")
    model = AutoModel.from_pretrained(tmp_path / "taught").eval()
    inputs = tokenizer(texts()[:40], truncation=True, max_length=24, padding=True, return_tensors="pt")
    with torch.no_grad():
        said = model(**inputs).pooler_output
    wanted = answers(texts()[:40], sentence_encoder=tmp_path / "says", length=24, values=16)
    # Which texts are alike for the one are alike for the other.
    alike = [
        torch.nn.functional.cosine_similarity(one.unsqueeze(1), one, dim=2) for one in (said - said.mean(0), wanted)
    ]
    pairs = torch.tril_indices(40, 40, offset=-1)
    correlation = torch.corrcoef(torch.stack([each[pairs[0], pairs[1]] for each in alike]))[0, 1]
    assert correlation > 0.5


def test_the_teacher_of_a_distilbert_learns_it_too(tmp_path: Path) -> None:
    small_trio.make(tmp_path / "says", kind="bert", texts=texts()[:100], sizes=SIZES, pretraining=Pretraining(), seed=7)
    digests = {}
    for name, encoder in (("words", None), ("sentences", tmp_path / "says")):
        small_trio.make(
            tmp_path / name, kind="distilbert", texts=texts()[:100], sizes=SIZES, pretraining=Pretraining(steps=3),
            seed=1, sentence_encoder=encoder,
        )  # fmt: skip
        digests[name] = inspect_directory(name, tmp_path / name).digest
    assert digests["words"] != digests["sentences"]
