"""One run of the demo, from the first key to the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from coordinator import model_card, recipe
from deploy.data.make_medquad import TEST, VALIDATION
from deploy.demo import baselines, exported, federation, institutes, report
from deploy.demo.workspace import Stopwatch
from deploy.local import LocalFederation
from protos.jobspec import Classification, JobSpec

RECIPE = Path(__file__).parent / "recipe.toml"
SHOWN_TOKEN = 24


@dataclass
class Run:
    """`out` is the folder that the run has to itself."""

    out: Path
    console: Console
    recipe_file: Path = RECIPE
    commands: list[str] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)

    def whole(self) -> dict[str, Any]:
        """Everything; the report is returned and lies in `out`."""
        spec = recipe.read(self.recipe_file)
        sites = institutes.names()
        model = self.out / "model"
        with LocalFederation(self.out, on_command=self._say_command) as running:
            with self._part("set-up", f"1. {len(sites)} institutes, the house agent and a coordinator on this machine"):
                federation.set_up(running, sites=sites)
            with self._part("federated job", "2. The job, live"):
                shown = federation.run_job(running, recipe=self.recipe_file)
            with self._part("export", "3. The best model"):
                federation.export(running, job=shown["job"]["id"], out=model)
                memory = federation.memory(running)
        federation.clear_blobs(running)
        digest = json.loads((model / "silotune.json").read_text())["base_digest"]
        with self._part("baselines", "4. For comparison: every institute alone, and all rows in one place"):
            measured = self._baselines(spec, sites=sites, digest=digest)
        with self._part("exported model", "5. The exported model, in a process without silotune"):
            accuracy, recall = self._exported(spec, model=model)
        with self._part("report", "6. The report"):
            return self._report(
                shown, spec=spec, baselines=measured, holds=holdings(spec, sites=sites), exported_accuracy=accuracy,
                recall=recall, memory=memory,
            )  # fmt: skip

    def _baselines(self, spec: JobSpec, *, sites: list[str], digest: str) -> dict[str, baselines.Metrics]:
        columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            bars: dict[str, TaskID] = {name: progress.add_task(name, start=False) for name in ("pooled", *sites)}

            def on_progress(name: str, done: int, total: int) -> None:
                if done == 0:
                    progress.start_task(bars[name])
                progress.update(bars[name], completed=done, total=total)

            return baselines.measure(
                spec, sites=sites, base_model_path=federation.base_model_path(), base_digest=digest,
                log=self.out / "logs" / "baselines.log", on_progress=on_progress,
            )  # fmt: skip

    def _exported(self, spec: JobSpec, *, model: Path) -> tuple[float, dict[str, float]]:
        assert isinstance(spec.task, Classification)
        rows = institutes.held_out_rows(TEST, labels=spec.task.labels)
        answers = exported.classify(model, rows.texts, max_length=spec.task.max_length)
        return exported.accuracy(rows, answers), exported.recall_by_label(rows, answers)

    def _report(self, shown: dict[str, Any], *, spec: JobSpec, **found: Any) -> dict[str, Any]:
        # Only here: plots load slowly.
        from deploy.demo import page, plots

        seconds = {**self.watch.seconds, "total": sum(self.watch.seconds.values())}
        usage = model_card.usage(spec, directory=str(self.out / "model"))
        made = report.build(shown, spec=spec, seconds=seconds, commands=self.commands, usage=usage, **found)
        (self.out / "report.json").write_text(json.dumps(made, indent=1) + "\n")
        plots.draw(made, directory=self.out / "plots")
        (self.out / "report.html").write_text(page.render(made, plots=self.out / "plots"))
        return made

    @contextmanager
    def _part(self, name: str, headline: str) -> Iterator[None]:
        self.console.print(f"\n[bold]{headline}[/]")
        with self.watch.part(name):
            yield

    def _say_command(self, command: str) -> None:
        words = command.split(" ")
        if "--token" in words:
            position = words.index("--token") + 1
            words[position] = words[position][:SHOWN_TOKEN] + "..."
        said = " ".join(words)
        # The run asks for the job's state again and again; a person would look at it once.
        if said not in self.commands:
            self.commands.append(said)
            self.console.print(f"$ {said}", style="dim", markup=False, soft_wrap=True, highlight=False)


def holdings(spec: JobSpec, *, sites: list[str]) -> dict[str, dict[str, int]]:
    """Rows by label: of each site, and of the house agent's validation and test rows."""
    assert isinstance(spec.task, Classification)
    labels = spec.task.labels
    read: dict[str, Callable[[], Any]] = {
        **{name: lambda name=name: institutes.site_rows(name, labels=labels) for name in sites},  # type: ignore[misc]
        "validation": lambda: institutes.held_out_rows(VALIDATION, labels=labels),
        "test": lambda: institutes.held_out_rows(TEST, labels=labels),
    }
    return {name: institutes.label_counts(rows()) for name, rows in read.items()}
