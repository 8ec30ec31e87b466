"""The byte ledger, against the FlowerTune study's own figures and against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.traffic import Linear, Shapes, ledger, numpy_bytes, paths_of, version_tensors
from protos import jobspec
from protos.tensors import make_header
from tests.unit.coordinator.shapes import LLAMA_3_8B

SITES = [f"hospital-{number:02}" for number in range(20)]
MIB = 1 << 20
# A: 64 matrices of 32 x 4096; B: 32 of 4096 x 32 and 32 of 1024 x 32.
A_VALUES, B_VALUES = 8_388_608, 5_242_880


def flowertune(*, rounds: int = 10, **changes: Any) -> jobspec.JobSpec:
    fields: dict[str, Any] = {
        "name": "flowertune",
        "task": {"type": "causal-lm"},
        "data": {"name": "flashcards"},
        "base_model": {"name": "bio-medical-llama-3-8b"},
        "method": {"type": "lora", "rank": 32, "alpha": 64, "targets": ["q_proj", "v_proj"]},
        "local": {"steps": 10, "batch_size": 16},
        "cohort": {"size": 2},
        "evaluation": {"where": ["house"], "metric": "loss"},
        "rounds": rounds,
    }
    return jobspec.parse({**fields, **changes})


def encoded(rule: str, up: str, down: str) -> jobspec.JobSpec:
    return flowertune(aggregation={"rule": rule}, encoding={"up": up, "down": down})


def test_the_studys_ledger_comes_out_of_the_same_shapes():
    _, version = make_header(version_tensors(flowertune(), LLAMA_3_8B))
    assert len(version.tensors) == 128
    assert sum(tensor.elements for tensor in version.tensors) == A_VALUES + B_VALUES == 13_631_488
    # Two sites in one direction of one round; then both directions of 10 and of 100 rounds.
    assert 2 * numpy_bytes(version) / MIB == 104.03125
    assert ledger(flowertune(), LLAMA_3_8B, sites=SITES).numpy_bytes / MIB == pytest.approx(2080.6, abs=0.05)
    assert ledger(flowertune(rounds=100), LLAMA_3_8B, sites=SITES).numpy_bytes / MIB == 20_806.25


def test_ours_in_raw_differs_from_it_by_headers_alone():
    book = ledger(flowertune(), LLAMA_3_8B, sites=SITES)
    values = 4 * (A_VALUES + B_VALUES)
    assert book.up_bytes == book.down_bytes == 20 * book.first_version_bytes
    assert 0 < book.first_version_bytes - values < 128 * 200
    assert (book.up_bytes + book.down_bytes) / MIB == pytest.approx(2080.7, abs=0.05)


@pytest.mark.parametrize(
    ("rule", "up", "down", "mebibytes"),
    [
        # By hand: 2 sites, 10 rounds up and 9 down; 66 bytes for 64 values in 8 bits, 34 in 4.
        ("mean", "int8", "int8", 2 * 13_631_488 * 66 / 64 * 19 / MIB),
        ("mean", "int4", "int4", 2 * 13_631_488 * 34 / 64 * 19 / MIB),
        ("mean", "bf16", "bf16", 2 * 13_631_488 * 2 * 19 / MIB),
        # Half of the rounds B, half of them A; down both.
        ("rolora", "int8", "int4", 2 * 13_631_488 * (66 * 5 + 34 * 9) / 64 / MIB),
        ("rolora", "int8", "int8", 2 * 13_631_488 * 66 * (5 + 9) / 64 / MIB),
        # A stays as it was in version 0.
        ("ffa-lora", "int4", "int8", 2 * B_VALUES * (34 * 10 + 66 * 9) / 64 / MIB),
        # 64 matrices of 32 x 32.
        ("fed-sb", "int8", "int4", 2 * 65_536 * (66 * 10 + 34 * 9) / 64 / MIB),
    ],
)
def test_encodings_and_rules_cost_what_arithmetic_says(rule: str, up: str, down: str, mebibytes: float):
    book = ledger(encoded(rule, up, down), LLAMA_3_8B, sites=SITES)
    # What is left is 38 headers.
    assert 0 <= (book.up_bytes + book.down_bytes) / MIB - mebibytes < 38 * 192 * 160 / MIB


def test_of_svd_a_ledger_says_the_most_that_it_can_be():
    book, raw = (ledger(encoded("mean", way, way), LLAMA_3_8B, sites=SITES) for way in ("svd", "raw"))
    assert book.up_bytes == raw.up_bytes
    # Version 0 each site makes by itself.
    assert book.down_bytes == raw.down_bytes * 9 / 10


def test_which_recipes_keep_ten_rounds_within_300_mebibytes():
    def within(rule: str, up: str, down: str) -> bool:
        book = ledger(encoded(rule, up, down), LLAMA_3_8B, sites=SITES)
        return book.up_bytes + book.down_bytes <= 300 * MIB

    widths = ("raw", "bf16", "int8", "int4")
    assert {(up, down) for up in widths for down in widths if within("mean", up, down)} == {("int4", "int4")}
    assert {(up, down) for up in widths for down in widths if within("rolora", up, down)} == {
        ("int8", "int4"),
        ("int4", "int4"),
    }


def test_a_site_of_lower_rank_sends_less_and_fetches_as_much():
    method = {"type": "lora", "rank": 32, "targets": ["q_proj", "v_proj"], "ranks": {"hospital-00": 8}}
    book = ledger(flowertune(method=method, cohort={"size": "all"}), LLAMA_3_8B, sites=SITES)
    small, large = book.sites["hospital-00"], book.sites["hospital-01"]
    assert small.up_bytes / large.up_bytes == pytest.approx(8 / 32, rel=0.002)
    assert small.down_bytes == large.down_bytes


def test_what_is_folded_makes_versions_grow():
    book = ledger(flowertune(aggregation={"rule": "flora"}), LLAMA_3_8B, sites=SITES)
    # Two sites of rank 32 in each of ten rounds, beside the pair of rank 32.
    assert book.last_version_bytes / book.first_version_bytes == pytest.approx(1 + 20, rel=0.01)
    assert book.down_bytes / (2 * book.first_version_bytes) == pytest.approx(
        sum(1 + 2 * n for n in range(10)), rel=0.01
    )


def test_what_means_of_factors_miss_has_one_sites_rank_less():
    book = ledger(flowertune(aggregation={"rule": "fedex"}), LLAMA_3_8B, sites=SITES)
    assert book.last_version_bytes / book.first_version_bytes == pytest.approx(1 + 10, rel=0.01)
    # A fold never has more columns than the matrix that it is added to: 1024 of v_proj.
    long = ledger(flowertune(aggregation={"rule": "flora"}, rounds=70), LLAMA_3_8B, sites=SITES)
    assert long.last_version_bytes == pytest.approx(4 * 32 * ((32 + 4096) * 8192 + (32 + 1024) * 5120), rel=0.01)


def test_the_memory_of_a_plan_is_that_of_the_last_round():
    assert ledger(flowertune(aggregation={"rule": "flora"}), LLAMA_3_8B, sites=SITES).fold_rank == 10 * 2 * 32
    assert ledger(flowertune(aggregation={"rule": "fedex"}), LLAMA_3_8B, sites=SITES).fold_rank == 10 * 32
    assert ledger(flowertune(), LLAMA_3_8B, sites=SITES).fold_rank == 0


def test_a_site_of_several_processes_fetches_whole_versions_of_an_encoded_job():
    spec = flowertune(encoding={"up": "int4", "down": "int4"}, cohort={"sites": SITES})
    book = ledger(spec, LLAMA_3_8B, sites=SITES, whole=SITES[:1])
    several, others = book.sites[SITES[0]], book.sites[SITES[1]]
    assert several.up_bytes == others.up_bytes
    assert several.down_bytes == 10 * book.first_version_bytes
    # Version 0 is made at each site.
    assert others.down_bytes == 9 * book.encoded_version_bytes < several.down_bytes / 7


def test_every_round_has_its_cohort_and_the_same_job_always_the_same():
    book = ledger(flowertune(), LLAMA_3_8B, sites=SITES)
    assert [len(set(cohort)) for cohort in book.cohorts] == [2] * 10
    assert sum(site.rounds for site in book.sites.values()) == 20
    assert book == ledger(flowertune(), LLAMA_3_8B, sites=SITES)


def test_evaluating_sites_fetch_the_versions_that_they_do_not_train_on():
    where = {"where": ["sites"], "metric": "loss", "every": 5}
    book = ledger(flowertune(evaluation=where), LLAMA_3_8B, sites=SITES)
    # Versions 0 and 5 at the 18 sites outside the cohort of the next round, version 10 at all.
    assert book.evaluation_bytes == (18 + 18 + 20) * book.first_version_bytes
    house = ledger(flowertune(), LLAMA_3_8B, sites=SITES, house="house")
    assert house.sites["house"].evaluation_bytes == 11 * house.first_version_bytes
    assert house.sites["house"].rounds == 0


def test_the_output_layer_is_no_target_of_all_linear():
    targets = {"type": "lora", "rank": 1, "targets": ["all-linear"]}
    names = [name for name, _, _ in version_tensors(flowertune(method=targets), LLAMA_3_8B)]
    assert len(names) == 7 * 32 * 2
    assert not any("lm_head" in name for name in names)


def test_a_target_may_be_the_end_of_a_path():
    shapes = Shapes(
        1000, 4, 2, 10, (Linear("layer.*.output.dense", 4, 8, 2), Linear("layer.*.attention.output.dense", 4, 4, 2))
    )
    recipe = flowertune(
        method={"type": "lora", "rank": 1, "targets": ["attention.output.dense", "layer.1.output.dense"]}
    )
    layers = {
        name.removeprefix("base_model.model.").partition(".lora")[0] for name, _, _ in version_tensors(recipe, shapes)
    }
    assert layers == {
        "layer.0.attention.output.dense",
        "layer.1.attention.output.dense",
        "layer.1.output.dense",
    }


def test_experts_of_a_layer_are_counted_within_it():
    paths = list(paths_of(Linear("layers.*.experts.*.w1", 4, 4, 6), layers=2))
    assert paths[:3] == ["layers.0.experts.0.w1", "layers.1.experts.0.w1", "layers.0.experts.1.w1"]
    assert len(set(paths)) == 6


def test_fewer_layers_are_counted_without_those_that_go():
    shapes = LLAMA_3_8B.cut(8)
    assert shapes.layers == 8
    assert {linear.count for linear in shapes.linear} == {1, 8}
    assert LLAMA_3_8B.parameters - shapes.parameters == pytest.approx(24 * 218_103_808, rel=1e-3)
    assert LLAMA_3_8B.cut(None) is LLAMA_3_8B


@pytest.mark.parametrize("method", [{"type": "lora", "rank": 32, "targets": ["q_proj", "v_proj"]}, {"type": "full"}])
def test_scaffold_costs_twice_the_bytes_down_and_none_more_up(method: dict[str, Any]):
    local = {"steps": 10, "batch_size": 16, "optimizer": "sgd"}
    plain, twice = (
        ledger(flowertune(method=method, local=local, aggregation=rule), LLAMA_3_8B, sites=SITES)
        for rule in ({}, {"rule": "scaffold", "weights": "equal"})
    )
    assert twice.up_bytes == plain.up_bytes
    # What is more than twice is the names in the headers.
    assert 2 * plain.down_bytes < twice.down_bytes < 2.001 * plain.down_bytes


@pytest.mark.parametrize("labels", [True, False])
def test_the_house_agent_fetches_each_aggregate_and_without_labels_the_updates_too(labels: bool) -> None:
    fields = {"name": "j", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 5, "cohort": {"size": 3}}
    spec = jobspec.parse({**fields, "evaluation": {"where": []}, "distillation": {"every": 2, "labels": labels}})
    book = ledger(spec, None, sites=SITES, house="hq")
    version, hq = book.first_version_bytes, book.sites["hq"]
    assert hq.distillation_up_bytes == 2 * version
    assert hq.distillation_down_bytes == 2 * version * (1 if labels else 4)
    assert (hq.rounds, hq.up_bytes, hq.down_bytes, hq.evaluation_bytes) == (0, 0, 0, 0)
    assert book.distillation_bytes == hq.distillation_up_bytes + hq.distillation_down_bytes
    assert not ledger(spec, None, sites=SITES).distillation_bytes, "nobody is there to distil"
