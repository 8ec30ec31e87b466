from __future__ import annotations

from pathlib import Path

import pytest

from client_agent import settings
from protos.errors import SiteConfigInvalid


def load(directory: Path, text: str) -> settings.SiteSettings:
    (directory / "site.toml").write_text(text)
    return settings.load(directory / "site.toml")


def test_an_empty_file_allows_nothing_and_describes_nothing(tmp_path: Path) -> None:
    site = load(tmp_path, "")
    assert site.policy is None
    assert site.data == {}
    assert site.http.address == "127.0.0.1:9481"


def test_hours_are_checked_when_the_file_is_read(tmp_path: Path) -> None:
    text = '[schedule]\nhours = ["Mon-Fri 19:00-06:00", "Sat-Sun 00:00-24:00"]'
    assert load(tmp_path, text).schedule.hours == ("Mon-Fri 19:00-06:00", "Sat-Sun 00:00-24:00")
    with pytest.raises(SiteConfigInvalid, match=r"schedule.hours.0: .*'at night' is not hours such as \"19:00-06:00\""):
        load(tmp_path, '[schedule]\nhours = ["at night"]')


def test_an_empty_policy_lists_nothing(tmp_path: Path) -> None:
    policy = load(tmp_path, "[policy]\n").policy
    assert policy is not None
    assert policy.base_models == policy.data_sets == policy.methods == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[polcy]", "polcy"),
        ('[data.a]\npath = "x"\nlable = "y"', "data.a.lable"),
        ("[data.a]", "data.a.path"),
        ("[policy]\nmax_epochs = 0", "policy.max_epochs"),
        ('[device]\nname = "tpu"', "device.name"),
        ("[policy\n", "not valid TOML"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SiteConfigInvalid, match=reason):
        load(tmp_path, text)


def test_a_missing_file_says_where_the_first_one_comes_from(tmp_path: Path) -> None:
    with pytest.raises(SiteConfigInvalid) as error:
        settings.load(tmp_path / "site.toml")
    assert "silotune-agent enroll" in error.value.hint


def test_paths_are_relative_to_the_file_that_names_them() -> None:
    data_set = settings.DataSet(path="a.csv", validation="/abs/b.csv", test="sub/c.csv")
    place = data_set.at(Path("/srv/site"))
    assert (place.path, place.validation, place.test) == ("/srv/site/a.csv", "/abs/b.csv", "/srv/site/sub/c.csv")
    assert settings.DataSet(path="a.csv", validation=0.2).at(Path("/srv")).validation == 0.2


def test_the_trainer_is_kept_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert settings.trainer_environment()["HF_HUB_OFFLINE"] == "1"
