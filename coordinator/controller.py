"""The one loop that has effects: facts -> step -> transaction -> commands.

    wake or a second passes
      for each active job that this replica drives, or that nobody drives any more:
          advance its clock;  until nothing changes: read facts, step(), apply
      for each queued command that is not running here: run it in a process of its own, write its outcome

Nothing is kept in memory that is not a row as well. A wake-up is only a hint: without it everything happens a second
later. A coordinator killed at any line starts again here, or another replica goes on, and at most one aggregation is
repeated. What a driver writes carries its generation: one that was stopped and goes on after another took its place
changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from coordinator.aggregation.anomalies import POOLED_ROUNDS
from coordinator.aggregation.process import AggregationProcess
from coordinator.presence import ServiceClock, Watch
from coordinator.rounds import state as s
from coordinator.rounds.machine import step
from coordinator.storage.blobs import BlobStore
from coordinator.storage.garbage import GarbageCollector, drop_damaged
from coordinator.storage.jobs import Driven
from coordinator.storage.sites import CONNECTED_SECONDS
from coordinator.storage.store import Store
from protos.errors import CorruptData, NotFound, SilotuneError
from protos.jobspec import DRIFT_RULES, Lora, task_seed
from protos.update_figures import NORM, by_site

TICK_SECONDS = 1.0
# A step decides one thing; this many without waiting for anything means a defect, not a busy job.
MAX_STEPS = 1000

log = structlog.get_logger()


@dataclass
class Controller:
    """Drives every active job until `stop`.

    `on_work` is called when tasks were queued or ended, so that agents that wait in a long poll are answered at once.
    """

    store: Store
    blobs: BlobStore
    scratch: Path
    on_work: Callable[[], None] = lambda: None
    # Names this replica; a name that comes back is the same replica, started again.
    replica: str = "coordinator"
    grace_seconds: float = 30.0
    # A driver that shows no life for so long is replaced: a few turns of a loaded machine, well below any lease.
    driver_silence_seconds: float = 6.0
    # See storage/garbage.py; 0: all.
    keep_versions: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _commands: dict[tuple[str, int, int], asyncio.Task[None]] = field(default_factory=dict)
    _clock: ServiceClock = field(default_factory=ServiceClock)
    # Generation of each job that this replica drives, and when its clock was last advanced.
    _driving: dict[str, int] = field(default_factory=dict)
    _ticked: dict[str, float] = field(default_factory=dict)
    _drivers: Watch = field(default_factory=Watch)
    _sites: Watch = field(default_factory=Watch)
    _connected: frozenset[str] = frozenset()
    _trouble: str = ""
    _process: AggregationProcess = field(default_factory=AggregationProcess)
    _sweeping: asyncio.Task[None] | None = None
    _stopping: bool = False
    # The largest resident set of the aggregation process so far.
    aggregation_peak_bytes: int = 0
    # Monotonic time of the last whole turn, for readiness.
    last_turn: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._garbage = GarbageCollector(self.store.database, self.blobs, keep_versions=self.keep_versions)

    def wake(self) -> None:
        """Something happened that a step may wait for. Call it from the event loop's thread."""
        self._wake.set()

    async def run(self) -> None:
        """Returns after `stop`. Commands in flight are ended; they are carried out again after the next start."""
        prepared = False
        while not self._stopping:
            self._wake.clear()
            try:
                if not prepared:
                    # What a killed coordinator was making is made again.
                    await asyncio.to_thread(shutil.rmtree, self.scratch, ignore_errors=True)
                    self.scratch.mkdir(parents=True, exist_ok=True)
                    prepared = True
                await self._turn()
            except (SilotuneError, OSError) as error:
                # The database or the disk is away or full: nothing is lost, nothing can be decided until it is back.
                self._say_trouble(str(error))
            except Exception:
                log.exception("a turn of the controller failed")
            else:
                self._say_trouble("")
            self.last_turn = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_SECONDS)
        for command in self._commands.values():
            command.cancel()
        await asyncio.gather(*self._commands.values(), return_exceptions=True)
        # Before what may take long: another replica goes on at once, also when this process is killed for its slowness.
        for job_id, generation in self._driving.items():
            with contextlib.suppress(SilotuneError):
                await asyncio.to_thread(self.store.jobs.release, job_id, driver_generation=generation)
        if self._sweeping is not None:
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self._process.stop()

    def stop(self) -> None:
        self._stopping = True
        self.wake()

    def _say_trouble(self, sentence: str) -> None:
        if sentence != self._trouble:
            log.warning(sentence or "the controller goes on")
        self._trouble = sentence

    async def _turn(self) -> None:
        active = await asyncio.to_thread(self.store.jobs.active)
        ids = {job.id for job in active}
        # A job that rests has no clock: what passes meanwhile must not be added when it goes on.
        self._ticked = {job_id: at for job_id, at in self._ticked.items() if job_id in ids}
        self._driving = {job_id: generation for job_id, generation in self._driving.items() if job_id in ids}
        self._drivers.keep(ids)
        await self._look_at_sites(wanted=bool(active))
        trouble: SilotuneError | None = None
        for job in active:
            try:
                if await self._drives(job):
                    await self._process.start()
                    await self._drive(job.id)
            except Exception as error:
                if isinstance(error, SilotuneError) and error.retryable:
                    trouble = error
                    continue
                # One job's defect must not stop the others; the sentence tells its operator where to look.
                log.exception("a step failed", job=job.id)
                sentence = "the coordinator met a defect in this job and tries again; its log has the trace"
                generation = self._driving.get(job.id, 0)
                with contextlib.suppress(SilotuneError):
                    await asyncio.to_thread(self.store.jobs.say, job.id, sentence, driver_generation=generation)
        if trouble is not None:
            raise trouble
        if self._garbage.listing_is_due:
            self._start_sweep()

    async def _drives(self, job: Driven) -> bool:
        """Whether this replica drives the job: it does already, or nobody has for long enough."""
        mine = self._driving.get(job.id)
        if mine == job.generation:
            return True
        if mine is not None:
            log.warning("another replica drives the job", job=job.id, driver=job.driver)
            del self._driving[job.id]
        seen = (job.generation, job.beats)
        silent_seconds = self._drivers.unchanged_seconds(job.id, seen, now=self._clock.now())
        # The data directory is locked: an earlier process of this replica is dead.
        if job.driver not in ("", self.replica) and silent_seconds < self.driver_silence_seconds:
            return False
        take = partial(self.store.jobs.take, job, driver=self.replica, grace_seconds=self.grace_seconds)
        generation = await asyncio.to_thread(take)
        if generation is None:
            return False
        log.info("drives the job", job=job.id, generation=generation, before=job.driver or None)
        self._driving[job.id] = generation
        self._ticked.pop(job.id, None)
        return True

    async def _look_at_sites(self, *, wanted: bool) -> None:
        """Who is connected: a site whose calls went on within CONNECTED_SECONDS of this replica's own time."""
        calls = await asyncio.to_thread(self.store.sites.calls) if wanted else {}
        now, unix = self._clock.now(), time.time()
        self._sites.keep(calls)
        self._connected = frozenset(
            name
            for name, (count, seen_unix_seconds) in calls.items()
            # At the first look, and only then, there is nothing to judge by but the time that was written down.
            if self._sites.unchanged_seconds(name, count, now=now, at_first=abs(unix - seen_unix_seconds))
            <= CONNECTED_SECONDS
        )

    async def _drive(self, job_id: str) -> None:
        generation = self._driving[job_id]
        for _ in range(MAX_STEPS):
            now = self._clock.now()
            elapsed = now - self._ticked.get(job_id, now)
            self._ticked[job_id] = now
            stepped = await asyncio.to_thread(self._step_once, job_id, elapsed, generation)
            if stepped is None:
                return
            transition, facts, written = stepped
            if facts.command is not None:
                self._start_command(job_id, facts.command, head=facts.round.number - 1 if facts.round else 0)
            if not transition.effects:
                return
            if not written:
                # Something happened meanwhile; the next look at the facts knows it.
                continue
            log.info(transition.sentence, job=job_id)
            if any(isinstance(effect, (s.QueueTask, s.EndTask, s.SetJobState)) for effect in transition.effects):
                self.on_work()
            if any(isinstance(effect, (s.Commit, s.SetJobState)) for effect in transition.effects):
                self._start_sweep()
        raise RuntimeError(f"job {job_id} took {MAX_STEPS} steps without waiting for anything")

    def _step_once(
        self, job_id: str, elapsed: float, generation: int
    ) -> tuple[s.Transition, s.Facts, bool] | None:  # fmt: skip
        """The decision, the facts behind it, and whether it was written; None when another replica drives the job."""
        if not self.store.jobs.tick(job_id, elapsed_seconds=elapsed, driver_generation=generation):
            return None
        unix = time.time()
        job, facts, revision = self.store.jobs.facts(job_id, now_unix_seconds=unix)
        if job.driver_generation != generation:
            return None
        sites = tuple(replace(site, connected=site.name in self._connected) for site in facts.sites)
        facts = replace(facts, sites=sites, spare_bytes=self.blobs.spare_bytes())
        transition = step(job, facts, job.service_seconds)
        written = False
        if transition.effects:
            written = self.store.jobs.apply(job, transition, revision=revision, now_unix_seconds=unix)
        elif not job.state.ended:
            self.store.jobs.say(job_id, transition.sentence, driver_generation=generation)
        return transition, facts, written

    def _start_sweep(self) -> None:
        """Beside the next round, which must not wait for files to be deleted."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(asyncio.to_thread(self._sweep))

    def _sweep(self) -> None:
        try:
            deleted = self._garbage.collect()
        except SilotuneError as error:
            # It is collected next time.
            log.warning("garbage stays for now", reason=str(error))
        except Exception:
            log.exception("garbage could not be collected")
        else:
            log.debug("garbage was collected", blobs=deleted)

    # --- commands

    def _start_command(self, job_id: str, command: s.Command, *, head: int) -> None:
        key = (job_id, command.round, command.generation)
        if command.state is s.CommandState.QUEUED and key not in self._commands:
            task = asyncio.create_task(self._run_command(job_id, command, head))
            self._commands[key] = task
            task.add_done_callback(lambda _: self._command_ended(key))

    def _command_ended(self, key: tuple[str, int, int]) -> None:
        self._commands.pop(key, None)
        self.wake()

    async def _run_command(self, job_id: str, command: s.Command, head: int) -> None:
        jobs = self.store.jobs
        which: dict[str, Any] = {
            "round_number": command.round,
            "generation": command.generation,
            "driver_generation": self._driving.get(job_id, 0),
        }
        try:
            outcome = await self._aggregate(job_id, command, head)
            site = outcome.get("corrupt_site", "")
            damaged = bool(site) and await asyncio.to_thread(self._drop_damaged, command, site)
        except Exception as error:
            if isinstance(error, SilotuneError | OSError):
                # No room, or no way to the blobs: it is tried again.
                log.warning("an aggregation has to wait", job=job_id, round=command.round, reason=str(error))
            else:
                log.exception("an aggregation failed", job=job_id, round=command.round)
            write = partial(jobs.fail_command, job_id, error=str(error)[:500], **which)
        else:
            if site:
                damage = "a stored update is damaged" if damaged else "a copy of a stored update was damaged"
                log.error(damage, job=job_id, round=command.round, site=site)
                corrupt_site = site if damaged else ""
                write = partial(jobs.fail_command, job_id, error=damage, corrupt_site=corrupt_site, **which)
            else:
                write = partial(jobs.finish_command, job_id, sealed_size=self.blobs.size, **outcome, **which)
        try:
            await asyncio.to_thread(write)
        except SilotuneError as error:
            # It is still queued, and made again.
            log.warning("an aggregation could not be recorded", job=job_id, round=command.round, reason=str(error))

    def _drop_damaged(self, command: s.Command, site: str) -> bool:
        """Whether it has to be asked of the site again."""
        [digest] = [part.digest for part in command.contributions if part.site == site]
        return drop_damaged(self.store.database, self.blobs, digest)

    async def _aggregate(self, job_id: str, command: s.Command, head: int) -> dict[str, Any]:
        """Runs the worker process and seals what it wrote, before any row names it."""
        job, _, _ = await asyncio.to_thread(self.store.jobs.facts, job_id, now_unix_seconds=time.time())
        previous = await asyncio.to_thread(self.store.jobs.previous, job_id, version=head)
        optimizer = job.spec.aggregation.server_optimizer
        with (
            tempfile.TemporaryDirectory(dir=self.scratch) as directory,
            contextlib.ExitStack() as in_use,
        ):

            async def path(digest: str) -> str:
                """The blob as a local file, until the aggregation has read it; from S3 that may take a while."""
                return str(await asyncio.to_thread(in_use.enter_context, self.blobs.local(digest)))

            parts = []
            for part in command.contributions:
                try:
                    where = await path(part.digest)
                except (NotFound, CorruptData):
                    return {"corrupt_site": part.site}
                parts.append({**asdict(part), "path": where})
            output, state_output = Path(directory, "version"), Path(directory, "state")
            has_state = optimizer.type != "none"
            order: dict[str, Any] = {
                "spec": job.spec.model_dump(mode="json"),
                "round": command.round,
                "contributions": parts,
                "optimizer": optimizer.model_dump(),
                "output": str(output),
            }
            compares = job.spec.aggregation.measures_updates
            needs_previous = has_state or job.spec.aggregation.rule in DRIFT_RULES or isinstance(job.spec.method, Lora)
            if compares:
                rounds, until = self.store.views.rounds, command.round - 1
                recent = await asyncio.to_thread(rounds, job_id, last=POOLED_ROUNDS, until=until)
                order["history"] = [by_site(one.metrics, NORM) for one in recent]
            if needs_previous or compares or job.spec.encoding.up != "raw":
                order["previous"] = await path(previous["digest"])
                order["previous_digest"] = previous["digest"]
            if has_state:
                order["state_digest"] = previous["optimizer_digest"]
                order["state_output"] = str(state_output)
                if previous["optimizer_digest"]:
                    order["state"] = await path(previous["optimizer_digest"])
            if job.spec.encoding.down != "raw":
                initial = await asyncio.to_thread(self.store.jobs.previous, job_id, version=0)
                order["down"] = {
                    "seed": task_seed(job.spec.seed, round_number=command.round, site=""),
                    "initial": await path(initial["digest"]),
                    "initial_digest": initial["digest"],
                    "encoded": str(Path(directory, "encoded")),
                }
                if job.spec.encoding.error_feedback:
                    order["down"]["residual_output"] = str(Path(directory, "residual"))
                    if previous["residual_digest"]:
                        order["down"]["residual"] = await path(previous["residual_digest"])
                        order["down"]["residual_digest"] = previous["residual_digest"]
            began = time.monotonic()
            try:
                result = await self._process.carry_out(order)
            except RuntimeError:
                # A copy that is wrong is made again before the next try.
                down = order.get("down", {})
                for digest in (order.get("previous_digest"), order.get("state_digest"),
                               down.get("initial_digest"), down.get("residual_digest")):  # fmt: skip
                    if digest:
                        await asyncio.to_thread(self.blobs.verify, digest)
                raise
            self.aggregation_peak_bytes = result.pop("peak_rss_bytes")
            if "corrupt_site" in result:
                return result
            digest, size = await asyncio.to_thread(self.blobs.adopt, output)
            if digest != result["digest"]:
                raise RuntimeError("the aggregate changed on disk before it was sealed")
            for made in (state_output, Path(directory, "encoded"), Path(directory, "residual")):
                if made.exists():
                    await asyncio.to_thread(self.blobs.adopt, made)
            return {
                "digest": digest,
                "size": size,
                "optimizer_digest": result["optimizer_digest"],
                "encoded_digest": result.get("encoded_digest", ""),
                "encoded_size": result.get("encoded_size", 0),
                "residual_digest": result.get("residual_digest", ""),
                "metrics": result.get("metrics", {}),
                "seconds": {**result["seconds"], "process": time.monotonic() - began},
            }
