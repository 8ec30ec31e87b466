from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.plan import Done, Past, Plan, Site, plan, sites_of
from protos import jobspec
from protos.v1 import agent_pb2, operator_pb2
from tests.unit.coordinator.shapes import LLAMA_3_8B

GB = 10**9
ON_GPU = Site("st-olav", False, "cuda:0 (NVIDIA L4)", 24 * GB, 1, 64 * GB, 500 * GB, 1698, LLAMA_3_8B)
ON_CPU = replace(ON_GPU, device="cpu", gpu_memory_bytes=0)


def recipe(**tables: Any) -> jobspec.JobSpec:
    fields: dict[str, Any] = {
        "name": "flowertune",
        "task": {"type": "causal-lm"},
        "data": {"name": "flashcards"},
        "method": {"type": "lora", "rank": 32, "targets": ["q_proj", "v_proj"]},
        "evaluation": {"where": ["house"], "metric": "loss"},
        "rounds": 10,
        **tables,
    }
    fields["base_model"] = {"name": "llama", "dtype": "bfloat16", **tables.get("base_model", {})}
    fields["local"] = {"steps": 10, "batch_size": 16, **tables.get("local", {})}
    return jobspec.parse(fields)


QLORA = {"base_model": {"quantization": "nf4"}, "local": {"gradient_checkpointing": True}}


def refusal(made: Plan) -> str:
    (only,) = made.refusals
    return only


def test_what_fits_is_not_refused():
    made = plan(recipe(**QLORA), [ON_GPU])
    assert made.refusals == []
    assert made.sites[0].micro_batch == 16


def test_on_a_gpu_it_says_how_many_rows_fit_at_a_time():
    made = plan(recipe(base_model={"quantization": "nf4"}), [ON_GPU])
    assert made.refusals == []
    assert made.sites[0].micro_batch == 4


