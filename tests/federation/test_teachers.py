"""A house agent with a real teacher: what it learns in a round is there in the next, and updates may teach instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import LocalFederation
from tests.federation.conftest import FAST, Jobs
from tests.federation.test_training import RECIPE, SITE, rows, write_jsonl
from tests.unit.client_agent.training.conftest import LABELS, make_base_model

SITES = ["alfa", "bravo"]
POLICY = 'tasks = ["classification", "distill"]\nbase_models = ["tiny-encoder", "teacher"]'
LABELLED = '[distillation]\nteacher = { name = "teacher" }\nlearning_rate = 1e-3\nteacher_learning_rate = 1e-3\n'
UNLABELLED = "[distillation]\nlabels = false\nlearning_rate = 1e-3\n"


def test_a_teacher_goes_on_where_it_was_and_without_labels_the_updates_teach(tmp_path: Path) -> None:
    base = make_base_model(tmp_path / "base", architecture="bert")
    with LocalFederation(tmp_path, settings=FAST) as federation:
        federation.init()
        federation.start_coordinator()
        house = SITE.replace('base_models = ["tiny-encoder"]', POLICY)
        for number, name in enumerate([*SITES, "house"]):
            table = 'path = "notes.jsonl"\nvalidation = "validation.jsonl"\ntest = "validation.jsonl"\n'
            federation.enroll(name, site_toml=(house if name == "house" else SITE) + table, house=name == "house")
            home = federation.home(name)
            write_jsonl(home / "notes.jsonl", rows(LABELS, count=20, start=100 * number))
            write_jsonl(home / "validation.jsonl", rows(LABELS, count=10, start=100 * number + 50))
            for model in ("tiny-encoder", *(["teacher"] if name == "house" else [])):
                federation.run("silotune-agent", "model", "add", model, "--path", str(base), "--home", str(home))
            federation.start_agent(name, wait=False)
        jobs = Jobs(federation)
        for name, table in (("labelled", LABELLED), ("unlabelled", UNLABELLED)):
            fields = {
                "name": name, "method": 'type = "lora"\nrank = 2', "rounds": 2, "steps": 4, "rate": 1e-2,
                "checkpoints": "", "sites": '["alfa", "bravo"]', "quorum": 2,
            }  # fmt: skip
            path = tmp_path / f"{name}.toml"
            path.write_text(RECIPE.format(**fields) + table)
            shown = jobs.end(federation.silotune("job", "submit", str(path))["job_id"])
            assert shown["job"]["state"] == "COMPLETED", shown["job"]["sentence"]
            told = {int(one["number"]): one for one in shown["rounds"]}
            for number in (1, 2):
                assert not told[number].get("undistilled"), told[number]["undistilled"]
                assert told[number]["metrics"]["distillation_kept"] in (0, 1)
                assert {"student_loss", "teacher_loss", "aggregate_loss"} <= told[number]["metrics"].keys()
            if name == "labelled":
                first, second = (told[number]["metrics"] for number in (1, 2))
                assert first["teacher_loss"] <= first["teacher_loss_before"]
                assert second["teacher_loss_before"] == pytest.approx(first["teacher_loss"], abs=1e-6)
