"""The shipped sample and who holds it."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from client_agent.policy import Answer, decide
from client_agent.settings import SiteSettings
from client_agent.training.data import read_rows
from coordinator import recipe
from deploy.data.make_medquad import MASK, TEST, VALIDATION, WORDS
from deploy.demo import institutes
from deploy.demo.run import RECIPE, holdings
from protos.jobspec import Classification

SPEC = recipe.read(RECIPE)
assert isinstance(SPEC.task, Classification)
LABELS = SPEC.task.labels


def rows_of(file: str) -> list[dict[str, str]]:
    return pyarrow.parquet.read_table(institutes.SAMPLE / file).to_pylist()


def all_files() -> list[str]:
    return [*(f"sites/{name}.parquet" for name in institutes.names()), VALIDATION, TEST]


def test_nine_institutes_take_part_and_the_recipe_waits_for_all_of_them():
    assert len(institutes.names()) == 9
    assert SPEC.cohort.quorum == 9


def test_every_label_of_the_sample_is_in_the_recipe_and_every_one_of_the_recipe_is_tested():
    assert {row["label"] for file in all_files() for row in rows_of(file)} == set(LABELS)
    for file in (VALIDATION, TEST):
        assert min(Counter(row["label"] for row in rows_of(file)).values()) >= 10


def test_no_condition_is_on_two_sides():
    sites = {row["focus"].casefold() for name in institutes.names() for row in rows_of(f"sites/{name}.parquet")}
    validation, test = ({row["focus"].casefold() for row in rows_of(file)} for file in (VALIDATION, TEST))
    assert not sites & validation and not sites & test and not validation & test


def test_no_held_out_passage_stands_in_a_sites_rows():
    seen = {row["text"] for name in institutes.names() for row in rows_of(f"sites/{name}.parquet")}
    held_out = [row["text"] for file in (VALIDATION, TEST) for row in rows_of(file)]
    assert not seen & set(held_out)
    assert len(held_out) == len(set(held_out))


def test_passages_are_short_and_name_no_condition():
    for file in all_files():
        for row in rows_of(file):
            assert 0 < len(row["text"].split()) <= WORDS
            # A few answers are about no one condition.
            assert not row["focus"] or row["focus"].casefold() not in row["text"].replace(MASK, "").casefold()


def test_no_institute_holds_every_kind_and_the_mixes_differ():
    holds = holdings(SPEC, sites=institutes.names())
    assert all(min(holds[name].values()) == 0 for name in institutes.names())
    assert sum(holds["mplushealthtopics"].values()) == holds["mplushealthtopics"]["information"] == 827
    assert sum(sum(holds[name].values()) for name in institutes.names()) == 5678
    assert (sum(holds["validation"].values()), sum(holds["test"].values())) == (405, 803)


def test_the_licence_and_the_source_are_named_beside_the_rows():
    assert "CC BY 4.0" in (institutes.SAMPLE / "LICENSE").read_text()
    assert "Ben Abacha" in (institutes.SAMPLE / "LICENSE").read_text()
    readme = (institutes.SAMPLE / "README.md").read_text()
    for file in all_files():
        assert f"| `{file}` | {len(rows_of(file))} |" in readme


def test_the_sample_is_a_few_megabytes_at_most():
    assert sum(path.stat().st_size for path in institutes.SAMPLE.rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("text", [institutes.SITE_TOML, institutes.HOUSE_TOML])
def test_every_sites_own_file_allows_the_demos_job_and_no_other_model(text: str):
    settings = SiteSettings.model_validate(tomllib.loads(text.replace("{http}", "127.0.0.1:9481")))
    assert decide(settings.policy, SPEC, base_digest="a" * 64, data_rows=144).answer is Answer.ALLOW
    other = SPEC.model_copy(update={"base_model": SPEC.base_model.model_copy(update={"name": "other"})})
    assert decide(settings.policy, other, base_digest="b" * 64, data_rows=144).answer is Answer.DENY


def test_each_site_finds_its_rows_in_its_own_home(tmp_path: Path):
    institutes.place_rows("cdc", home=tmp_path)
    settings = SiteSettings.model_validate(tomllib.loads(institutes.SITE_TOML.replace("{http}", "127.0.0.1:9481")))
    found = read_rows(settings.data["answers"].at(tmp_path), name="answers", labels=LABELS, split="train")
    assert len(found) == 144


def test_the_house_agent_finds_validation_and_test_rows(tmp_path: Path):
    institutes.place_rows(institutes.HOUSE, home=tmp_path)
    settings = SiteSettings.model_validate(tomllib.loads(institutes.HOUSE_TOML.replace("{http}", "127.0.0.1:9481")))
    data_set = settings.data["answers"].at(tmp_path)
    assert len(read_rows(data_set, name="answers", labels=LABELS, split="validation")) == 405
    assert len(read_rows(data_set, name="answers", labels=LABELS, split="test")) == 803
