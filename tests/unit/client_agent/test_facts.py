from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from client_agent import facts
from client_agent.home import Home
from client_agent.settings import DataSet, Device, SiteSettings


@pytest.mark.parametrize(
    ("name", "gpu", "device"),
    [
        ("auto", "", "cpu"),
        ("auto", "NVIDIA H200", "cuda:0"),
        ("cpu", "NVIDIA H200", "cpu"),
        ("cuda", "", "cuda:0"),
        ("cuda:1", "NVIDIA H200", "cuda:1"),
    ],
)
def test_the_device_is_what_site_toml_says_or_the_first_gpu(name: str, gpu: str, device: str) -> None:
    assert facts.choose_device(Device(name=name), gpu=gpu) == device


def test_rows_are_counted_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    file = tmp_path / "answers.csv"
    file.write_text("text,label\nfever,a\ncough,b\n")
    site = SiteSettings(data={"answers": DataSet(path="answers.csv", validation=0.0)})
    assert facts.count_rows(home, site) == {"answers": 2}
    assert "answers.csv" not in home.row_counts_file.read_text()
    counted = home.row_counts_file.read_text()
    assert facts.count_rows(home, site) == {"answers": 2}
    assert home.row_counts_file.read_text() == counted
    file.write_text("text,label\nfever,a\ncough,b\nrash,a\n")
    assert facts.count_rows(home, site) == {"answers": 3}


def test_counts_that_the_disk_does_not_take_or_has_damaged_are_counted_anew(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (tmp_path / "answers.csv").write_text("text,label\nfever,a\ncough,b\n")
    site = SiteSettings(data={"answers": DataSet(path="answers.csv", validation=0.0)})
    full = home.row_counts_file.with_suffix(".json.new")
    full.symlink_to("/dev/full")
    with capture_logs() as said:
        assert facts.count_rows(home, site) == {"answers": 2}
        assert facts.count_rows(home, site, before={"answers": 2}) == {"answers": 2}
    assert [line["event"] for line in said] == ["The row counts cannot be kept on this disk."]
    full.unlink()
    home.row_counts_file.write_text('{"torn')
    assert facts.count_rows(home, site) == {"answers": 2}


def test_a_data_set_that_cannot_be_read_counts_as_empty(tmp_path: Path) -> None:
    site = SiteSettings(data={"answers": DataSet(path="missing.csv")})
    assert facts.count_rows(Home(tmp_path), site) == {"answers": 0}


def test_the_agent_tells_what_it_is_and_what_it_holds(tmp_path: Path) -> None:
    site = SiteSettings(data={"answers": DataSet(path="a.csv")})
    info = facts.agent_info(Home(tmp_path), site, gpu="", rows={"answers": 7})
    assert (info.device, info.data_sets[0].name, info.data_sets[0].rows) == ("cpu", "answers", 7)
    assert info.memory_bytes > 0
    assert info.free_disk_bytes > 0


def test_a_data_set_that_still_cannot_be_read_is_logged_once(
    tmp_path: Path,
) -> None:
    site = SiteSettings(data={"answers": DataSet(path="missing.csv")})
    with capture_logs() as said:
        counts = facts.count_rows(Home(tmp_path), site)
        assert facts.count_rows(Home(tmp_path), site, before=counts) == {"answers": 0}
    assert [line["event"] for line in said] == ["A data set cannot be used."]
