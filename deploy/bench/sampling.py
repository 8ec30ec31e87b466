"""CPU seconds and memory of groups of processes, children included, sampled from the operating system."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field

import psutil


@dataclass
class Sampler:
    """Samples each group's process trees until stopped. CPU of children that ended is kept (children_user/system)."""

    groups: dict[str, list[int]]  # name -> root pids
    interval_seconds: float = 0.1
    _marks: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    _peak_rss: dict[str, int] = field(default_factory=dict)
    _peak_sum: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def cpu_seconds(self, group: str, *, since: float, until: float) -> float:
        """CPU seconds of a group between two wall-clock times, interpolated."""
        return self._at(group, until) - self._at(group, since)

    def peak_child_rss_bytes(self, group: str) -> int:
        """The largest child process of the group that was seen: short-lived workers, trainers."""
        return self._peak_rss.get(group, 0)

    def peak_rss_bytes(self, group: str) -> int:
        """The most that a group's processes held together; pages that they share count for each."""
        return self._peak_sum.get(group, 0)

    def _run(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self._marks.append((time.time(), {name: self._cpu(name, pids) for name, pids in self.groups.items()}))

    def _cpu(self, name: str, pids: list[int]) -> float:
        total, rss_bytes = 0.0, 0
        for pid in pids:
            try:
                root = psutil.Process(pid)
                times = root.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
                rss_bytes += root.memory_info().rss
                for child in root.children(recursive=True):
                    times = child.cpu_times()
                    total += times.user + times.system
                    child_bytes = child.memory_info().rss
                    rss_bytes += child_bytes
                    self._peak_rss[name] = max(self._peak_rss.get(name, 0), child_bytes)
            except psutil.NoSuchProcess:
                continue
        self._peak_sum[name] = max(self._peak_sum.get(name, 0), rss_bytes)
        return total

    def _at(self, group: str, moment: float) -> float:
        times = [mark[0] for mark in self._marks]
        after = min(bisect_left(times, moment), len(times) - 1)
        before = max(0, after - 1)
        (t0, first), (t1, second) = self._marks[before], self._marks[after]
        share = 0.0 if t1 <= t0 else min(1.0, max(0.0, (moment - t0) / (t1 - t0)))
        return first[group] + share * (second[group] - first[group])
