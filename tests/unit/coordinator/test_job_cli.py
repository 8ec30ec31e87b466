from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator import job_cli, recipe
from protos.v1 import agent_pb2, operator_pb2
from tests.unit.coordinator.conftest import add_job, facts_of

RECIPE = 'name = "noise"\nrounds = 2\n[task]\ntype = "synthetic"\n[local]\nsteps = 1\n'


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_submit_prints_the_job_and_what_it_will_cost(silotune: Any, recipe_file: Path):
    result = silotune(job_cli.job, "submit", str(recipe_file))
    assert result.stdout.startswith("job-")
    assert "What it will cost:\n  Each round moves 2.0 MB." in result.stdout
    assert "Note:\n  No site is connected now." in result.stdout
    assert "Next: silotune job watch job-" in result.stderr


def test_a_dry_run_submits_nothing(door: Any, silotune: Any, recipe_file: Path):
    result = silotune(job_cli.job, "submit", str(recipe_file), "--dry-run")
    assert result.stdout.startswith("noise: the recipe is valid; nothing was submitted.")
    assert not door.submissions


LORA_RECIPE = """
name = "notes"
rounds = 4
[task]
type = "causal-lm"
max_length = 512
[data]
name = "notes"
[base_model]
name = "llama"
[method]
type = "lora"
targets = ["q_proj"]
[local]
steps = 5
batch_size = 8
[evaluation]
where = []
metric = "loss"
"""


def holder(name: str, *, gpu_memory_bytes: int) -> operator_pb2.SiteView:
    """A site that holds a model of 1.1 billion parameters."""
    layers = agent_pb2.LinearLayers(name="layers.*.q_proj", out_features=4096, in_features=4096, count=64)
    base = agent_pb2.BaseModelInfo(
        name="llama",
        digest="a" * 64,
        parameters=64 << 24,
        hidden_size=4096,
        layers=64,
        vocabulary=1000,
        linear=[layers],
    )
    agent = agent_pb2.AgentInfo(
        device="cuda:0 (L4)", gpu_memory_bytes=gpu_memory_bytes, memory_bytes=64 << 30, free_disk_bytes=1 << 40,
        base_models=[base],
    )  # fmt: skip
    return operator_pb2.SiteView(name=name, state="ENROLLED", connected=True, agent=agent)


def test_a_plan_says_bytes_memory_and_hours_and_submits_nothing(door: Any, silotune: Any, recipe_file: Path):
    recipe_file.write_text(LORA_RECIPE)
    door.sites = [holder("gard", gpu_memory_bytes=24 << 30)]
    before = add_job(door, state=operator_pb2.JOB_STATE_COMPLETED)
    update = before.rounds[0].updates[0]
    update.site, update.steps, update.metrics["steps_per_second"] = "gard", 5, 0.5
    before.spec_json = recipe.read(recipe_file).canonical_json
    result = silotune(job_cli.job, "plan", str(recipe_file))
    assert result.exit_code == 0, result.stdout
    assert "gard" in result.stdout
    # 64 pairs of 8 x 4096: 16.8 MB of values up and down in each of 4 rounds.
    assert "Training: 64.1 MiB up and 64.1 MiB down in 4 rounds, 128.1 MiB in all" in result.stdout
    assert "Flower sends them: 128.1 MiB" in result.stdout
    assert "0:00:40" in result.stdout
    told = facts_of(silotune(job_cli.job, "plan", str(recipe_file), "--format", "json"))
    assert (told["seconds"], told["unmeasured"], told["refusals"]) == (40.0, [], [])
    assert told["sites"][0]["has"]["gpu_memory_bytes"] == 24 << 30
    assert told["sites"][0]["needs"]["device"] > 4 * (64 << 24)
    assert not door.submissions


def test_a_plan_that_cannot_fit_is_exit_code_3_and_says_what_would(door: Any, silotune: Any, recipe_file: Path):
    recipe_file.write_text(LORA_RECIPE)
    door.sites = [holder("gard", gpu_memory_bytes=4 << 30), holder("ninds", gpu_memory_bytes=24 << 30)]
    result = silotune(job_cli.job, "plan", str(recipe_file))
    assert result.exit_code == 3
    assert "Cannot fit: gard needs about" in result.stdout
    assert 'It would fit with base_model.dtype = "bfloat16"' in result.stdout
    assert "not measured yet" in result.stdout


def test_a_plan_without_a_site_that_holds_the_model_says_so(door: Any, silotune: Any, recipe_file: Path):
    recipe_file.write_text(LORA_RECIPE)
    result = silotune(job_cli.job, "plan", str(recipe_file))
    assert result.exit_code == 0
    assert "Nothing can be planned: no enrolled site has reported the layers of base model 'llama'." in result.stdout


def test_the_same_submit_token_gives_the_same_job(silotune: Any, recipe_file: Path):
    arguments = ("submit", str(recipe_file), "--submit-token", "nightly", "--format", "json")
    first, second = (facts_of(silotune(job_cli.job, *arguments))["job_id"] for _ in range(2))
    assert first == second


