"""Networks between a site and its coordinator: a hospital's proxy with another CA, and a line that counts bytes."""

from __future__ import annotations

import re
import signal
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator import ca
from deploy.local import CommandFailed, LocalFederation
from protos.channel import SERVER_OPTIONS
from protos.frames import FRAME_BYTES
from tests.chaos.proxy import Network, Weather
from tests.federation.conftest import FAST, SITE_TOML, Jobs, begin
from tests.servers.proxy import ConnectProxy, in_background

# In no DNS: the proxy alone knows where it leads.
HOST = "federation.invalid"


def test_a_site_that_only_a_proxy_leads_out_of_takes_part_in_a_job(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    hospital, key = ca.create(now=now), ca.new_key()
    issued = hospital.issue_server(key, hosts=["127.0.0.1", HOST], valid_days=1, now=now)
    for name, content in (("own.pem", issued.pem), ("key.pem", ca.key_pem(key)), ("hospital.pem", hospital.pem)):
        (tmp_path / name).write_bytes(content)
    settings = {
        **FAST,
        "certificates": {"server_certificate": str(tmp_path / "own.pem"), "server_key": str(tmp_path / "key.pem")},
        "public": {"enrollment_address": f"{HOST}:9444"},
    }
    with (
        LocalFederation(tmp_path, settings=settings) as federation,
        in_background(ConnectProxy().serving()) as proxy,
    ):
        federation.init()
        with (federation.profile / "profile.toml").open("a") as file:
            file.write(f'ca_bundle = "{tmp_path / "hospital.pem"}"\n')
        listen = tomllib.loads((federation.data / "coordinator.toml").read_text())["listen"]
        proxy.names = {f"{HOST}:9443": federation.address, f"{HOST}:9444": listen["enrollment_address"]}
        _, metrics = federation.start_coordinator().get("/metrics")
        (expiry,) = re.findall(r'^silotune_certificate_expiry_\S*{[^}]*"coordinator"[^}]*} (\S+)$', metrics, re.M)
        assert float(expiry) == issued.expires_unix_seconds
        token = federation.silotune("site", "invite", "st-olav")["token"]
        home = federation.home("st-olav")
        enroll = (
            "silotune-agent", "enroll", "--home", str(home), "--coordinator", f"{HOST}:9443", "--token", token,
            "--proxy", proxy.url,
        )  # fmt: skip

        with pytest.raises(CommandFailed) as refused:
            federation.run(*enroll)
        assert (
            f"was issued by {hospital.certificate.subject.rfc4514_string().removeprefix('CN=')!r}"
            in refused.value.output
        )
        federation.run(*enroll, "--ca-bundle", str(tmp_path / "hospital.pem"))
        way = (home / "site.toml").read_text().partition("\n[network]\n")[2]
        (home / "site.toml").write_text(f"{SITE_TOML.replace('{http}', '127.0.0.1:0')}\n[network]\n{way}")
        assert f"is reachable through the proxy {proxy.address}" in federation.run(
            "silotune-agent", "check", "--home", str(home)
        )

        federation.start_agent("st-olav", wait=False)
        jobs = Jobs(federation)
        ended = jobs.end(jobs.submit(rounds=1))
        assert ended["job"]["state"] == "COMPLETED"
        assert {asked.rpartition(":")[0] for asked in proxy.asked} == {HOST}
        # Enrollment, check, the agent's calls, and at least one transfer each way.
        assert proxy.tunnels >= 5


PAYLOAD_BYTES = 24_000_000
# What TLS, HTTP/2, frames and the calls beside the transfers add.
FRAMING_SHARE = 0.01
# What an agent may have under way that the coordinator has not taken: gRPC's window, and the rest of the frame that is
# read. Buffers of the kernel and of the relay hold a part of it and add nothing.
WINDOW_BYTES = int(dict(SERVER_OPTIONS)["grpc.http2.lookahead_bytes"]) + FRAME_BYTES
UPLOADS = 'silotune_transfers_active{direction="up"}'


def test_an_upload_whose_agent_is_killed_sends_no_more_than_a_window_again(tmp_path: Path) -> None:
    with LocalFederation(tmp_path, settings=FAST) as federation, Network() as network:
        federation.init()
        coordinator = federation.start_coordinator()
        link = network.add("alfa", port=0, upstreams=lambda: [federation.address])
        begin(federation, "alfa", coordinators=lambda _: link.address)
        jobs = Jobs(federation)
        before = link.passed["up"]
        # Version 0 goes up, and half of the update: there the line stops by itself, so that the kill meets the upload
        # in its middle however slow this machine is.
        middle = before + PAYLOAD_BYTES * 3 // 2
        link.set(Weather(limit_bytes={"up": middle}))
        job = jobs.submit(rounds=1, task=f"payload_mb = {PAYLOAD_BYTES / 1e6}")
        federation.wait_for(lambda: link.passed["up"] >= middle, seconds=300, saying="half of the upload")
        federation.nodes["alfa"].kill(signal.SIGKILL)
        link.heal()
        # First what the dead agent's kernel still had arrives: all of a window.
        federation.wait_for(lambda: f"{UPLOADS} 0.0" in coordinator.get("/metrics")[1], seconds=300, saying="silence")
        federation.start_agent("alfa", wait=False)
        assert jobs.end(job)["job"]["state"] == "COMPLETED"
        assert jobs.trained("alfa", job) == [1]
        passed = link.passed["up"] - before
        assert 2 * PAYLOAD_BYTES <= passed <= 2 * PAYLOAD_BYTES * (1 + FRAMING_SHARE) + WINDOW_BYTES
