"""A house agent teaches the aggregate of a round: with a teacher and labels, or with the sites' updates and texts."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from client_agent.settings import DataSet
from client_agent.taskdir import UPDATE, Paused, TaskResult, TaskSpec
from client_agent.training.tasks import Work
from client_agent.training.warm import Warm
from protos.errors import InvalidInput, SiteConfigInvalid
from protos.metrics import METRICS, STAGE_SECONDS, check_numbers
from tests.unit.client_agent.training.conftest import LABELS, Site, texts_of, write_rows

LORA = {"type": "lora", "rank": 4, "alpha": 16, "targets": ["query", "value"]}
# One layer learns from three.
STUDENT = {"name": "tiny-encoder", "layers": 1}
LEARNING = {"batch_size": 14, "epochs": 5, "teacher_epochs": 5, "learning_rate": 1e-2, "teacher_learning_rate": 5e-3}


def recipe_of(house: Site, *, method: dict[str, Any] | None = None, **distillation: Any) -> dict[str, Any]:
    how = {"teacher": {"name": "tiny-teacher"}, **LEARNING, **distillation}
    return house.recipe(base_model=STUDENT, method=method or {"type": "full"}, distillation=how)


def task_of(house: Site, recipe: dict[str, Any], *, model: Path, **changes: Any) -> TaskSpec:
    fields = {
        "teacher_model_path": str(house.base_model),
        "proxy_data_set": house.data_set.model_dump(mode="json"),
        "state_directory": str(house.directory / "jobs" / "job-1"),
        **changes,
    }
    return house.task("distill", recipe=recipe, model=model, **fields)


def distill(
    house: Site, recipe: dict[str, Any], *, model: Path, name: str = "distill", **changes: Any
) -> tuple[Path, TaskResult]:
    directory, result = house.run(name, task_of(house, recipe, model=model, **changes))
    check_numbers(result.metrics, allowed=METRICS)
    check_numbers(result.seconds, allowed=STAGE_SECONDS)
    return directory / UPDATE, result


def version_0(house: Site, recipe: dict[str, Any], *, name: str = "init") -> Path:
    return house.run(name, house.task("init", recipe=recipe))[0] / UPDATE


def teacher_files(house: Site) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (house.directory / "jobs" / "job-1").iterdir()}


@pytest.mark.parametrize("method", [{"type": "full"}, {"type": "full", "freeze_embeddings": True}, LORA])
def test_a_student_learns_from_labels_and_a_teacher_and_becomes_the_version(house: Site, method: Any) -> None:
    recipe = recipe_of(house, method=method, learning_rate=3e-2 if method["type"] == "lora" else 1e-2)
    aggregate = version_0(house, recipe)
    made, result = distill(house, recipe, model=aggregate)
    before, after = load_file(aggregate), load_file(made)
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    found = result.metrics
    assert found["distillation_kept"] == 1
    assert found["student_loss"] < 0.9 * found["aggregate_loss"]
    assert found["teacher_loss"] < 0.9 * found["teacher_loss_before"]
    assert found["update_norm"] > 0
    assert result.steps == 2 * 5 * -(-result.examples // 14)
    # What the coordinator will measure of the version is what the house agent measured of it.
    _, measured = house.run("look", house.task("evaluate", recipe=recipe, model=made))
    assert measured.metrics["loss"] == pytest.approx(found["student_loss"], rel=1e-5)
    assert measured.metrics["accuracy"] == found["student_accuracy"]
    _, measured = house.run("look-before", house.task("evaluate", recipe=recipe, model=aggregate))
    assert measured.metrics["loss"] == pytest.approx(found["aggregate_loss"], rel=1e-5)


def test_a_student_that_became_worse_is_not_taken(house: Site) -> None:
    aggregate = version_0(house, recipe_of(house))
    wild = {"learning_rate": 0.3, "epochs": 1, "teacher_epochs": 0, "teacher_learning_rate": 1e-5}
    made, result = distill(house, recipe_of(house, **wild), model=aggregate)
    assert result.metrics["student_loss"] > result.metrics["aggregate_loss"]
    assert result.metrics["distillation_kept"] == 0
    assert made.read_bytes() == aggregate.read_bytes()
    made, result = distill(house, recipe_of(house, gate=False, **wild), model=aggregate, name="open")
    assert result.metrics["student_loss"] > result.metrics["aggregate_loss"]
    assert result.metrics["distillation_kept"] == 1
    assert made.read_bytes() != aggregate.read_bytes()


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_teacher_is_never_worse_than_before_where_its_best_state_is_kept(house: Site, keep_best: bool) -> None:
    wild = {"teacher_learning_rate": 0.3, "epochs": 2, "teacher_epochs": 2, "keep_best": keep_best}
    recipe = recipe_of(house, **wild)
    aggregate = version_0(house, recipe)
    _, result = distill(house, recipe_of(house), model=aggregate, name="first", round=1)
    good = teacher_files(house)["teacher-1.safetensors"]
    _, spoilt = distill(house, recipe, model=aggregate, name="second", round=2, counted_round=1)
    assert spoilt.metrics["teacher_loss_before"] == pytest.approx(result.metrics["teacher_loss"], rel=1e-5)
    if keep_best:
        assert spoilt.metrics["teacher_loss"] == spoilt.metrics["teacher_loss_before"]
        assert teacher_files(house) == {"teacher-1.safetensors": good, "teacher-2.safetensors": good}
    else:
        assert spoilt.metrics["teacher_loss"] > spoilt.metrics["teacher_loss_before"]
        assert teacher_files(house)["teacher-2.safetensors"] != good


def test_a_teacher_that_learns_what_is_true_of_its_rows_alone_is_stopped(house: Site) -> None:
    """The slice's labels are wrong: the loss on it falls, and that on the validation rows rises."""
    right = [json.loads(line) for line in Path(house.data_set.path).read_text().splitlines()]
    wrong = [{**row, "label": LABELS[(LABELS.index(row["label"]) + 1) % 3]} for row in right]
    path = write_rows(house.directory / "wrong.jsonl", wrong)
    proxy = house.data_set.model_copy(update={"path": str(path)}).model_dump(mode="json")
    learnt = {}
    for keep_best in (True, False):
        recipe = recipe_of(house, keep_best=keep_best, data="slice")
        aggregate = version_0(house, recipe)
        learnt[keep_best] = distill(house, recipe, model=aggregate, proxy_data_set=proxy)[1].metrics
    assert learnt[False]["teacher_slice_loss"] < 0.8 * learnt[False]["teacher_slice_loss_before"]
    assert learnt[False]["teacher_loss"] > 1.2 * learnt[False]["teacher_loss_before"]
    assert learnt[True]["teacher_loss"] <= learnt[True]["teacher_loss_before"]


