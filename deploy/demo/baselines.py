"""What each institute reaches alone, and what all their rows reach in one place: the federation's two yardsticks.

Both use the trainer's own code, the recipe's own settings and the same version 0. A site alone makes as many steps as
it made in the federation (rounds x steps); the pooled rows get as many as all sites together (rounds x steps x sites).
Half of all steps are the pooled model's, so two processes, one for it and one for all sites, share two cores evenly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from client_agent.training.data import Rows
from deploy.data.make_medquad import TEST
from deploy.demo import institutes
from deploy.local import CommandFailed
from protos import jobspec
from protos.jobspec import JobSpec

POOLED = "pooled"
Metrics = dict[str, float]
# (name, steps done, of how many)
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """What one process trains, one after the other: institutes, or POOLED."""

    names: tuple[str, ...]
    sites: tuple[str, ...]
    spec_json: str
    base_model_path: str
    base_digest: str


def measure(
    spec: JobSpec, *, sites: Sequence[str], base_model_path: Path, base_digest: str, log: Path, on_progress: OnProgress
) -> dict[str, Metrics]:
    """Metrics on the house agent's test rows by institute, and for POOLED. CommandFailed with the worker's last lines.

    The workers end with this process, however it ends.
    """
    found: dict[str, Metrics] = {}
    workers = []
    readers = []
    with log.open("ab") as errors:
        try:
            for names in ((POOLED,), tuple(sites)):
                work = Work(names, tuple(sites), spec.canonical_json, str(base_model_path), base_digest)
                worker = subprocess.Popen(
                    [sys.executable, "-m", "client_agent.tether", "deploy.demo.baselines", str(os.getpid())],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                )  # fmt: skip
                workers.append(worker)
                assert worker.stdin is not None and worker.stdout is not None
                json.dump(asdict(work), worker.stdin)
                worker.stdin.close()
                reader = threading.Thread(target=_read, args=(worker.stdout, found, on_progress), daemon=True)
                reader.start()
                readers.append(reader)
            for worker, reader in zip(workers, readers, strict=True):
                worker.wait()
                reader.join()
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    for worker in workers:
        if worker.returncode:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise CommandFailed(["baselines"], worker.returncode, last)
    return found


def _read(lines: IO[str], found: dict[str, Metrics], on_progress: OnProgress) -> None:
    for line in lines:
        event = json.loads(line)
        if "metrics" in event:
            found[event["name"]] = event["metrics"]
        else:
            on_progress(event["name"], event["done"], event["total"])


def work_off(work: Work, *, out: IO[str]) -> None:
    """Trains and measures `work.names`; progress and metrics go to `out` as JSON lines."""
    # Here, because no other part of the demo may load torch.
    from client_agent.training.baseline import train_alone

    def tell(**event: object) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    spec = jobspec.from_json(work.spec_json)
    assert isinstance(spec.task, jobspec.Classification) and spec.local.steps is not None
    labels = spec.task.labels
    test = institutes.held_out_rows(TEST, labels=labels)
    for name in work.names:
        members = work.sites if name == POOLED else (name,)
        metrics = train_alone(
            spec,
            base_model_path=Path(work.base_model_path),
            base_digest=work.base_digest,
            train=pooled([institutes.site_rows(member, labels=labels) for member in members]),
            test=test,
            steps=spec.rounds * spec.local.steps * len(members),
            seed=jobspec.task_seed(spec.seed, round_number=1, site=name),
            threads=1,
            on_progress=lambda done, total, name=name: tell(name=name, done=done, total=total),  # type: ignore[misc]
        )
        tell(name=name, metrics=metrics)


def pooled(parts: Sequence[Rows]) -> Rows:
    """The rows of several sites as if they lay in one place."""
    return Rows(
        texts=[text for rows in parts for text in rows.texts],
        labels=[label for rows in parts for label in rows.labels],
        label_names=parts[0].label_names,
        skipped=sum(rows.skipped for rows in parts),
    )


def main() -> None:
    fields = json.load(sys.stdin)
    work_off(Work(**{**fields, "names": tuple(fields["names"]), "sites": tuple(fields["sites"])}), out=sys.stdout)


if __name__ == "__main__":
    main()