def test_a_wrong_recipe_is_refused_before_anything_is_sent(door: Any, silotune: Any, recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("steps", "stepps"))
    door.stop()
    result = silotune(job_cli.job, "submit", str(recipe_file))
    assert result.exit_code == 3
    assert result.stderr == (
        f"error: {recipe_file}:6: local.stepps is not a known key.\nhint: Did you mean local.steps?\n"
    )


def test_what_the_coordinator_refuses_has_its_line_too(silotune: Any, recipe_file: Path):
    recipe_file.write_text(RECIPE.replace("noise", "refused"))
    result = silotune(job_cli.job, "submit", str(recipe_file))
    assert result.exit_code == 3
    assert result.stderr == f"error: {recipe_file}:2: rounds is too many for this disk.\n"


def test_why_is_one_sentence_and_a_line_for_each_who_is_waited_for(door: Any, silotune: Any):
    add_job(door)
    assert silotune(job_cli.job, "why", "j1").stdout == (
        "round 1 waits for gard\n  gard: trains round 1, has not taken it yet\n"
    )


def test_show_says_which_updates_did_not_count_and_why(door: Any, silotune: Any):
    add_job(door)
    result = silotune(job_cli.job, "show", "j1")
    assert "Updates that did not count" in result.stdout
    assert "It has NaN." in result.stdout
    assert facts_of(silotune(job_cli.job, "show", "j1", "--format", "json"))["spec"] == {"name": "noise"}


def test_jobs_are_listed(door: Any, silotune: Any):
    assert "There is no job yet" in silotune(job_cli.job, "list").stdout
    add_job(door)
    assert "noise" in silotune(job_cli.job, "list").stdout


def test_a_job_is_paused_resumed_and_cancelled(door: Any, silotune: Any):
    add_job(door)
    states = [
        facts_of(silotune(job_cli.job, action, "j1", "--format", "json"))["state"] for action in ("pause", "resume")
    ]
    assert states == ["PAUSED", "RUNNING"]
    assert silotune(job_cli.job, "cancel", "j1").stdout.startswith("CANCELLED, round 1 of 2")


def test_sites_that_were_set_aside_are_readmitted(door: Any, silotune: Any):
    add_job(door)
    asked: list[operator_pb2.ControlJobRequest] = []
    door.on_control = asked.append
    silotune(job_cli.job, "readmit", "j1", "gard")
    result = silotune(job_cli.job, "readmit", "j1")
    assert result.exit_code == 0
    assert [(one.action, one.site) for one in asked] == [(operator_pb2.JOB_ACTION_READMIT, "gard"), (4, "")]
    assert result.stdout == "RUNNING, round 1 of 2: round 1 waits for gard\n"


def test_why_a_job_failed_is_said_with_the_reason_of_each_site(door: Any, silotune: Any):
    state = add_job(door, state=operator_pb2.JOB_STATE_FAILED)
    state.job.sentence = "round 1 cannot reach its quorum: set aside: gard (no column 'text')"
    state.tasks[0].state = operator_pb2.TASK_STATE_FAILED
    state.tasks[0].reason = "Data set 'answers' has no column 'text'."
    lines = [state.job.sentence, "  gard: trains round 1, failed: Data set 'answers' has no column 'text'."]
    assert silotune(job_cli.job, "why", "j1").stdout.splitlines() == lines
    told = facts_of(silotune(job_cli.job, "why", "j1", "--format", "json"))
    assert (told["state"], told["waiting"], len(told["failed"])) == ("FAILED", [], 1)


def test_what_the_jobs_state_does_not_allow_is_exit_code_5(door: Any, silotune: Any):
    add_job(door, state=operator_pb2.JOB_STATE_COMPLETED)
    assert silotune(job_cli.job, "pause", "j1").exit_code == 5


@pytest.mark.parametrize("command", ["watch", "why", "show", "pause", "events"])
def test_a_job_that_is_not_there_is_exit_code_4(silotune: Any, command: str):
    result = silotune(job_cli.job, command, "nope")
    assert result.exit_code == 4
    assert result.stderr == "error: There is no job 'nope'.\nhint: `silotune job list` shows them all.\n"


def test_events_come_page_by_page_until_the_job_ends(door: Any, silotune: Any):
    add_job(door, state=operator_pb2.JOB_STATE_COMPLETED)
    door.events += [operator_pb2.EventView(id=n, unix_seconds=n, round=1, sentence=f"step {n}") for n in range(1, 6)]
    for arguments in (["events", "j1"], ["events", "j1", "--follow"]):
        lines = silotune(job_cli.job, *arguments).stdout.splitlines()
        assert [line.rpartition("  ")[2] for line in lines] == [f"step {n}" for n in range(1, 6)]
    assert len(facts_of(silotune(job_cli.job, "events", "j1", "--format", "json"))["events"]) == 5


def test_watching_a_job_that_was_cancelled_is_exit_code_1(door: Any, silotune: Any):
    add_job(door, state=operator_pb2.JOB_STATE_CANCELLED)
    assert silotune(job_cli.job, "watch", "j1").exit_code == 1