def test_the_same_distillation_gives_the_same_bytes_warm_cold_and_repeated(house: Site) -> None:
    recipe = recipe_of(house, epochs=2, teacher_epochs=1)
    aggregate = version_0(house, recipe)
    first, _ = distill(house, recipe, model=aggregate, name="first")
    kept = teacher_files(house)
    second, _ = distill(house, recipe, model=first, name="second", round=2, counted_round=1, seed=6)
    after = teacher_files(house)
    assert kept.items() < after.items()
    assert after.keys() == {"teacher-1.safetensors", "teacher-2.safetensors"}
    # The second once more, as after a kill, by a trainer that has just begun.
    cold = replace(house, warm=Warm())
    again, _ = distill(cold, recipe, model=first, name="again", round=2, counted_round=1, seed=6)
    assert again.read_bytes() == second.read_bytes()
    assert teacher_files(house) == after
    # Where the first round's did not count, the second begins from no state; so does one whose home was lost.
    lost = replace(house, warm=Warm())
    other, _ = distill(
        lost, recipe, model=first, name="lost", round=2, counted_round=1, seed=6,
        state_directory=str(house.directory / "jobs" / "job-2"),
    )  # fmt: skip
    anew, _ = distill(house, recipe, model=first, name="anew", round=2, counted_round=0, seed=6)
    assert anew.read_bytes() == other.read_bytes() != second.read_bytes()
    assert teacher_files(house).keys() == {"teacher-2.safetensors"}


