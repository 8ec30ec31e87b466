"""What all tests share, and what keeps pytest-xdist's workers apart.

Property tests draw the same examples everywhere, and a slow machine fails none of them. A worker's processes compute in
one thread, and take ports that no other worker takes: one of a node that is down for a moment must stay free.
"""

from __future__ import annotations

import os

import hypothesis
import pytest

from deploy import local

hypothesis.settings.register_profile("silotune", deadline=None, derandomize=True)
hypothesis.settings.load_profile("silotune")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        local.PORTS = local.PORTS[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]
