from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import settings
from coordinator.settings import Listen, Public, Settings
from protos.errors import InvalidInput

MINIMAL = '[public]\nenrollment_address = "host:9444"\n'


def load(directory: Path, text: str) -> Settings:
    (directory / settings.FILE_NAME).write_text(text)
    return settings.load(directory)


def test_the_file_that_init_writes_holds_every_default(tmp_path: Path):
    listen, public = Listen(), Public(enrollment_address="host:9444")
    hosts = Settings(public=public).certificates.hosts
    text = settings.new_file(listen=listen, public=public, hosts=hosts)
    assert load(tmp_path, text) == Settings(listen=listen, public=public)
    shown = {line.partition("=")[0].strip() for line in text.splitlines() if "=" in line and not line.startswith("#")}
    known = {
        key
        for name, field in Settings.model_fields.items()
        if name != "reflection"
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    assert shown == known


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "public"),
        (MINIMAL + "surplus = 1\n", "public.surplus: is not a known key"),
        (MINIMAL + "[transfers]\nmax_transfers = 0\n", "transfers.max_transfers"),
        (MINIMAL + "[storage]\nblobs = 's3:/bucket'\n", "storage.blobs"),
        (MINIMAL + "[storage]\nblobs = 's3://bucket/'\n", "storage.blobs"),
        (MINIMAL + "[storage]\ns3_endpoint_url = 'https://key:secret@host'\n", "storage.s3_endpoint_url"),
        (MINIMAL + "[listen]\naddress = '9443'\n", "listen.address"),
        (MINIMAL + "[certificates]\nserver_certificate = 'own.pem'\n", "server_key go together"),
        (MINIMAL.replace("9444", "9444,b"), "public.enrollment_address"),
        (MINIMAL + "[storage\n", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(tmp_path: Path, text: str, reason: str):
    with pytest.raises(InvalidInput, match=reason.replace(".", r"\.")):
        load(tmp_path, text)


def test_tokens_may_carry_the_addresses_of_several_replicas(tmp_path: Path):
    found = load(tmp_path, MINIMAL.replace("host:9444", "a.example.org:9444,b.example.org:9444"))
    assert found.public.enrollment_address == "a.example.org:9444,b.example.org:9444"


def test_a_missing_file_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(InvalidInput) as caught:
        settings.load(tmp_path)
    assert "init" in caught.value.hint


def test_relative_paths_are_in_the_data_directory_and_other_databases_are_left_alone(tmp_path: Path):
    found = load(tmp_path, MINIMAL)
    assert settings.database_url(found, tmp_path) == f"sqlite:///{tmp_path}/coordinator.db"
    assert settings.blob_directory(found, tmp_path) == tmp_path / "blobs"
    elsewhere = load(tmp_path, MINIMAL + '[storage]\ndatabase = "postgresql://host/db"\nblobs = "/mnt/blobs"\n')
    assert settings.database_url(elsewhere, tmp_path) == "postgresql://host/db"
    assert settings.blob_directory(elsewhere, tmp_path) == Path("/mnt/blobs")
    assert settings.bucket_and_prefix(elsewhere) is None
    for place, found in (("s3://blobs", ("blobs", "")), ("s3://b.ucket/pre/fix", ("b.ucket", "pre/fix"))):
        in_s3 = load(tmp_path, f'{MINIMAL}[storage]\nblobs = "{place}"\n')
        assert settings.bucket_and_prefix(in_s3) == found
        assert settings.blob_directory(in_s3, tmp_path) == tmp_path / "cache"
    absolute = load(tmp_path, MINIMAL + '[storage]\ndatabase = "sqlite:////mnt/c.db"\n')
    assert settings.database_url(absolute, tmp_path) == "sqlite:////mnt/c.db"


def test_directories_follow_the_users_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert settings.default_directory() == tmp_path / ".local/share/silotune-coordinator"
    assert settings.profile_directory("default") == tmp_path / ".config/silotune/default"
    assert settings.profile_directory("./here") == Path("here")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/etc/xdg")
    assert settings.profile_directory("two") == Path("/etc/xdg/silotune/two")
