"""Sites of an experiment that attack it: they train as the others do, and change what came of it before it is sent.

For studies of robust rules. Nothing of this is in the agent: in the lab an attacking site's daemon is given a runner
that is the shared one, but for what it does to a finished update. With x the version that the round began with and
Delta the site's own training, what is sent is

    sign-flip   x - factor Delta
    scale       x + factor Delta
    noise       x + factor |Delta| z, where z is random, of length 1
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from client_agent.runner import Failure, Finished, Paused, Runner
from client_agent.taskdir import UPDATE, read_spec, sync
from protos.encoded_files import TensorFile
from protos.recipe_part import Part
from protos.tensors import make_header

FILE = "attack.json"


class Attack(Part):
    """`sites` of the sites, drawn by the seed, do it in every round. Updates have to travel raw."""

    sites: Annotated[int, Field(ge=1)]
    kind: Literal["sign-flip", "scale", "noise"]
    factor: Annotated[float, Field(gt=0)] = 10.0

    def by(self, names: Sequence[str], *, seed: int) -> set[str]:
        """Who attacks."""
        drawn = np.random.default_rng([seed, len(names)]).permutation(sorted(names))
        return set(drawn[: self.sites].tolist())


class Attacker:
    """Stands for the runner that all sites share, at one that attacks."""

    def __init__(self, runner: Runner, attack: Attack) -> None:
        self._runner, self._attack = runner, attack

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    async def run(self, directory: Path, **how: Any) -> Finished | Failure | Paused:
        task = await asyncio.to_thread(read_spec, directory)
        if task.kind != "train":
            return await self._runner.run(directory, **how)
        if task.model_path is None:
            # The trainer would make it by itself; here it is needed as a file.
            return Failure("Whoever attacks needs the version itself.", needs_version=True)
        ended = await self._runner.run(directory, **how)
        if isinstance(ended, Finished):
            before, update = Path(task.model_path), directory / UPDATE
            await asyncio.to_thread(alter, self._attack, before=before, update=update, seed=task.seed)
        return ended


def alter(attack: Attack, *, before: Path, update: Path, seed: int) -> None:
    """Puts what the site sends in the place of what it trained: whole or not at all. The update is raw, in float32."""
    with TensorFile(before) as old, TensorFile(update) as new:
        named = new.layout.named
        shapes = {name: shape for name, _, shape in named}
        x, delta = {}, {}
        for name, shape in shapes.items():
            count = math.prod(shape)
            x[name] = old.leading(name, shape)(0, count).astype(np.float64)
            delta[name] = new.leading(name, shape)(0, count) - x[name]
    if attack.kind == "noise":
        random = np.random.default_rng(seed)
        z = {name: random.standard_normal(len(values)) for name, values in delta.items()}
        scale = _length(delta) / _length(z)
        delta = {name: scale * values for name, values in z.items()}
    factor = -attack.factor if attack.kind == "sign-flip" else attack.factor
    header, layout = make_header(named)
    sent = [(x[tensor.name] + factor * delta[tensor.name]).astype(np.float32).tobytes() for tensor in layout.tensors]
    changed = update.with_suffix(".changed")
    changed.write_bytes(b"".join([header, *sent]))
    sync(changed)
    changed.rename(update)


def _length(vectors: dict[str, Any]) -> float:
    return math.sqrt(sum(float(values @ values) for values in vectors.values()))