def without_dropout(house: Site) -> Site:
    """What a compiled model draws for dropout is something else."""
    path = house.directory / "no-dropout"
    shutil.copytree(house.base_model, path)
    fields = json.loads((path / "config.json").read_text())
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (path / "config.json").write_text(json.dumps({**fields, **none}))
    return replace(house, base_model=path)


def test_a_compiled_student_learns_what_a_plain_one_learns(house: Site) -> None:
    """Its attention is switched while it is compiled; the programs are those of torch, but no C++ is made of them."""
    torch.compiler.set_default_backend("aot_eager")
    made = []
    try:
        calm = without_dropout(house)
        for compiles in (False, True):
            own = replace(calm, warm=Warm())
            recipe = recipe_of(house, epochs=1, teacher_epochs=0)
            recipe["local"]["compile"] = compiles
            state = str(house.directory / f"state-{compiles}")
            aggregate = version_0(own, recipe)
            made.append(load_file(distill(own, recipe, model=aggregate, state_directory=state)[0]))
            (student,) = own.warm.models.values()
            assert any(layer._compiled_call_impl for layer in student.network.modules()) == compiles
    finally:
        torch.compiler.set_default_backend("inductor")
        torch.compiler.reset()
    for name, plain in made[0].items():
        if name.endswith("key.bias"):
            continue  # Its gradient is nothing but rounding: softmax takes no notice of it.
        torch.testing.assert_close(made[1][name], plain, rtol=1e-3, atol=1e-4, msg=name)


def test_a_house_agent_that_cannot_compile_says_so(house: Site) -> None:
    recipe = recipe_of(house)
    recipe["local"]["compile"] = True
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with nowhere, pytest.raises(InvalidInput, match="cannot be compiled at this site") as caught:
        distill(house, recipe, model=version_0(house, recipe))
    assert "compile = false" in caught.value.hint


def test_each_key_of_the_recipe_changes_what_is_learnt(house: Site) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"attention": False}, {"weighting": "sum"}, {"temperature": 1.0}, {"teacher_epochs": 0}
    ]  # fmt: skip
    made = set()
    for number, change in enumerate(changes):
        recipe = recipe_of(house, **{"epochs": 0.5, "teacher_epochs": 0.5, "gate": False, **change})
        state = str(house.directory / f"state-{number}")
        made.add(distill(house, recipe, model=version_0(house, recipe), state_directory=state)[0].read_bytes())
    assert len(made) == len(changes)


def test_the_warm_model_serves_a_training_after_a_distillation_as_before(house: Site) -> None:
    recipe = recipe_of(house, epochs=1, teacher_epochs=0)
    recipe["local"] = {"steps": 2, "batch_size": 8, "gradient_checkpointing": True}
    aggregate = version_0(house, recipe)
    before, _ = house.run("before", house.task("train", recipe=recipe, model=aggregate))
    (model,) = house.warm.models.values()
    distill(house, recipe, model=aggregate)
    after, _ = house.run("after", house.task("train", recipe=recipe, model=aggregate))
    assert list(house.warm.models.values()) == [model]
    assert (before / UPDATE).read_bytes() == (after / UPDATE).read_bytes()


def test_a_teacher_whose_state_is_damaged_begins_anew_and_says_so(house: Site) -> None:
    recipe = recipe_of(house, epochs=1, teacher_epochs=1)
    aggregate = version_0(house, recipe)
    fresh, _ = distill(house, recipe, model=aggregate, round=2)
    state = house.directory / "jobs" / "job-1"
    for content in (b"torn", None):
        if content is None:
            save_file({"other": torch.zeros(2)}, state / "teacher-1.safetensors")
        else:
            (state / "teacher-1.safetensors").write_bytes(content)
        said: list[str] = []
        task = task_of(house, recipe, model=aggregate, round=2, counted_round=1)
        directory = house.write("damaged", task)
        Work(task, directory, house.warm, _silent, time.monotonic(), warn=said.append).run()
        assert (directory / UPDATE).read_bytes() == fresh.read_bytes()
        assert len(said) == 1 and "begins anew" in said[0]