@pytest.mark.parametrize(
    ("gigabytes", "remedy"),
    [
        (
            18,
            'fit with local.gradient_checkpointing = true or base_model.quantization = "nf4" or task.max_length = 128.',
        ),
        (16, 'It would fit with base_model.quantization = "nf4".'),
        (8, 'fit with local.gradient_checkpointing = true, base_model.quantization = "nf4" together.'),
        (4, "No setting would make it fit"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would(gigabytes: int, remedy: str):
    said = refusal(plan(recipe(), [replace(ON_GPU, gpu_memory_bytes=gigabytes * GB)]))
    assert said.startswith(
        f"st-olav needs about 19.9 GB of its GPU's memory and has {gigabytes}.0 GB, 1 row at a time."
    )
    assert remedy in said


def test_a_change_that_is_named_does_make_it_fit():
    small = replace(ON_GPU, gpu_memory_bytes=16 * GB)
    assert plan(recipe(base_model={"quantization": "nf4"}), [small]).refusals == []


def test_on_a_cpu_too_many_rows_at_a_time_are_refused_because_nothing_halves_them():
    site = replace(ON_CPU, memory_bytes=32 * GB)
    said = refusal(plan(recipe(base_model={"quantization": "nf4"}), [site]))
    assert "32.0 GB, 16 rows at a time. It would fit with local.micro_batch_size = " in said
    rows = int(said.partition("local.micro_batch_size = ")[2].partition(" ")[0])
    local = {"micro_batch_size": rows}
    assert plan(recipe(base_model={"quantization": "nf4"}, local=local), [site]).refusals == []


def test_memory_of_the_machine_and_disk_count_too():
    assert "of memory and has 2.0 GB" in refusal(plan(recipe(**QLORA), [replace(ON_GPU, memory_bytes=2 * GB)]))
    assert "of disk and has 0.1 GB free. Make room" in refusal(
        plan(recipe(**QLORA), [replace(ON_GPU, free_disk_bytes=GB // 10)])
    )


def test_what_an_agent_does_not_report_refuses_nothing():
    silent = replace(ON_GPU, gpu_memory_bytes=0, memory_bytes=0, free_disk_bytes=0)
    assert plan(recipe(), [silent]).refusals == []


def test_without_the_base_models_layers_nothing_is_made_up():
    made = plan(recipe(), [replace(ON_GPU, shapes=None)])
    assert (made.ledger, made.seconds, made.sites[0].needs) == (None, None, None)


def test_a_site_that_has_not_reported_the_model_is_planned_with_another_ones_layers():
    made = plan(recipe(**QLORA), [ON_GPU, replace(ON_GPU, name="gard", shapes=None, gpu_memory_bytes=4 * GB)])
    assert refusal(made).startswith("gard needs")


def test_a_synthetic_job_has_bytes_and_no_memory():
    synthetic = jobspec.parse(
        {"name": "n", "task": {"type": "synthetic", "payload_mb": 2}, "local": {"steps": 1}, "rounds": 3}
    )
    made = plan(synthetic, [replace(ON_CPU, shapes=None)])
    assert made.ledger is not None
    assert made.ledger.up_bytes == pytest.approx(6e6, rel=0.001)
    assert made.sites[0].needs is None


def done(site: str, *, steps_per_second: float, transfer: float = 0.0) -> Done:
    seconds = {"load": 5.0, "save": 1.0, "fetch": transfer / 2, "upload": transfer / 2}
    return Done(site, 10, {"steps_per_second": steps_per_second}, seconds)


def test_hours_are_those_that_earlier_jobs_took_at_each_site():
    sites = [ON_GPU, replace(ON_GPU, name="gard")]
    before = Past(recipe(**QLORA), (done("st-olav", steps_per_second=0.5), done("gard", steps_per_second=0.1)))
    made = plan(recipe(**QLORA), sites, past=[before])
    assert [site.seconds for site in made.sites] == pytest.approx([10 * (10 / 0.5 + 6), 10 * (10 / 0.1 + 6)])
    # Every round waits for the slower one.
    assert made.seconds == pytest.approx(10 * (10 / 0.1 + 6))
    assert made.unmeasured == ()


def test_steps_of_more_rows_take_longer_in_proportion_and_bytes_too():
    before = Past(recipe(**QLORA), (done("st-olav", steps_per_second=0.5, transfer=8.0),))
    local = {"gradient_checkpointing": True, "batch_size": 32}
    made = plan(recipe(base_model=QLORA["base_model"], local=local), [ON_GPU], past=[before])
    assert made.seconds == pytest.approx(10 * (10 * 2 / 0.5 + 6 + 8), rel=0.001)
    half = plan(recipe(**QLORA, encoding={"up": "bf16", "down": "bf16"}), [ON_GPU], past=[before])
    # 10 rounds up and 9 down in half of the bytes each.
    assert half.seconds == pytest.approx(10 * (10 / 0.5 + 6) + 8 / 4 * 19, rel=0.01)


def test_only_a_job_that_is_alike_is_a_measurement():
    other = Past(recipe(), (done("st-olav", steps_per_second=0.5),))
    made = plan(recipe(**QLORA), [ON_GPU], past=[other])
    assert (made.seconds, made.unmeasured, made.sites[0].seconds) == (None, ("st-olav",), None)


def test_who_was_not_measured_is_taken_to_be_as_slow_as_the_slowest():
    sites = [ON_GPU, replace(ON_GPU, name="gard")]
    before = Past(recipe(**QLORA), (done("st-olav", steps_per_second=0.5),))
    made = plan(recipe(**QLORA, cohort={"size": 1}), sites, past=[before])
    assert made.unmeasured == ("gard",)
    assert made.seconds == pytest.approx(10 * 26)
    assert made.sites[1].seconds is None


def test_epochs_are_counted_in_rows():
    before = Past(recipe(**QLORA), (done("st-olav", steps_per_second=1.0),))
    local = {"steps": None, "epochs": 2, "gradient_checkpointing": True}
    made = plan(recipe(base_model=QLORA["base_model"], local=local), [ON_GPU], past=[before])
    # 1698 rows are 107 batches of 16.
    assert made.seconds == pytest.approx(10 * (214 + 6))


def test_a_cohort_that_is_larger_than_who_is_there_is_counted_in_full():
    made = plan(recipe(**QLORA, cohort={"size": 2}), [ON_GPU])
    assert made.ledger is not None
    assert made.ledger.up_bytes == 20 * made.ledger.first_version_bytes


def view(name: str, *, house: bool = False, state: str = "ENROLLED") -> operator_pb2.SiteView:
    layers = agent_pb2.LinearLayers(name="layers.*.q_proj", out_features=8, in_features=8, count=4)
    model = agent_pb2.BaseModelInfo(name="llama", digest="a" * 64, parameters=1000, layers=4, linear=[layers])
    agent = agent_pb2.AgentInfo(
        device="cuda:0 (X)",
        gpu_memory_bytes=7,
        data_sets=[agent_pb2.DataSetInfo(name="flashcards", rows=12)],
        base_models=[model],
    )
    return operator_pb2.SiteView(name=name, house=house, state=state, agent=agent)


def test_the_sites_of_a_plan_are_those_that_may_train_and_the_house_agent_that_evaluates():
    views = [view("st-olav"), view("gard", state="REVOKED"), view("house", house=True), view("ninds")]
    found = sites_of(recipe(cohort={"sites": ["st-olav", "gard"]}), views)
    assert [(site.name, site.house) for site in found] == [("st-olav", False), ("house", True)]
    assert (found[0].rows, found[0].gpu_memory_bytes, found[0].on_gpu) == (12, 7, True)
    at_sites = recipe(evaluation={"where": ["sites"], "metric": "loss"})
    assert [site.name for site in sites_of(at_sites, views)] == ["ninds", "st-olav"]


def test_a_model_of_another_digest_or_with_more_layers_than_the_recipe_keeps():
    assert sites_of(recipe(base_model={"digest": "b" * 64}), [view("a")])[0].shapes is None
    cut = sites_of(recipe(base_model={"layers": 1}), [view("a")])[0].shapes
    assert cut is not None
    assert [linear.count for linear in cut.linear] == [1]


def test_a_recipe_that_wants_a_distillation_is_refused_where_there_is_no_house_agent():
    fields = {"name": "j", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 2, "distillation": {}}
    spec = jobspec.parse(fields)
    (refused,) = plan(spec, sites_of(spec, [view("st-olav")])).refusals
    assert "without the distillation" in refused and "silotune site invite" in refused
    made = plan(spec, sites_of(spec, [view("st-olav"), view("house", house=True)]))
    assert not made.refusals and made.ledger is not None and made.ledger.distillation_bytes
