"""Asking a causal language model questions with options, and counting its answers in two ways.

By generation: what it writes, greedily, read by the study's rule (answers.py). By likelihood: which of the options it
finds most probable as the answer, whatever it would rather write; so what the model knows is seen apart from the form
that it answers in. Both go on from one pass over the prompt.

The answers of every version lie in the job's directory at the agent, in lines that `silotune lab score` reads. Those to
version 0 are what later versions are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from client_agent.settings import DataSet
from client_agent.taskdir import TaskSpec, sync
from client_agent.training.answers import KINDS, Change, Score, judge
from client_agent.training.model import Model
from client_agent.training.prompts import boundary_ids
from client_agent.training.questions import Question, read_questions
from client_agent.training.tables import Split
from client_agent.training.train import autocast, out_of_memory
from protos.errors import InvalidInput, SiteConfigInvalid
from protos.jobspec import JobSpec, Local
from protos.metrics import BENCHMARKS

BATCH_QUESTIONS = 32
QUESTIONS = {f"{benchmark}_questions" for benchmark in BENCHMARKS}
ANSWERS = "{benchmark}-{split}-version-{version}.jsonl"

Ids = list[int]


@dataclass(frozen=True)
class Reply:
    """What a model answered: `output` is what it wrote, `likeliest` the option that it finds most probable."""

    gold: str
    output: str
    likeliest: str


def reply(
    model: Model,
    questions: Sequence[Question],
    *,
    local: Local,
    max_new_tokens: int | None,
    on_rows: Callable[[int, int], None],
) -> list[Reply]:
    """The model's answers, in the questions' order. `on_rows(done, total)` as in `evaluate`.

    Without `max_new_tokens` an answer may be as long as the longest option: one token with most tokenizers. The study's
    harness took the length of a batch's first right answer, and its rule takes "yes, because" for no answer at all.
    Of a prompt that is too long for the model's positions the end is kept. InvalidInput when there is no room for an
    answer; OutOfSpace when not even one question fits into the device's memory.
    """
    model.network.eval()
    network: Any = model.network
    positions = getattr(network.config, "max_position_embeddings", None) or 1 << 30
    asked = _prompts(tuple(questions), tokenizer=model.tokenizer)
    longest = max(len(ids) for prompt in asked for ids in prompt.options)
    max_new_tokens = max_new_tokens or longest
    room = positions - max(max_new_tokens, longest)
    if room < 2:
        raise InvalidInput(
            f"An answer of {max_new_tokens} tokens does not fit into the model's {positions} positions.",
            hint="Lower max_new_tokens under [evaluation] in the recipe.",
        )
    asked = [_Prompt(prompt.ids[-room:], prompt.options) for prompt in asked]
    replies: dict[int, Reply] = {}
    # By length, so that little is padded.
    order = sorted(range(len(asked)), key=lambda row: -len(asked[row].ids))
    waiting = [order[start : start + BATCH_QUESTIONS] for start in range(0, len(order), BATCH_QUESTIONS)]
    while waiting:
        on_rows(len(replies), len(asked))
        rows = waiting.pop(0)
        try:
            with torch.no_grad(), autocast(local, device=model.device):
                written, likeliest = _answer(model, [asked[row] for row in rows], max_new_tokens=max_new_tokens)
        except torch.OutOfMemoryError:
            # Of several processes only this one would cut its questions.
            if len(rows) == 1 or model.group.size > 1:
                raise out_of_memory(len(rows)) from None
            waiting[:0] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
            continue
        for row, text, option in zip(rows, written, likeliest, strict=True):
            replies[row] = Reply(questions[row].gold, text, questions[row].options[option])
    on_rows(len(replies), len(asked))
    return [replies[row] for row in range(len(asked))]


def ask_all(
    model: Model,
    *,
    spec: JobSpec,
    task: TaskSpec,
    split: Split,
    on_rows: Callable[[int, int], None],
    write: Callable[[Callable[[], None]], None],
    warn: Callable[[str], None],
) -> dict[str, float]:
    """The metrics of every benchmark of the recipe that this site has; the replies are kept where the task says.

    Where the house agent alone evaluates, it must have them all: SiteConfigInvalid. Other sites measure what they have;
    `warn` gets a sentence about what they lack. `write` calls what writes a file, again while the disk is full.
    """
    metrics: dict[str, float] = {}
    for name in spec.evaluation.benchmarks:
        if name not in task.benchmarks:
            missing = SiteConfigInvalid(
                f"This site has no data set named {name!r} that its policy lets a job read, so it cannot ask it.",
                hint=f"Describe it under [data.{name}] in site.toml, and name it in data_sets under [policy].",
            )
            if "sites" not in spec.evaluation.where:
                raise missing
            warn(str(missing))
            continue
        data_set = DataSet.model_validate(task.benchmarks[name])
        if split == "test" and data_set.test is None:
            continue
        questions = read_questions(data_set, name=name, split=split)
        replies = reply(
            model, questions, local=spec.local, max_new_tokens=spec.evaluation.max_new_tokens, on_rows=on_rows
        )
        first = None
        if task.state_directory:
            place = Path(task.state_directory)
            path = place / ANSWERS.format(benchmark=name, split=split, version=task.round)
            write(partial(write_replies, replies, path=path))
            first = read_replies(place / ANSWERS.format(benchmark=name, split=split, version=0))
        metrics |= measure(name, replies, first=first)
    return metrics


def measure(benchmark: str, replies: Sequence[Reply], *, first: Sequence[Reply] | None) -> dict[str, float]:
    """The metrics of one benchmark; `first` are the replies of version 0, where these are known."""
    kind = KINDS[benchmark]
    answers = [judge(each.output, gold=each.gold, kind=kind) for each in replies]
    score = Score.of(answers)
    found = {
        "questions": float(score.questions),
        "accuracy": score.accuracy,
        "unparseable": score.unparseable,
        "parseable_accuracy": score.parseable_accuracy,
        "exact_format": score.exact_format,
        "option_accuracy": sum(each.likeliest == each.gold for each in replies) / len(replies),
    }
    # The questions of the site may have changed since; then there is nothing to compare.
    if first is not None and [each.gold for each in first] == [each.gold for each in replies]:
        change = Change.between([judge(each.output, gold=each.gold, kind=kind) for each in first], answers)
        found |= {"gained": float(change.gained), "lost": float(change.lost)}
    return {f"{benchmark}_{measure}": value for measure, value in found.items()}


def write_replies(replies: Sequence[Reply], *, path: Path) -> None:
    """Whole or not at all, also after a power cut: later versions are compared with what version 0 answered."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(asdict(each)) + "\n" for each in replies))
    sync(temporary)
    temporary.rename(path)


