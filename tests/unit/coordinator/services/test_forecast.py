from __future__ import annotations

from typing import Any

import pytest

from coordinator.services.forecast import estimates, warnings
from coordinator.storage.sites import SiteRow
from protos import jobspec
from protos.identity import Role

NOW = 1000.0
# The 22M-parameter encoder: 30,522 words, six layers of 384.
WIDTHS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
LINEAR = [{"name": "pooler.dense", "out_features": 384, "in_features": 384, "count": 1}] + [
    {"name": f"encoder.layer.*.{name}", "out_features": out, "in_features": into, "count": 6}
    for name, (out, into) in WIDTHS.items()
]
MINILM = {"name": "minilm", "digest": "a" * 64, "parameters": "22713216", "hidden_size": 384, "layers": 6}
MINILM |= {"vocabulary": 30522, "linear": LINEAR}
GB = 10**9


def site(name: str, *, role: Role = Role.SITE, state: str = "ENROLLED", seen: float = NOW, **agent: Any) -> SiteRow:
    said = {"data_sets": [{"name": "notes"}], "base_models": [MINILM], **agent}
    return SiteRow(name, role, state, 0.0, seen, NOW + 1e6, said)


def spec(**changes: Any) -> jobspec.JobSpec:
    fields: dict[str, Any] = {
        "name": "j",
        "task": {"type": "classification", "labels": ["a", "b"]},
        "data": {"name": "notes"},
        "base_model": {"name": "minilm"},
        "local": {"steps": 1},
        "rounds": 10,
        "evaluation": {"where": ["sites"]},
    }
    return jobspec.parse({**fields, **changes})


def warned(job: jobspec.JobSpec, *sites: SiteRow, spare_bytes: int = 100 * GB, is_served: bool = False) -> list[str]:
    return warnings(job, sites=sites, spare_bytes=spare_bytes, now_unix_seconds=NOW, is_served=is_served)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, "90.9 MB"),
        ({"method": {"type": "full", "freeze_embeddings": True}}, "43.1 MB"),
        ({"base_model": {"name": "minilm", "layers": 3}}, "69.6 MB"),
        ({"method": {"type": "lora", "rank": 8}}, "301 kB"),
        ({"task": {"type": "synthetic", "payload_mb": 3}, "data": None, "base_model": None}, "3.0 MB"),
    ],
)
def test_the_size_of_what_travels_is_estimated_from_what_a_site_reported(changes: dict[str, Any], size: str):
    said = " ".join(estimates(spec(**changes), sites=[site("a"), site("b")]))
    assert f"About {size} to and {size} from each site a round" in said
    assert "10 rounds with 2 sites each" in said


def test_without_a_reported_base_model_nothing_is_made_up():
    assert "not known" in " ".join(estimates(spec(), sites=[site("a", base_models=[])]))


def test_an_agent_that_does_not_say_which_layers_its_model_has_leaves_the_size_unknown():
    old = {name: value for name, value in MINILM.items() if name not in ("linear", "vocabulary")}
    assert "not known" in " ".join(estimates(spec(), sites=[site("a", base_models=[old])]))


def test_nothing_is_warned_of_when_everything_is_there():
    assert warned(spec(), site("a"), site("b")) == []


@pytest.mark.parametrize(
    ("changes", "sites", "sentence"),
    [
        ({"cohort": {"sites": ["a", "c"]}}, [site("a")], "c is not enrolled."),
        ({"cohort": {"quorum": 2}}, [site("a"), site("b", state="REVOKED")], "Only 1 site of this job enrolled"),
        ({}, [site("a", seen=0.0)], "a is not connected."),
        ({}, [site("a", data_sets=[])], "a has no data set named 'notes'"),
        ({}, [site("a", base_models=[])], "a does not have the base model 'minilm'"),
        ({"base_model": {"name": "minilm", "digest": "b" * 64}}, [site("a")], "does not have the base model"),
        ({"evaluation": {"where": ["house"]}}, [site("a")], "none is enrolled"),
        (
            {"evaluation": {"test": True}},
            [site("a"), site("h", role=Role.HOUSE, seen=0)],
            "house agent h is not connected",
        ),
        ({"evaluation": {"test": True}}, [site("a"), site("h", role=Role.HOUSE, data_sets=[])], "h has no data set"),
        (
            {
                "task": {"type": "causal-lm"},
                "evaluation": {"where": ["house"], "metric": "loss", "benchmarks": ["pubmedqa"]},
            },
            [site("a"), site("h", role=Role.HOUSE)],
            "h has no data set named 'pubmedqa': it is not measured there.",
        ),
        (
            {"distillation": {"teacher": {"name": "minilm"}}},
            [site("a")],
            "No house agent is enrolled, so every aggregate would become a version without the distillation",
        ),
        (
            {"distillation": {"teacher": {"name": "bert-large"}}},
            [site("a"), site("h", role=Role.HOUSE)],
            "h does not have the teacher 'bert-large'",
        ),
        (
            {"distillation": {"teacher": {"name": "minilm"}, "data": "public"}},
            [site("a"), site("h", role=Role.HOUSE)],
            "h has no data set named 'public' to distil on.",
        ),
        (
            {"local": {"steps": 1, "batch_size": 4096}},
            [site("a", memory_bytes=str(8 * GB))],
            "a needs about 88.0 GB of memory and has 8.0 GB, 4096 rows at a time. It would fit with local.micro",
        ),
    ],
)
def test_what_may_stand_in_the_way_is_said(changes: dict[str, Any], sites: list[SiteRow], sentence: str):
    assert sentence in " ".join(warned(spec(**changes), *sites))


def test_a_house_agent_that_only_distils_needs_no_more_than_the_data_that_it_learns_from():
    distils = {"distillation": {"teacher": {"name": "minilm"}, "data": "public"}}
    house = site("h", role=Role.HOUSE, data_sets=[{"name": "public", "rows": "10"}])
    assert not [said for said in warned(spec(**distils), site("a"), house) if "h has" in said]
    measured = {**distils, "evaluation": {"where": ["house"]}}
    assert "h has no data set named 'notes' in its site.toml." in warned(spec(**measured), site("a"), house)


def test_a_site_that_lacks_the_base_model_may_have_it_from_the_coordinator():
    without = site("a", base_models=[])
    assert "(`silotune-agent model add`)" in " ".join(warned(spec(), without))
    served = "a does not have the base model 'minilm' (its policy must have fetch_base_models = true)."
    assert served in warned(spec(), without, is_served=True)


def test_a_disk_that_is_too_small_is_said_beforehand():
    assert "disk has 1.0 GB to spare; about 1.1 GB are needed" in " ".join(warned(spec(), site("a"), spare_bytes=GB))


def test_a_house_agent_is_not_a_site_of_the_cohort():
    assert "Only 0 sites" in " ".join(warned(spec(), site("h", role=Role.HOUSE)))
