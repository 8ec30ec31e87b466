"""A coordinator that is lost with its disk: a backup that was made while it served is restored, the job goes on."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.federation.conftest import Jobs
from tests.federation.test_rounds import ALL


def test_agents_go_on_with_a_coordinator_that_was_restored_to_an_earlier_round(
    three_sites: Jobs, tmp_path: Path
) -> None:
    federation = three_sites.federation
    calm = three_sites.submit(rounds=3, task="payload_mb = 1", cohort=ALL)
    assert three_sites.end(calm)["job"]["state"] == "COMPLETED"

    three_sites.hold("charlie", 2, 3)
    rough = three_sites.submit(rounds=3, task="payload_mb = 1", cohort=ALL)
    charlie = federation.nodes["charlie"]
    three_sites.kill_in_training("charlie", rough, round_number=2, number=signal.SIGSTOP)
    federation.run("silotune-coordinator", "backup", "--data", str(federation.data), "--to", str(tmp_path / "backup"))
    charlie.kill(signal.SIGCONT)
    three_sites.kill_in_training("charlie", rough, round_number=3, number=signal.SIGSTOP)
    assert three_sites.show(rough)["job"]["head_version"] == 2
    federation.nodes["coordinator"].kill(signal.SIGKILL)

    federation.data.rename(tmp_path / "lost")
    words = ("--from", str(tmp_path / "backup"), "--data", str(federation.data))
    federation.run("silotune-coordinator", "restore", *words)
    federation.start_coordinator()
    assert three_sites.show(rough)["job"]["head_version"] == 1, "what came after the backup is not known any more"
    charlie.kill(signal.SIGCONT)
    assert three_sites.end(rough)["job"]["state"] == "COMPLETED"
    assert three_sites.digest(rough, 3) == three_sites.digest(calm, 3)
    # Of a job that was over before the backup.
    assert three_sites.show(calm)["job"]["head_version"] == 3