def read_replies(path: Path) -> list[Reply] | None:
    """None when there are none."""
    if not path.exists():
        return None
    return [Reply(**json.loads(line)) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class _Prompt:
    ids: Ids
    options: tuple[Ids, ...]


# Every version is asked the same; one table of each benchmark, as long as the tokenizer is the same one.
@lru_cache(maxsize=len(BENCHMARKS))
def _prompts(questions: tuple[Question, ...], *, tokenizer: Any) -> list[_Prompt]:
    pairs = [(question.prompt, option) for question in questions for option in question.options]
    texts, options = [text for text, _ in pairs], [option for _, option in pairs]
    found = zip(*boundary_ids(texts, options, tokenizer=tokenizer, special=True), strict=True)
    prompts = []
    for question in questions:
        before, after = zip(*islice(found, len(question.options)), strict=True)
        prompts.append(_Prompt(before[0], after))
    return prompts


def _answer(model: Model, prompts: Sequence[_Prompt], *, max_new_tokens: int) -> tuple[list[str], list[int]]:
    """What the model writes after each prompt, and the place of its likeliest option."""
    network: Any = model.network
    pad = _pad_id(model)
    ids, mask = _padded([prompt.ids for prompt in prompts], pad=pad, device=model.device)
    # All but the last token, once for whatever may follow.
    begun = network(
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=_positions(mask)[:, :-1], use_cache=True,
        logits_to_keep=1,
    ).past_key_values  # fmt: skip
    longer = [
        _log_likelihoods(network, ids, mask, begun, [prompt.options[place:][:1] for prompt in prompts])
        if any(len(option) > 1 for prompt in prompts for option in prompt.options[place:][:1])
        else None
        for place in range(max(len(prompt.options) for prompt in prompts))
    ]
    ends = network.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, use_cache=True, pad_token_id=pad,
        eos_token_id=model.tokenizer.eos_token_id if ends is None else ends,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    made = network.generate(input_ids=ids, attention_mask=mask, past_key_values=begun, generation_config=config)
    written = model.tokenizer.batch_decode(made.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    first = made.logits[0].float().log_softmax(dim=-1)
    likeliest = []
    for row, prompt in enumerate(prompts):
        values = [
            float(first[row, option[0]]) if (sums := longer[place]) is None else sums[row]
            for place, option in enumerate(prompt.options)
        ]
        likeliest.append(max(range(len(values)), key=values.__getitem__))
    return written, likeliest


def _log_likelihoods(
    network: Any, ids: Tensor, mask: Tensor, begun: Any, options: Sequence[Sequence[Ids]]
) -> list[float]:
    """The summed log-probability of each row's option after its prompt; 0 for a row that has none here.

    `begun` holds all of the prompts but their last tokens, and is left as it is.
    """
    longest = max(len(option) for row in options for option in row)
    tokens = torch.zeros(len(options), longest, dtype=torch.long, device=ids.device)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, one in enumerate(options):
        for option in one:
            tokens[row, : len(option)] = torch.tensor(option, device=ids.device)
            counts[row, : len(option)] = True
    # What stands behind the shorter options is seen by nothing that is looked at.
    whole = torch.cat([mask, mask.new_ones(len(options), longest - 1)], dim=1)
    logits = network(
        input_ids=torch.cat([ids[:, -1:], tokens[:, :-1]], dim=1), attention_mask=whole,
        position_ids=_positions(whole)[:, -longest:], past_key_values=deepcopy(begun), use_cache=True,
    ).logits.float().log_softmax(dim=-1)  # fmt: skip
    sums: list[float] = logits.gather(2, tokens[:, :, None]).squeeze(2).where(counts, 0.0).sum(dim=1).tolist()
    return sums


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def _padded(rows: Sequence[Ids], *, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [rows, longest of them], padded on the left: what is written follows the prompt."""
    longest = max(len(ids) for ids in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _pad_id(model: Model) -> int:
    for found in (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0
