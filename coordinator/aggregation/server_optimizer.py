"""Server optimizers: the aggregated delta as a gradient (FedOpt, Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

With x the version before, Δ = mean - x, all in float64:

    FedAvgM   u <- momentum u + Δ;  x <- x + learning_rate u                 (Hsu et al. 2019, arXiv:1909.06335)
    FedAdam   m <- b1 m + (1 - b1) Δ;  v <- b2 v + (1 - b2) Δ²;  x <- x + learning_rate m / (sqrt(v) + tau)
    FedYogi   as FedAdam with  v <- v - (1 - b2) Δ² sign(v - Δ²)
    Nesterov  u <- momentum u + Δ;  x <- x + learning_rate (Δ + momentum u)  (DiLoCo's outer step, Douillard et al.
                                                                              2023, arXiv:2311.08105)

No bias correction, as published; v begins at tau² as in the paper. State is kept in float32, as a tensor file of its
own that belongs to the version.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregation.reading import digest_of_file
from protos import tensors
from protos.errors import CorruptData, Internal
from protos.jobspec import FedAdam, FedAvgM, FedYogi, Nesterov, ServerOptimizer

FLOAT32_BYTES = 4


def apply(
    optimizer: ServerOptimizer,
    *,
    old: NDArray[np.float64],
    mean: NDArray[np.float64],
    state: dict[str, NDArray[np.float64]],
) -> NDArray[np.float64]:
    """The next version's values from one block of the last version and of the mean; updates `state` in place."""
    delta = mean - old
    if isinstance(optimizer, FedAvgM):
        state["u"][:] = optimizer.momentum * state["u"] + delta
        return old + optimizer.learning_rate * state["u"]
    if isinstance(optimizer, Nesterov):
        state["u"][:] = optimizer.momentum * state["u"] + delta
        return old + optimizer.learning_rate * (delta + optimizer.momentum * state["u"])
    if isinstance(optimizer, (FedAdam, FedYogi)):
        first, second, squared = state["m"], state["v"], delta * delta
        first[:] = optimizer.beta1 * first + (1 - optimizer.beta1) * delta
        if isinstance(optimizer, FedAdam):
            second[:] = optimizer.beta2 * second + (1 - optimizer.beta2) * squared
        else:
            second[:] = second - (1 - optimizer.beta2) * squared * np.sign(second - squared)
        return old + optimizer.learning_rate * first / (np.sqrt(second) + optimizer.tau)
    raise Internal(f"There is no server optimizer {optimizer.type!r}.")


def slots(optimizer: ServerOptimizer) -> dict[str, float]:
    """Names of the state tensors for each model tensor, and the value that they begin with."""
    if isinstance(optimizer, (FedAvgM, Nesterov)):
        return {"u": 0.0}
    if isinstance(optimizer, (FedAdam, FedYogi)):
        return {"m": 0.0, "v": optimizer.tau**2}
    return {}


class OptimizerState:
    """The state's file, read and written block by block beside the model: tensors `m.<name>`, `v.<name>`.

    Close it where it is not finished.
    """

    def __init__(self, begin_with: dict[str, float], layout: tensors.Layout, source: Path | None, target: Path) -> None:
        header, own = tensors.make_header(
            (f"{slot}.{tensor.name}", "F32", tensor.shape) for slot in begin_with for tensor in layout.tensors
        )
        self._begin_with = begin_with
        self._offsets = {tensor.name: len(header) + tensor.offset for tensor in own.tensors}
        self._path = target
        with ExitStack() as handles:
            self._source = None if source is None else _opened(source, os.O_RDONLY, handles)
            self._target = _opened(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, handles)
            os.truncate(self._target, own.file_bytes)
            os.pwrite(self._target, header, 0)
            self._handles = handles.pop_all()
        self._pending: list[tuple[int, NDArray[np.float64]]] = []

    @staticmethod
    def begin(
        optimizer: ServerOptimizer, layout: tensors.Layout, source: Path | None, target: Path, *, digest: str
    ) -> OptimizerState:
        """CorruptData when `source` does not match `digest`."""
        if source is not None and digest_of_file(source) != digest:
            raise CorruptData("The stored state of the server optimizer no longer matches its digest.")
        return OptimizerState(slots(optimizer), layout, source, target)

    def block(self, tensor: tensors.TensorSpec, start: int, count: int) -> dict[str, NDArray[np.float64]]:
        """The state of elements start .. start + count; change it in place, then call `save`."""
        found: dict[str, NDArray[np.float64]] = {}
        for slot, first in self._begin_with.items():
            position = self._offsets[f"{slot}.{tensor.name}"] + start * FLOAT32_BYTES
            if self._source is None:
                values = np.full(count, first)
            else:
                data = os.pread(self._source, count * FLOAT32_BYTES, position)
                values = np.frombuffer(data, dtype=np.float32).astype(np.float64)
            found[slot] = values
            self._pending.append((position, values))
        return found

    def save(self) -> None:
        for position, values in self._pending:
            os.pwrite(self._target, values.astype(np.float32).tobytes(), position)
        self._pending.clear()

    def finish(self) -> str:
        """Syncs the file and returns its digest."""
        os.fsync(self._target)
        self.close()
        return digest_of_file(self._path)

    def close(self) -> None:
        self._handles.close()


def _opened(path: Path, flags: int, handles: ExitStack) -> int:
    handle = os.open(path, flags, 0o600)
    handles.callback(os.close, handle)
    return handle
