"""The loop that has effects: what it finds after a kill, what a pause costs, what becomes of a damaged update."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.controller import Controller
from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.store import Store
from coordinator.storage.work import Result
from protos import jobspec, tensors
from protos.identity import Role
from protos.update_figures import COEFFICIENT, KINDS, NORM, NORM_Z, by_site


def tensor_file(value: float) -> bytes:
    header, _ = tensors.make_header([("w", "F32", (1000,))])
    return header + np.full(1000, value, np.float32).tobytes()


class Bench:
    """A store, blobs and a controller; the sites are played by hand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store.open(f"sqlite:///{directory}/coordinator.db")
        self.blobs = FileBlobStore(directory / "data", reserve_bytes=0)
        self.scratch = directory / "data" / "scratch"

    def begin(self, *sites: str, **changes: Any) -> None:
        for name, role in [*((name, Role.SITE) for name in sites), ("hq", Role.HOUSE)]:
            now = time.time()
            self.store.sites.invite(
                name, role=role, secret_hash=name, expires_unix_seconds=now + 60, now_unix_seconds=now
            )
            self.store.sites.redeem(
                name, key_hash="k", serial="1", expires_unix_seconds=now + 9e6, now_unix_seconds=now
            )  # fmt: skip
            self.store.sites.see(name, agent=None, now_unix_seconds=now)
        fields = {
            "name": "study", "task": {"type": "synthetic"}, "local": {"steps": 1}, "rounds": 1,
            "cohort": {"quorum": 2, "round_deadline_seconds": 100}, "evaluation": {"where": []},
            **changes,
        }  # fmt: skip
        self.store.jobs.create(jobspec.parse(fields), job_id="j", submit_token="", now_unix_seconds=time.time())

    def hand_in(self, site: str, content: bytes) -> bool:
        """Does the site's next task with `content` as its result; False when there is none."""
        grant = self.store.work.lease(site, lease_seconds=30)
        if grant is None:
            return False
        path = self.directory / f"from-{site}"
        path.write_bytes(content)
        digest, size = self.blobs.adopt(path)
        self.store.uploads.add(site, digest=digest, size=size, sealed_size=self.blobs.size)
        result = Result(digest=digest, size=size, examples=10, steps=1)
        told: dict[str, Any] = {"result": result, "sealed_size": self.blobs.size}
        self.store.work.finish(grant.task.id, site=site, generation=grant.task.generation, **told)
        return True

    @asynccontextmanager
    async def driven(self, *, replica: str = "one") -> AsyncIterator[Controller]:
        controller = Controller(
            store=self.store, blobs=self.blobs, scratch=self.scratch / replica, replica=replica,
            driver_silence_seconds=1.0,
        )  # fmt: skip
        running = asyncio.create_task(controller.run())
        try:
            yield controller
        finally:
            controller.stop()
            await running


async def until(what: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)


