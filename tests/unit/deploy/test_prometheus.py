"""The scrape configuration and the alerts: every metric that they name is one that silotune has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy/prometheus"
# What prometheus_client adds to a name by the metric's type.
SUFFIXES = ("", "_total", "_bucket", "_sum", "_count", "_info")


@pytest.fixture(scope="module")
def rules() -> list[dict]:
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exposed_names() -> set[str]:
    """Every metric name that the sources of coordinator and agent spell out, as Prometheus sees it."""
    paths = [*(ROOT / "coordinator").rglob("*.py"), *(ROOT / "client_agent").rglob("*.py")]
    written = {name for path in paths for name in re.findall(r'"(silotune_[a-z0-9_]+)"', path.read_text())}
    return {name + suffix for name in written for suffix in SUFFIXES}


def test_every_metric_in_an_alert_exists(rules: list[dict]) -> None:
    named = {name for rule in rules for name in re.findall(r"silotune_[a-z0-9_]+", rule["expr"])}
    assert named, "no alert looks at a metric of ours"
    assert named - exposed_names() == set()


def test_every_alert_says_what_is_wrong_and_what_to_do(rules: list[dict]) -> None:
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["alert"].startswith("Silotune")
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]


def test_the_targets_are_the_default_addresses() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {"silotune-coordinator": ["127.0.0.1:9480"], "silotune-agent": ["127.0.0.1:9481"]}
    assert '"127.0.0.1:9480"' in (ROOT / "coordinator/settings.py").read_text()
    assert '"127.0.0.1:9481"' in (ROOT / "client_agent/settings.py").read_text()
    assert config["rule_files"] == ["alerts.yml"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="NOT CHECKED: promtool is not on this machine")
def test_prometheus_accepts_configuration_and_rules() -> None:
    done = subprocess.run(["promtool", "check", "config", FOLDER / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
