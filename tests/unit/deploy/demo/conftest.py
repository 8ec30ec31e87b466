"""A small report as a run of the demo writes it: two sites, two rounds, two labels."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.demo import report
from protos import jobspec

SPEC = jobspec.parse(
    {
        "name": "tiny",
        "rounds": 2,
        "task": {"type": "classification", "labels": ["cause", "cure"]},
        "data": {"name": "answers"},
        "base_model": {"name": "minilm"},
        "local": {"steps": 3},
        "evaluation": {"where": ["house"], "test": True},
    }
)


def round_shown(number: int) -> dict[str, Any]:
    update = {"fate": "ACCEPTED", "metrics": {"loss": 1.0}, "seconds": {"fetch": 0.5, "train": 3.0, "first_step": 1.0}}
    return {
        "number": number,
        "seconds": {"total": 6.0, "collecting": 5.0, "aggregating": 0.5, "selecting": 0.1},
        "bytes_up": 2_000_000,
        "bytes_down": 3_000_000,
        "updates": [
            {**update, "site": "alfa", "examples": 30},
            {**update, "site": "bravo", "examples": 10, "metrics": {"loss": 2.0}},
            {**update, "site": "late", "fate": "DISCARDED", "examples": 1000},
        ],
    }


def evaluation(version: int, split: str, accuracy: float, *, site: str = "house") -> dict[str, Any]:
    return {"site": site, "version": version, "split": split, "examples": 20, "metrics": {"accuracy": accuracy}}


@pytest.fixture
def shown() -> dict[str, Any]:
    """As `silotune job show --format json` prints it."""
    return {
        "job": {"id": "tiny-1", "best_version": 1},
        "rounds": [{**round_shown(0), "updates": []}, round_shown(1), round_shown(2)],
        "evaluations": [
            evaluation(0, "validation", 0.5),
            evaluation(1, "validation", 0.9),
            evaluation(1, "validation", 0.1, site="alfa"),
            evaluation(2, "validation", 0.8),
            evaluation(1, "test", 0.875),
        ],
    }


@pytest.fixture
def made(shown: dict[str, Any]) -> dict[str, Any]:
    """The report of that job."""
    return report.build(
        shown,
        spec=SPEC,
        baselines={"pooled": {"accuracy": 0.9}, "alfa": {"accuracy": 0.6}, "bravo": {"accuracy": 0.7}},
        holds={
            "alfa": {"cause": 30, "cure": 0},
            "bravo": {"cause": 4, "cure": 6},
            "validation": {"cause": 10, "cure": 10},
            "test": {"cause": 8, "cure": 8},
        },
        exported_accuracy=0.875,
        recall={"cause": 1.0, "cure": 0.75},
        memory={
            "coordinator_peak_rss_bytes": 200_000_000,
            "aggregation_peak_rss_bytes": 60_000_000,
            "agent_peak_rss_bytes": {"alfa": 90_000_000, "bravo": 91_000_000, "house": 92_000_000},
            "trainer_peak_rss_bytes": {"alfa": 700_000_000, "bravo": 710_000_000, "house": 690_000_000},
        },
        seconds={"set-up": 20.0, "federated job": 100.0, "total": 120.0},
        commands=["silotune-coordinator init <here>", "silotune job submit recipe.toml"],
        usage='print(classify("A text."))',
    )
