"""Which way the agent takes, by site.toml and by the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_agent.route import Proxy, Route, route_of
from client_agent.settings import Network
from protos.errors import SiteConfigInvalid
from tests.unit.client_agent.coordinator_in_memory import Authority

ADDRESS = "fed.example.org:9443"


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def options(route: Route, address: str = ADDRESS) -> dict[str, object]:
    return dict(route.options(address))


def test_without_a_proxy_the_way_is_direct() -> None:
    route = Route(b"")
    assert route.proxy_for(ADDRESS) is None
    assert options(route)["grpc.enable_http_proxy"] == 0


def test_the_environments_proxy_is_taken_and_site_toml_goes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://environment:3128")
    assert str(Route(b"").proxy_for(ADDRESS)) == "environment:3128"
    assert options(Route(b"", proxy=Proxy("http://site:8080")))["grpc.http_proxy"] == "http://site:8080"


@pytest.mark.parametrize("spared", ["fed.example.org", "example.org, other", ".example.org", "*", "FED.example.org"])
def test_no_proxy_spares_a_host(monkeypatch: pytest.MonkeyPatch, spared: str) -> None:
    monkeypatch.setenv("https_proxy", "http://environment:3128")
    monkeypatch.setenv("no_proxy", f"localhost,{spared}")
    assert Route(b"").proxy_for(ADDRESS) is None


def test_no_proxy_spares_no_other_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://environment:3128")
    monkeypatch.setenv("no_proxy", "localhost, example.com")
    assert Route(b"").proxy_for(ADDRESS) is not None


def test_no_proxy_spares_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    route = Route(b"", proxy=Proxy("http://site:8080"))
    assert route.proxy_for("10.1.2.3:9443") is None
    assert route.proxy_for("11.1.2.3:9443") is not None
    assert route.proxy_for(ADDRESS) is not None


def test_the_login_is_read_and_never_shown() -> None:
    proxy = Proxy("http://st-olav:s%40fe@proxy.hospital:3128")
    assert (proxy.host, proxy.port, proxy.login) == ("proxy.hospital", 3128, "st-olav:s@fe")
    assert f"{proxy} {proxy!r}" == "proxy.hospital:3128 Proxy(proxy.hospital:3128)"
    assert "s%40fe" not in repr(Route(b"", proxy=proxy))


def test_a_ca_bundle_is_believed_beside_the_federations_ca(tmp_path: Path) -> None:
    ours, theirs = Authority("ours"), Authority("theirs")
    (tmp_path / "hospital.pem").write_bytes(theirs.pem)
    route = route_of(Network(ca_bundle="hospital.pem"), ca=ours.pem, directory=tmp_path)
    assert ours.pem in route.trusted
    assert theirs.pem in route.trusted


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"junk", "no certificates in PEM")])
def test_a_ca_bundle_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "hospital.pem").write_bytes(content)
    with pytest.raises(SiteConfigInvalid, match=rf"hospital\.pem of \[network\] cannot be used: .*{reason}"):
        route_of(Network(ca_bundle="hospital.pem"), ca=b"", directory=tmp_path)
