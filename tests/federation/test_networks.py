"""A site behind a hospital's proxy, of a coordinator with a certificate of another CA: from enrollment to a round."""

from __future__ import annotations

import re
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from coordinator import ca
from deploy.local import CommandFailed, LocalFederation
from tests.federation.conftest import FAST, SITE_TOML, Jobs
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