async def test_a_coordinator_killed_in_mid_aggregation_starts_again_and_commits(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    leftover = bench.scratch / "one" / "tmp-of-the-killed"
    leftover.mkdir(parents=True)
    (leftover / "version").write_bytes(b"half")
    async with bench.driven() as controller:
        for site, value in (("hq", 0.0), ("a", 1.0), ("b", 3.0)):
            await until(lambda site=site, value=value: bench.hand_in(site, tensor_file(value)))
            controller.wake()
        await until(lambda: bench.store.views.job("j").state is s.JobState.COMPLETED)
    assert not leftover.exists()
    version = bench.store.views.model("j", version=1)
    assert bench.blobs.path(version.digest).read_bytes() == tensor_file(2.0)


def pair_file(a: list[float], b: list[float]) -> bytes:
    """One layer's LoRA pair of rank 1."""
    header, _ = tensors.make_header([("q.lora_A.weight", "F32", (1, len(a))), ("q.lora_B.weight", "F32", (len(b), 1))])
    return header + np.array([*a, *b], np.float32).tobytes()


async def test_a_round_with_a_lora_rule_says_how_far_it_is_from_the_exact_mean(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b", method={"type": "lora", "rank": 1}, aggregation={"rule": "svd"})
    updates = {"hq": pair_file([1, 1, 1], [0, 0]), "a": pair_file([1, 0, 0], [2, 0]), "b": pair_file([0, 1, 0], [0, 1])}
    async with bench.driven() as controller:
        for site, content in updates.items():
            await until(lambda site=site, content=content: bench.hand_in(site, content))
            controller.wake()
        await until(lambda: bench.store.views.job("j").state is s.JobState.COMPLETED)
    # The mean is diag(1, 0.5), and one direction holds the larger of the two.
    [ended] = [found for found in bench.store.views.rounds("j", last=2) if found.number == 1]
    assert abs(ended.metrics["aggregation_error"] - 0.2**0.5) < 1e-6
    version = bench.store.views.model("j", version=1)
    assert bench.blobs.path(version.digest).read_bytes() == pair_file([1, 0, 0], [1, 0])


async def test_a_round_under_a_robust_rule_says_whom_it_left_out_and_remembers_the_lengths(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    names = ("a", "b", "c", "d", "e")
    robust = {"robust": {"type": "multi-krum"}, "weights": "examples"}
    bench.begin(*names, rounds=3, aggregation=robust, cohort={"quorum": 5, "round_deadline_seconds": 100})
    async with bench.driven() as controller:
        await until(lambda: bench.hand_in("hq", tensor_file(0.0)))
        for number in (1, 2, 3):
            for place, site in enumerate(names):
                value = number + 0.01 * place if site != "c" else -7.0 * number
                await until(lambda site=site, value=value: bench.hand_in(site, tensor_file(value)))
                controller.wake()
        await until(lambda: bench.store.views.job("j").state is s.JobState.COMPLETED)
    version = bench.store.views.model("j", version=1)
    assert bench.blobs.path(version.digest).read_bytes() == tensor_file(1.0 + 0.01 * (0 + 1 + 3 + 4) / 4)
    assert {part.weight for part in version.contributions} == {0.2}
    rounds = {found.number: found.metrics for found in bench.store.views.rounds("j", last=4)}
    kinds = {kind: by_site(rounds[1], kind) for kind in KINDS}
    assert kinds[COEFFICIENT] == {"a": 0.25, "b": 0.25, "c": 0.0, "d": 0.25, "e": 0.25}
    assert kinds[NORM]["c"] == pytest.approx(7 * 1000**0.5)
    assert [bool(by_site(rounds[number], NORM_Z)) for number in (1, 2, 3)] == [False, False, True]
    said = [event.sentence for event in bench.store.views.events("j", after_id=0)]
    sentence = "version 1 from 5 updates; multi-krum leaves out c; against the mean of the others: c"
    assert any(one.endswith(sentence) for one in said)


async def test_a_pause_uses_up_no_second_of_service(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    async with bench.driven() as controller:
        await until(lambda: bench.hand_in("hq", tensor_file(0.0)))
        controller.wake()
        await until(lambda: bench.store.views.job("j").round == 1)
        bench.store.jobs.control("j", action="pause", now_unix_seconds=time.time())
        before = bench.store.views.job("j").service_seconds
        await asyncio.sleep(3)
        resumed = time.monotonic()
        bench.store.jobs.control("j", action="resume", now_unix_seconds=time.time())
        controller.wake()
        await until(lambda: bench.store.views.job("j").service_seconds > before)
        assert bench.store.views.job("j").service_seconds < before + 2 + (time.monotonic() - resumed)


async def test_a_damaged_update_is_asked_for_again_and_its_parts_are_deleted_after_the_commit(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    async with bench.driven() as controller:
        await until(lambda: bench.hand_in("hq", tensor_file(0.0)))
        controller.wake()
        await until(lambda: bench.hand_in("a", tensor_file(1.0)))
        update = bench.store.jobs.facts("j", now_unix_seconds=time.time())[1].updates[0]
        path = bench.blobs.path(update.digest)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        await until(lambda: bench.hand_in("b", tensor_file(3.0)))
        controller.wake()
        await until(lambda: bench.hand_in("a", tensor_file(1.0)))
        controller.wake()
        await until(lambda: bench.store.views.job("j").state is s.JobState.COMPLETED)
        version = bench.store.views.model("j", version=1)
        assert bench.blobs.path(version.digest).read_bytes() == tensor_file(2.0)
        await until(lambda: bench.blobs.size(update.digest) is None)


async def test_a_job_moves_to_another_replica_when_its_driver_shows_no_life(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    async with bench.driven() as first:
        await until(lambda: bench.hand_in("hq", tensor_file(0.0)))
        first.wake()
        await until(lambda: bench.store.views.job("j").round == 1)
        [driven] = bench.store.jobs.active()
        assert driven.driver == "one"
    # A clean stop lets go of the job; a killed replica does not.
    [released] = bench.store.jobs.active()
    assert released.driver == ""
    dead = bench.store.jobs.take(released, driver="dead", grace_seconds=0)
    async with bench.driven(replica="two") as second:
        await until(lambda: bench.store.jobs.active()[0].driver == "two")
        assert not bench.store.jobs.tick("j", elapsed_seconds=100, driver_generation=dead or 0)
        for site in ("a", "b"):
            await until(lambda site=site: bench.hand_in(site, tensor_file(1.0)))
            second.wake()
        await until(lambda: bench.store.views.job("j").state is s.JobState.COMPLETED)


async def test_two_replicas_at_once_drive_a_job_as_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    async with bench.driven(), bench.driven(replica="two"):
        for site, value in (("hq", 0.0), ("a", 1.0), ("b", 3.0)):
            await until(lambda site=site, value=value: bench.hand_in(site, tensor_file(value)))
        await until(lambda: bench.store.views.job("j").state is s.JobState.COMPLETED)
    assert bench.blobs.path(bench.store.views.model("j", version=1).digest).read_bytes() == tensor_file(2.0)


async def test_what_a_replaced_driver_decided_is_not_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    old = bench.store.jobs.take(bench.store.jobs.active()[0], driver="old", grace_seconds=0)
    job, facts, revision = bench.store.jobs.facts("j", now_unix_seconds=time.time())
    assert job.driver_generation == old
    decided = step(job, facts, 0.0)
    assert decided.effects
    bench.store.jobs.take(bench.store.jobs.active()[0], driver="new", grace_seconds=0)
    assert not bench.store.jobs.apply(job, decided, revision=revision, now_unix_seconds=time.time())
    assert bench.store.views.job("j").state is s.JobState.SUBMITTED


async def test_after_an_idle_time_a_stepped_clock_does_not_make_a_site_seem_gone_for_good(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.begin("a", "b")
    # As if this machine's clock had been set forward by a day since the sites were noted.
    for name in ("a", "b", "hq"):
        bench.store.sites.see(name, agent=None, now_unix_seconds=time.time() - 86_400)
    async with bench.driven() as controller:
        await until(lambda: "waits for" in bench.store.views.job("j").sentence)
        assert not bench.hand_in("hq", tensor_file(0.0)), "nobody was heard of yet"
        bench.store.sites.see("hq", agent=None, now_unix_seconds=time.time() - 86_400)
        await until(lambda: bench.hand_in("hq", tensor_file(0.0)))
        controller.wake()
        await until(lambda: bench.store.views.job("j").round == 1)
