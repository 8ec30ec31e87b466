"""A site's mentor and the federated model learn from one another by FedKD's losses; the mentor stays at the site, and
learns nothing twice."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from client_agent.taskdir import UPDATE, Paused, TaskSpec
from client_agent.training.kinds import kind_of
from client_agent.training.mentor import PROJECTION, Mentor, loss_of, mentor_of, train_together
from client_agent.training.model import Model, build
from client_agent.training.mutual import eager_attention
from client_agent.training.tasks import Warm, Work
from protos.errors import InvalidInput, RecipeInvalid
from protos.jobspec import parse
from tests.unit.client_agent.training.conftest import Site, make_base_model

MENTOR = {"base_model": {"name": "large"}, "learning_rate": 2e-3}
ROWS = torch.tensor([0, 7, 14, 20])


def recipe_of(site: Site, *, mentor: dict[str, Any] = MENTOR, **changes: Any) -> dict[str, Any]:
    local = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, **changes.pop("local", {}), "mentor": mentor}
    base = {"name": "tiny-encoder", "layers": 1}
    method = {"type": "full", "freeze_embeddings": True}
    return site.recipe(**{"local": local, "base_model": base, "method": method, **changes})


def training(site: Site, recipe: dict[str, Any], version: Path, **changes: Any) -> TaskSpec:
    fields = {"state_directory": str(site.directory / "jobs" / "job-1"), "teacher_model_path": str(site.base_model)}
    return site.task("train", recipe=recipe, model=version, **{**fields, **changes})


def version_0(site: Site, recipe: dict[str, Any]) -> Path:
    return site.run("init", site.task("init", recipe=recipe))[0] / UPDATE


def pair(site: Site, recipe: dict[str, Any]) -> tuple[Model, Mentor, Any]:
    """Mentee, mentor and rows; in eval mode, so that nothing is random."""
    spec = parse(recipe)
    kind = kind_of(spec)
    mentee = build(spec, task=kind, base_model_path=site.base_model, device=torch.device("cpu"))
    task = training(site, recipe, Path("none"))
    mentor = mentor_of(task, spec=spec, kind=kind, beside=mentee, kept=OrderedDict(), warn=pytest.fail)
    with torch.no_grad():
        mentor.projection.weight.add_(torch.randn(mentor.projection.weight.shape) * 0.1)
    rows = kind.read(site.data_set, name="notes", split="train")
    tokens = kind.encode(rows, tokenizer=mentee.tokenizer, on_rows=lambda done, total: None)
    mentee.network.eval()
    mentor.model.network.eval()
    return mentee, mentor, tokens


def by_hand(mentee: Model, mentor: Mentor, tokens: Any, *, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """L_s, L_t and L_h as the paper writes them, row by row and layer by layer, each with its whole graph."""
    inputs, labels = tokens.batch(ROWS, device="cpu")
    looks = {"output_attentions": True, "output_hidden_states": True}
    s, t = mentee.network(**inputs, **looks), mentor.model.network(**inputs, **looks)
    p_s, p_t = (torch.softmax(one.logits / temperature, dim=-1) for one in (s, t))
    ce_s, ce_t = (functional.cross_entropy(one.logits, labels) for one in (s, t))
    z = float(ce_s + ce_t)
    student_kl = (p_t.detach() * (p_t.detach().log() - p_s.log())).sum(dim=1).mean() * temperature**2 / z
    teacher_kl = (p_s.detach() * (p_s.detach().log() - p_t.log())).sum(dim=1).mean() * temperature**2 / z
    hidden = torch.zeros(())
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        # One layer of the mentee: its last stands against the mentor's last.
        h_s = s.hidden_states[-1][row, :length] @ mentor.projection.weight.T
        hidden = hidden + ((t.hidden_states[-1][row, :length] - h_s) ** 2).mean() / len(ROWS)
        a_s, a_t = (one.attentions[-1][row, :, :length, :length] for one in (s, t))
        hidden = hidden + ((a_t - a_s) ** 2).mean() / len(ROWS)
    return ce_s + student_kl + hidden / z, ce_t + teacher_kl + hidden / z, hidden / z


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_one_backward_pass_gives_both_models_and_the_map_the_gradients_of_their_own_losses(
    site: Site, temperature: float
) -> None:
    recipe = recipe_of(site, mentor={**MENTOR, "temperature": temperature})
    mentee, mentor, tokens = pair(site, recipe)
    with eager_attention(mentee.network), eager_attention(mentor.model.network):
        ours, theirs, between = by_hand(mentee, mentor, tokens, temperature=temperature)
        wanted = [
            *torch.autograd.grad(ours, mentee.trainable, retain_graph=True, allow_unused=True),
            *torch.autograd.grad(theirs, mentor.model.trainable, retain_graph=True, allow_unused=True),
            *torch.autograd.grad(between, [mentor.projection.weight]),
        ]
        loss_of(mentee, mentor, rows=ROWS, tokens=tokens, local=parse(recipe).local).total.backward()
    learnt = [*mentee.trainable, *mentor.learnt]
    assert len(learnt) == len(wanted)
    for parameter, gradient in zip(learnt, wanted, strict=True):
        assert parameter.grad is not None and gradient is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_each_model_takes_its_own_step(site: Site) -> None:
    recipe = recipe_of(site, local={"steps": 1, "batch_size": 40, "optimizer": "sgd", "learning_rate": 0.5})
    spec = parse(recipe)
    mentee, mentor, tokens = pair(site, recipe)
    for one in (mentee, mentor.model):
        for module in one.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    learnt = [*mentee.trainable, *mentor.learnt]
    with eager_attention(mentee.network), eager_attention(mentor.model.network):
        loss_of(mentee, mentor, rows=torch.arange(len(tokens)), tokens=tokens, local=spec.local).total.backward()
    rates = [0.5] * len(mentee.trainable) + [2e-3] * len(mentor.learnt)
    # With one batch of all rows its order does not matter.
    wanted = [p.detach() - rate * p.grad for p, rate in zip(learnt, rates, strict=True) if p.grad is not None]
    told: list[dict[str, float]] = []
    train_together(
        mentee, mentor, tokens=tokens, local=spec.local, steps=1, learning_rate_at=lambda step: 0.5, seed=3,
        on_step=lambda done, total, metrics: told.append(metrics),
    )  # fmt: skip
    for parameter, value in zip(learnt, wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)
        assert parameter.grad is None
    assert told[0] == {} and told[1]["mentor_loss"] != told[1]["loss"]


def test_an_update_holds_the_mentee_alone_and_the_mentor_goes_on_where_it_counted(site: Site) -> None:
    recipe = recipe_of(site)
    version = version_0(site, recipe)
    first, result = site.run("first", training(site, recipe, version))
    assert load_file(first / UPDATE).keys() == load_file(version).keys()
    assert result.metrics["mentor_loss"] > 0 and 0 <= result.metrics["mentor_accuracy"] <= 1
    state = site.directory / "jobs" / "job-1"
    one = load_file(state / "mentor-1.safetensors")
    assert one[PROJECTION].shape == (32, 32) and not torch.equal(one[PROJECTION], torch.eye(32))
    assert any(".layer.2." in name for name in one), "all layers of the mentor, also those that the mentee lacks"

    def second(name: str, **changes: Any) -> tuple[bytes, bytes]:
        task = training(site, recipe, version, **{"round": 2, "seed": 6, "counted_round": 1, **changes})
        directory, _ = site.run(name, task, warm=Warm() if "cold" in name else None)
        return (directory / UPDATE).read_bytes(), (state / f"mentor-{task.round}.safetensors").read_bytes()

    # The same task once more, as after a kill, in a trainer that is warm and in one that has just begun.
    done = second("second")
    assert second("again") == done
    assert second("cold again") == done
    assert {path.name for path in state.iterdir()} == {"mentor-1.safetensors", "mentor-2.safetensors"}
    assert load_file(state / "mentor-1.safetensors")[PROJECTION].equal(one[PROJECTION])
    # A round that did not count is no round: the mentor starts from the one before it.
    third = second("third", round=3)
    assert third[1] == done[1] and third[0] == done[0]
    assert {path.name for path in state.iterdir()} == {"mentor-1.safetensors", "mentor-3.safetensors"}
    # And from where it began, if none counted.
    fresh = second("fresh", round=3, counted_round=0)
    assert fresh[1] != third[1]


def test_another_sites_mentor_is_another_one_although_both_share_a_trainer(site: Site) -> None:
    recipe = recipe_of(site)
    version = version_0(site, recipe)
    other = str(site.directory / "jobs-of-the-other")
    kept = {}
    for name, directory, seed in (("a", {}, 1), ("b", {"state_directory": other}, 2)):
        site.run(name, training(site, recipe, version, seed=seed, **directory))
        kept[name] = training(site, recipe, version, **directory).state_directory
    before = Path(kept["b"], "mentor-1.safetensors").read_bytes()
    mixed, _ = site.run("a2", training(site, recipe, version, round=2, seed=1, counted_round=1))
    alone, _ = site.run("a2 alone", training(site, recipe, version, round=2, seed=1, counted_round=1), warm=Warm())
    assert (mixed / UPDATE).read_bytes() == (alone / UPDATE).read_bytes()
    assert Path(kept["b"], "mentor-1.safetensors").read_bytes() == before


def test_a_mentor_whose_state_is_gone_or_damaged_begins_anew_and_the_log_says_so(site: Site) -> None:
    recipe = recipe_of(site)
    version, said = version_0(site, recipe), list[str]()

    def run(name: str, **changes: Any) -> bytes:
        directory = site.write(name, training(site, recipe, version, **changes))
        task = training(site, recipe, version, **changes)
        Work(task, directory, site.warm, lambda *_: None, time.monotonic(), warn=said.append).run()
        return (directory / UPDATE).read_bytes()

    lost = run("lost", round=2, counted_round=1)
    assert said == ["The mentor begins anew, because its state is no longer here."]
    state = site.directory / "jobs" / "job-1"
    (state / "mentor-1.safetensors").write_bytes((state / "mentor-2.safetensors").read_bytes()[:-9])
    assert run("damaged", round=2, counted_round=1) == lost
    assert said[1].startswith("The mentor begins anew, because its state cannot be used: ")


def test_a_site_too_small_for_validation_rows_trains_and_only_does_not_measure_its_mentor(site: Site) -> None:
    recipe, said = recipe_of(site), list[str]()
    few = site.data_set.model_copy(update={"validation": 1e-9}).model_dump(mode="json")
    task = training(site, recipe, version_0(site, recipe), data_set=few)
    directory = site.write("few", task)
    result = Work(task, directory, site.warm, lambda *_: None, time.monotonic(), warn=said.append).run()
    assert (directory / UPDATE).exists()
    assert result.metrics["mentor_loss"] > 0 and "mentor_accuracy" not in result.metrics
    assert len(said) == 1 and said[0].startswith("The mentor was not measured: ")


def test_one_mentor_goes_before_the_next_one_comes(site: Site) -> None:
    recipe = recipe_of(site)
    mentee, mentor, _ = pair(site, recipe)
    kept: OrderedDict[Any, Mentor] = OrderedDict({"of another job": mentor})
    task = training(site, recipe, Path("none"), teacher_model_path=str(site.directory / "nothing"))
    spec = parse(recipe)
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        mentor_of(task, spec=spec, kind=kind_of(spec), beside=mentee, kept=kept, warn=pytest.fail)
    assert not kept


def test_a_paused_training_ends_and_keeps_nothing(site: Site) -> None:
    recipe = recipe_of(site)
    task = training(site, recipe, version_0(site, recipe))
    directory, steps = site.write("paused", task), list[int]()

    def report(stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        if stage == "training":
            steps.append(done)

    work = Work(task, directory, site.warm, report, time.monotonic(), pausing=lambda: len(steps) == 2)
    with pytest.raises(Paused):
        work.run()
    assert steps == [0, 1]
    assert not (directory / UPDATE).exists() and not Path(task.state_directory).exists()


def test_a_mentor_that_reads_other_tokens_is_refused(site: Site) -> None:
    other = make_base_model(site.directory / "other", architecture="bert")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["tuesday"] = tokenizer["model"]["vocab"].pop("monday")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = recipe_of(site)
    task = training(site, recipe, version_0(site, recipe), teacher_model_path=str(other))
    with pytest.raises(InvalidInput, match="The mentor 'large' cuts texts into other tokens than the base model"):
        site.run("train", task)


@pytest.mark.parametrize("architecture", ["albert", "distilbert"])
def test_other_architectures_with_lora_have_mentors_too(
    site: Site, base_model: Callable[[str], Path], architecture: str
) -> None:
    targets = ["q_lin"] if architecture == "distilbert" else ["query"]
    site = replace(site, base_model=base_model(architecture))
    recipe = recipe_of(site, method={"type": "lora", "rank": 2, "alpha": 4, "targets": targets})
    update, result = site.run("train", training(site, recipe, version_0(site, recipe)))
    assert all("lora" in name or "classifier" in name for name in load_file(update / UPDATE))
    assert result.metrics["mentor_loss"] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"local": {"checkpoint_seconds": 5.0}}, "a whole batch at a time: no checkpoint_seconds"),
        ({"local": {"micro_batch_size": 4}}, "no micro_batch_size"),
        ({"local": {"compile": True}}, "no compile"),
        ({"local": {"proximal": 0.1}}, "no proximal"),
        ({"mentor": {"base_model": {"name": "large", "quantization": "nf4"}}}, "has no quantization"),
        ({"task": {"type": "causal-lm"}, "evaluation": {"metric": "loss"}}, "a mentor is for classification"),
    ],
)
def test_what_a_mentor_cannot_be_together_with_is_refused_at_submission(
    site: Site, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeInvalid, match=sentence):
        parse(recipe_of(site, **change))


def test_a_recipe_without_a_mentor_keeps_its_hash(site: Site) -> None:
    assert "mentor" not in parse(site.recipe()).canonical_json
    assert "mentor" in parse(recipe_of(site)).canonical_json