def test_a_teacher_whose_state_is_lost_begins_anew_and_says_so(house: Site) -> None:
    recipe = recipe_of(house, epochs=1, teacher_epochs=0)
    said: list[str] = []
    task = task_of(house, recipe, model=version_0(house, recipe), round=3, counted_round=2)
    Work(task, house.write("lost", task), house.warm, _silent, time.monotonic(), warn=said.append).run()
    assert said == ["The teacher begins anew, because its state is no longer here."]


def test_a_teacher_that_diverges_alone_is_told_with_the_keys_of_the_distillation(house: Site) -> None:
    # Its embeddings are so large that no loss is a number.
    other = house.directory / "infinite"
    shutil.copytree(house.base_model, other)
    tensors = load_file(other / "model.safetensors")
    save_file(
        {name: tensor.fill_(math.inf) if "word_embeddings" in name else tensor for name, tensor in tensors.items()},
        other / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    recipe = recipe_of(house)
    with pytest.raises(InvalidInput, match=r"^Of the teacher: The training diverged: ") as caught:
        distill(house, recipe, model=version_0(house, recipe), teacher_model_path=str(other))
    assert "under [distillation]" in caught.value.hint


def _silent(stage: str, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
    pass


class Cancelled(Exception):
    pass


def test_a_distillation_can_be_paused_and_cancelled_at_any_step(house: Site) -> None:
    recipe = recipe_of(house, epochs=1, teacher_epochs=1)
    aggregate = version_0(house, recipe)
    whole, result = distill(house, recipe, model=aggregate)
    seen = [(done, total) for stage, done, total in house.stages if stage == "training" and done]
    half = result.steps // 2
    assert seen == [(step, half) for step in range(1, half + 1)] * 2
    task = task_of(house, recipe, model=aggregate)
    directory = house.write("ended", task)
    for step in (1, result.steps):
        left = step

        def ends(stage: str, *rest: Any) -> None:
            nonlocal left
            left -= stage == "training" and rest[0] > 0
            if not left:
                raise Cancelled

        with pytest.raises(Cancelled):
            Work(task, directory, house.warm, ends, time.monotonic()).run()
        assert not (directory / UPDATE).exists()
    with pytest.raises(Paused):
        Work(task, directory, house.warm, _silent, time.monotonic(), pausing=lambda: True).run()
    # What was ended has left nothing behind that the next attempt would learn from.
    again, _ = distill(house, recipe, model=aggregate, name="ended")
    assert again.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher_model_path": None}, "names no teacher"),
        ({"proxy_data_set": None}, "names no data set"),
        ({"spec": {"distillation": None}}, "no distillation"),
        ({"spec": {"distillation": {"teacher": {"name": "t", "layers": 1}}, "base_model": None}}, "3 layers .* of 1"),
        ({"spec": {"distillation": {"labels": False}}}, "no updates to learn from"),
    ],
)
def test_what_cannot_be_distilled_is_told_in_a_sentence(house: Site, changes: dict[str, Any], says: str) -> None:
    recipe = recipe_of(house)
    other = changes.pop("spec", {})
    recipe |= {key: value for key, value in other.items() if value is not None or key == "distillation"}
    if "base_model" in other:
        recipe["base_model"] = {"name": "tiny-encoder"}
    aggregate = version_0(house, recipe)
    with pytest.raises((InvalidInput, SiteConfigInvalid), match=says) as caught:
        distill(house, recipe, model=aggregate, **changes)
    assert caught.value.message


