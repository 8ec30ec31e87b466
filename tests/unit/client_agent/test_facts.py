from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from client_agent import facts
from client_agent.home import Home
from client_agent.models import Models
from client_agent.settings import DataSet, Device, SiteSettings
from protos.tensors import make_header


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


def test_gpus_are_read_from_the_drivers_table() -> None:
    table = "NVIDIA H200, 143771\nNVIDIA H200, 143771\n"
    assert facts.parse_gpus(table) == (facts.Gpu("NVIDIA H200", 143771 << 20),) * 2
    assert facts.parse_gpus("NVIDIA GB10, [N/A]\n") == (facts.Gpu("NVIDIA GB10", 0),)
    assert facts.parse_gpus("") == ()


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


def test_rows_of_instructions_are_counted(tmp_path: Path) -> None:
    (tmp_path / "cards.csv").write_text("front,back\nx,y\nz,\nw,v\n")
    cards = DataSet(path="cards.csv", instruction="front", output="back", validation=0.0)
    assert facts.count_rows(Home(tmp_path), SiteSettings(data={"cards": cards})) == {"cards": 2}


def test_a_data_set_that_cannot_be_read_counts_as_empty(tmp_path: Path) -> None:
    site = SiteSettings(data={"answers": DataSet(path="missing.csv")})
    assert facts.count_rows(Home(tmp_path), site) == {"answers": 0}


def test_the_agent_tells_what_it_is_and_what_it_holds(tmp_path: Path) -> None:
    site = SiteSettings(data={"answers": DataSet(path="a.csv")})
    info = facts.agent_info(Home(tmp_path), site, gpu="", rows={"answers": 7})
    assert (info.device, info.data_sets[0].name, info.data_sets[0].rows) == ("cpu", "answers", 7)
    assert info.memory_bytes > 0
    assert info.free_disk_bytes > 0
    assert (info.gpu_memory_bytes, info.gpus) == (0, 0)


def test_gpus_are_counted_from_the_one_that_site_toml_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = facts.parse_gpus("A, 10\nB, 20\nC, 30\n")
    monkeypatch.setattr(facts, "gpus", lambda: there)
    for name, told in {"cuda:1": (20 << 20, 2), "cuda:2": (30 << 20, 1), "cuda:3": (0, 0), "cpu": (0, 0)}.items():
        site = SiteSettings(device=Device(name=name, processes=2))
        info = facts.agent_info(Home(tmp_path), site, gpu="A", rows={})
        assert (info.gpu_memory_bytes, info.gpus) == told


def test_the_layers_of_a_base_model_are_told(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    header, layout = make_header([("layers.0.query.weight", "F32", (4, 8)), ("layers.1.query.weight", "F32", (4, 8))])
    (directory / "model.safetensors").write_bytes(header + bytes(layout.data_bytes))
    (directory / "config.json").write_text('{"vocab_size": 100, "hidden_size": 8, "num_hidden_layers": 2}')
    home = Home(tmp_path)
    Models(home.models_file).add("m", directory)
    (told,) = facts.agent_info(home, SiteSettings(), gpu="", rows={}).base_models
    assert (told.vocabulary, told.hidden_size, told.layers) == (100, 8, 2)
    (query,) = told.linear
    assert (query.name, query.out_features, query.in_features, query.count) == ("layers.*.query", 4, 8, 2)


def test_a_data_set_that_still_cannot_be_read_is_logged_once(
    tmp_path: Path,
) -> None:
    site = SiteSettings(data={"answers": DataSet(path="missing.csv")})
    with capture_logs() as said:
        counts = facts.count_rows(Home(tmp_path), site)
        assert facts.count_rows(Home(tmp_path), site, before=counts) == {"answers": 0}
    assert [line["event"] for line in said] == ["A data set cannot be used."]
