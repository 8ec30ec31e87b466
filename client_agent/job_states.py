"""What a site keeps of each job from task to task, one directory for each: `jobs/<job id>/`.

The trainer makes the directory when it needs it, and writes what lies there:

    initial.safetensors             version 0 as this site builds it, where the recipe encodes the way down
    residual-<round>.safetensors    what rounding lost in the update of that round, with error feedback
    control-<round>.safetensors     this site's mean gradient after that round, with rule scaffold
    teacher-<round>.safetensors     the teacher after the distillation of that round, at a house agent
    mentor-<round>.safetensors      this site's own model after that round, with a mentor
    medqa-validation-version-<v>.jsonl, ...    the answers of a version to a benchmark's questions

Nothing here is needed to go on: without it a whole version is fetched, what was lost stays lost, and a teacher
or mentor begins anew. It goes when the coordinator says that the job has ended for good.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from protos.identity import JOB_ID, check_job_id


class JobStates:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, job_id: str) -> Path:
        return self._directory / check_job_id(job_id)

    def jobs(self) -> list[str]:
        """Ids of the jobs of which something is kept."""
        return sorted(path.name for path in self._directory.glob("*") if JOB_ID.fullmatch(path.name))

    def drop(self, job_ids: Collection[str]) -> None:
        """Of these jobs nothing is kept any more."""
        for job_id in set(self.jobs()) & set(job_ids):
            shutil.rmtree(self.path(job_id), ignore_errors=True)
