"""The trainer makes version 0 and later versions by itself, and sends what it has learnt in few bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client_agent.hashing import hash_file
from client_agent.taskdir import UPDATE, TaskSpec, VersionNeeded
from client_agent.training.encoding import INITIAL
from protos.adapters import moving, update_tensors
from protos.encoded_files import TensorFile, decoded, rebuild, write_encoded
from protos.encodings import encoded_header
from protos.jobspec import parse
from tests.unit.client_agent.training.conftest import Site

ENCODING = {"up": "int4", "down": "int8", "error_feedback": True, "block": 32}


def recipe_of(site: Site, **changes: Any) -> dict[str, Any]:
    lora = {"type": "lora", "rank": 4, "alpha": 8, "targets": ["query", "value"], "ranks": {"small": 2}}
    return site.recipe(**{"method": lora, "encoding": ENCODING, **changes})


def train(here: Site, recipe: dict[str, Any], name: str, **changes: Any) -> tuple[Path, TaskSpec]:
    task = here.task("train", recipe=recipe, state_directory=str(here.directory / "jobs" / "job-1"), **changes)
    return here.run(name, task)[0], task


def values_of(path: Path, *, recipe: dict[str, Any], version: Path, round_number: int = 1, site: str = "") -> Any:
    """The decoded tensors of an update."""
    spec, found = parse(recipe), {}
    with TensorFile(version) as old, TensorFile(path, encoded=True) as file:
        held = update_tensors(spec, old.layout, round_number=round_number, site=site)
        assert file.layout == encoded_header(held, encoding="int4", block=32)[1]
        for name, _, shape in held:
            count = torch.Size(shape).numel()
            part = decoded(file, name, shape, encoding="int4", block=32)(0, count)
            found[name] = torch.tensor(part).reshape(shape)
    return found


def test_an_update_in_four_bits_is_what_was_trained_and_its_residual_is_the_rest(site: Site) -> None:
    recipe = recipe_of(site)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    version, digest = init / UPDATE, hash_file(init / UPDATE).hexdigest()
    raw, _ = train(site, recipe_of(site, encoding={**ENCODING, "up": "raw"}), "raw", model=version)
    # The warm model has been trained; version 0 is made anew, and is what INIT made bit for bit.
    first, task = train(site, recipe, "first", model_digest=digest)
    state = Path(task.state_directory)
    assert (state / INITIAL).read_bytes() == version.read_bytes()
    before, trained = load_file(version), load_file(raw / UPDATE)
    sent = values_of(first / UPDATE, recipe=recipe, version=version)
    lost = load_file(state / "residual-1.safetensors")
    assert sent.keys() == lost.keys() == trained.keys()
    for name, values in sent.items():
        torch.testing.assert_close(values + lost[name], trained[name] - before[name], rtol=0, atol=1e-7)
        # With Adam every value has moved by about the same: next to nothing is lost of one in seven.
        assert lost[name].abs().max() <= 0.16 * (trained[name] - before[name]).abs().max()
    assert (first / UPDATE).stat().st_size < (raw / UPDATE).stat().st_size / 3

    # The same task once more, as after a kill: the same bytes, and nothing is added twice.
    update, residual = (first / UPDATE).read_bytes(), (state / "residual-1.safetensors").read_bytes()
    again, _ = train(site, recipe, "again", model_digest=digest)
    assert (again / UPDATE).read_bytes() == update
    assert (state / "residual-1.safetensors").read_bytes() == residual


def test_an_update_in_few_directions_is_what_was_trained_but_for_its_residual(site: Site) -> None:
    encoding = {"up": "svd", "svd_energy_start": 0.5, "svd_energy_end": 0.7}
    recipe = recipe_of(site, encoding=encoding, method={"type": "full", "freeze_embeddings": True})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    version = init / UPDATE
    raw, _ = train(site, {**recipe, "encoding": {"up": "raw"}}, "raw", model=version)
    sizes = []
    for number in (1, 4):
        sent, task = train(site, recipe, f"round {number}", model=version, round=number)
        rebuild(sent / UPDATE, base=version, encoding="svd", block=64, output=sent / "decoded")
        sizes.append((sent / UPDATE).stat().st_size)
    before, trained, decoded = load_file(version), load_file(raw / UPDATE), load_file(sent / "decoded")
    lost = load_file(Path(task.state_directory, "residual-4.safetensors"))
    for name, values in trained.items():
        torch.testing.assert_close(decoded[name] + lost[name], values, rtol=0, atol=1e-6)
        change = (values - before[name]).double()
        # The last round keeps 70 % of the squared sum, the first one 50 %.
        assert lost[name].double().square().sum() <= 0.3001 * change.square().sum()
    assert sizes[0] < sizes[1] < (raw / UPDATE).stat().st_size


def test_later_rounds_start_from_the_rebuilt_version_and_from_what_was_lost_in_the_update_that_counted(
    site: Site,
) -> None:
    recipe = recipe_of(site, aggregation={"rule": "rolora"})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    version_0 = init / UPDATE
    first, task = train(site, recipe, "first", site="small", model_digest=hash_file(version_0).hexdigest())
    state = Path(task.state_directory)
    sent = values_of(first / UPDATE, recipe=recipe, version=version_0, site="small")
    assert {tuple(values.shape) for name, values in sent.items() if "lora" in name} == {(32, 2)}

    # Version 1 as a coordinator makes it: the head moved, the rest as before.
    encoded, version_1 = site.directory / "encoded", site.directory / "version-1"
    with TensorFile(version_0) as file:

        def moved(name: str):  # type: ignore[no-untyped-def]
            part = file.leading(name, file.shape(name))
            return lambda start, count: part(start, count) + ("classifier" in name) * part(start, count)

        write_encoded(
            moved, tensors=file.layout.named, base=version_0, encoding="int8", block=32, seed=0, output=encoded
        )
    digest = rebuild(encoded, base=version_0, encoding="int8", block=32, output=version_1)
    changes = {"round": 2, "site": "small", "model_digest": digest, "encoded_path": str(encoded), "seed": 6}
    counted, _ = train(site, recipe, "counted", counted_round=1, **changes)
    assert (counted / "version.safetensors").read_bytes() == version_1.read_bytes()
    kept = {path.name for path in state.iterdir()}
    assert kept == {INITIAL, "residual-1.safetensors", "residual-2.safetensors"}
    lost, earlier = load_file(state / "residual-2.safetensors"), load_file(state / "residual-1.safetensors")
    sent = values_of(counted / UPDATE, recipe=recipe, version=version_1, round_number=2, site="small")
    raw, _ = train(
        site, recipe_of(site, aggregation={"rule": "rolora"}, encoding={**ENCODING, "up": "raw"}), "raw",
        **{**changes, "encoded_path": None}, model=version_1,
    )  # fmt: skip
    trained, before = load_file(raw / UPDATE), load_file(version_1)
    for name, values in sent.items():
        start = before[name][tuple(slice(size) for size in values.shape)]
        # A is sent for the first time, the head for the second.
        expected = trained[name] - start + earlier.get(name, 0)
        torch.testing.assert_close(values + lost[name], expected, rtol=0, atol=1e-6)
    # Of B, which round 3 trains again, what was lost in round 1 is still there.
    for name in earlier.keys() - sent.keys():
        assert "lora_B" in name and torch.equal(lost[name], earlier[name])
    # Had the update of round 1 not counted, nothing of it would be added, and it is forgotten.
    dropped, _ = train(site, recipe, "dropped", counted_round=0, **changes)
    assert (dropped / UPDATE).read_bytes() != (counted / UPDATE).read_bytes()
    assert {path.name for path in state.iterdir()} == {INITIAL, "residual-2.safetensors"}


def test_factors_that_the_rule_never_trains_are_made_here_and_not_fetched(site: Site) -> None:
    recipe = recipe_of(site, aggregation={"rule": "ffa-lora"})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    version_0, encoded, version_1 = init / UPDATE, site.directory / "encoded", site.directory / "version-1"
    with TensorFile(version_0) as file:
        fetched = moving(parse(recipe), file.layout.named)
        assert {name for name, _, _ in file.layout.named} - {name for name, _, _ in fetched} == {
            name for name, _, _ in file.layout.named if "lora_A" in name
        }

        def moved(name: str):  # type: ignore[no-untyped-def]
            part = file.leading(name, file.shape(name))
            return lambda start, count: part(start, count) + 0.5

        way: dict[str, Any] = {"tensors": fetched, "base": version_0, "encoding": "int8", "block": 32}
        write_encoded(moved, seed=0, output=encoded, **way)
    digest = rebuild(encoded, output=version_1, **way)
    second, _ = train(site, recipe, "second", round=2, model_digest=digest, encoded_path=str(encoded))
    assert (second / "version.safetensors").read_bytes() == version_1.read_bytes()
    before, after = load_file(version_0), load_file(version_1)
    assert all(torch.equal(after[name], before[name]) == ("lora_A" in name) for name in before)


def test_without_error_feedback_nothing_is_kept_but_version_0(site: Site) -> None:
    recipe = recipe_of(site, encoding={**ENCODING, "error_feedback": False})
    init, _ = site.run("init", site.task("init", recipe=recipe))
    _, task = train(site, recipe, "first", model_digest=hash_file(init / UPDATE).hexdigest())
    assert [path.name for path in Path(task.state_directory).iterdir()] == [INITIAL]


def test_a_torn_version_0_is_made_anew_and_one_that_is_not_the_jobs_is_said_to_be_of_no_use(site: Site) -> None:
    recipe = recipe_of(site)
    init, _ = site.run("init", site.task("init", recipe=recipe))
    content = (init / UPDATE).read_bytes()
    state = site.directory / "jobs" / "job-1"
    state.mkdir(parents=True)
    (state / INITIAL).write_bytes(content[:-5])
    evaluated = dataclasses.replace(
        site.task("evaluate", recipe=recipe, model_digest=hash_file(init / UPDATE).hexdigest()),
        state_directory=str(state),
    )
    _, torn = site.run("torn", evaluated)
    assert (state / INITIAL).read_bytes() == content
    _, plain = site.run("plain", dataclasses.replace(evaluated, model_path=str(init / UPDATE)))
    assert torn.metrics == plain.metrics
    with pytest.raises(VersionNeeded, match="as this site builds it, is not the job's"):
        site.run("other", dataclasses.replace(evaluated, model_digest="f" * 64))