def test_a_teacher_with_other_tokens_is_refused(house: Site) -> None:
    other = house.directory / "other"
    other.mkdir()
    for file in house.base_model.iterdir():
        (other / file.name).write_text(file.read_text().replace("aspirin", "ibuprofen")) if (
            file.suffix == ".json"
        ) else (other / file.name).write_bytes(file.read_bytes())
    recipe = recipe_of(house)
    with pytest.raises(InvalidInput, match="same tokens"):
        distill(house, recipe, model=version_0(house, recipe), teacher_model_path=str(other))


@pytest.fixture
def members(house: Site) -> tuple[dict[str, Any], Path, list[dict[str, Any]]]:
    """A recipe without labels, and the updates of three sites that know two labels each, with their mean."""
    recipe = house.recipe(
        base_model=STUDENT,
        local={"steps": 40, "batch_size": 14, "learning_rate": 2e-2},
        distillation={"labels": False, "data": "texts", "epochs": 8, "batch_size": 14, "learning_rate": 3e-3},
    )
    start = version_0(house, recipe)
    found: list[dict[str, Any]] = []
    for number, weight in enumerate([0.5, 0.25, 0.25]):
        known = [label for label in LABELS if label != LABELS[number]]
        rows = [{"text": text, "label": label} for label in known for text in texts_of(label, rows=14, start=40)]
        path = write_rows(house.directory / f"site-{number}.jsonl", rows)
        own = DataSet(path=str(path), validation=0.0).model_dump(mode="json")
        task = house.task("train", recipe=recipe, model=start, data_set=own, seed=number)
        update, _ = house.run(f"site-{number}", task)
        found.append({"path": str(update / UPDATE), "weight": weight})
    tensors = [(load_file(member["path"]), member["weight"]) for member in found]
    mean = {name: sum(own[name] * weight for own, weight in tensors) for name in tensors[0][0]}
    path = house.directory / "mean.safetensors"
    save_file(mean, path)
    return recipe, path, found


def test_without_labels_the_mean_of_the_sites_logits_teaches(house: Site, members: Any) -> None:
    recipe, aggregate, updates = members
    rows = [{"text": text} for label in LABELS for text in texts_of(label, rows=28, start=50)]
    texts = write_rows(house.directory / "texts.jsonl", rows)
    proxy = DataSet(path=str(texts), label="", validation=0.0).model_dump(mode="json")
    change = {"members": updates, "proxy_data_set": proxy, "teacher_model_path": None}
    made, result = distill(house, recipe, model=aggregate, **change)
    found = result.metrics
    assert result.examples == 84
    assert found["distillation_kept"] == 1
    assert found["student_loss"] < 0.9 * found["aggregate_loss"]
    assert found["student_accuracy"] > found["aggregate_accuracy"]
    assert not (house.directory / "jobs").exists()

    # What taught is the weighted mean of what each update says, looked at one by one.
    (model,) = house.warm.models.values()
    tokens = next(kept for key, kept in house.warm.splits.items() if key[0][2] == "validation")
    mean = torch.zeros(len(tokens), len(LABELS))
    model.network.eval()
    inputs, labels = tokens.batch(torch.arange(len(tokens)), device="cpu")
    for member in updates:
        for name, values in load_file(member["path"]).items():
            model.federated[name].copy_(values)
        with torch.no_grad():
            mean += member["weight"] * model.network(**inputs).logits
    loss = torch.nn.functional.cross_entropy(mean, labels)
    assert found["teacher_loss"] == pytest.approx(float(loss), rel=1e-4)
    assert found["teacher_accuracy"] == pytest.approx(float((mean.argmax(1) == labels).float().mean()))

    # Where the texts have labels, nobody looks at them.
    path = write_rows(house.directory / "labelled.jsonl", [{**row, "label": "none of the recipe's"} for row in rows])
    change["proxy_data_set"] = DataSet(path=str(path), validation=0.0).model_dump(mode="json")
    again, _ = distill(replace(house, warm=Warm()), recipe, model=aggregate, name="again", **change)
    assert again.read_bytes() == made.read_bytes()
