"""The next version from the updates of a round, in constant memory: the weighted mean, or what a LoRA rule makes.

For each tensor in canonical order and each block of BLOCK_ELEMENTS: read the block from every update, add weight times
value in float64, apply the server optimizer, write. All updates are read through one buffer, so neither the number of
sites nor the size of the model is in the memory, and the sum is the same bit for bit on every run and for every order
of arrival. BLAKE3 of each input is taken from the bytes that are summed, not from an earlier reading.

Only a layer's LoRA pair is taken whole (see layers.py): what it stands for is a product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from coordinator.aggregation.anomalies import figures
from coordinator.aggregation.controls import Controls
from coordinator.aggregation.gram import block_elements, gram_matrix, stacked
from coordinator.aggregation.layers import Layers
from coordinator.aggregation.lora_rules import Matrix
from coordinator.aggregation.output import Output
from coordinator.aggregation.reading import BLOCK_ELEMENTS as BLOCK_ELEMENTS
from coordinator.aggregation.reading import DTYPES as DTYPES
from coordinator.aggregation.reading import EncodedReader, Reader
from coordinator.aggregation.robust import Vector, coefficients, coordinate_wise, is_coordinate_wise
from coordinator.aggregation.server_optimizer import OptimizerState, apply
from protos import tensors
from protos.adapters import CONTROL, split_name, update_tensors
from protos.encoded_files import TensorFile
from protos.errors import CorruptData, Internal, SilotuneError
from protos.jobspec import DRIFT_RULES, JobSpec, Lora, NoServerOptimizer, ServerOptimizer
from protos.recipe_robust import NotRobust, Robust


class CorruptUpdate(Exception):
    """A stored update does not match its digest; `site` says whose."""

    def __init__(self, site: str) -> None:
        super().__init__(f"the stored update of {site} does not match its digest")
        self.site = site


@dataclass(frozen=True)
class Input:
    site: str
    path: Path
    digest: str
    weight: float
    # How it is written: see protos/encodings.py.
    encoding: str = "raw"
    block: int = 0
    # scaffold: see coordinator/rounds/state.Contribution.
    control_weight: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Combined:
    """What came out: `digest` and `size` of the new version, figures about it, and where the seconds went."""

    digest: str
    size: int
    optimizer_digest: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def read_header(path: Path) -> tuple[bytes, tensors.Layout]:
    """The bytes before the data section of a tensor file, and its layout. UpdateRejected when it is not one."""
    with path.open("rb") as file:
        first = file.read(8)
        header = first + file.read(tensors.header_length(first) - 8)
    return header, tensors.parse_header(header, file_bytes=path.stat().st_size)


def combine(
    inputs: Sequence[Input],
    *,
    output: Path,
    previous: Path | None = None,
    previous_digest: str = "",
    optimizer: ServerOptimizer | None = None,
    state: Path | None = None,
    state_digest: str = "",
    state_output: Path | None = None,
    spec: JobSpec | None = None,
    round_number: int = 0,
    history: Sequence[Mapping[str, float]] = (),
) -> Combined:
    """Writes x + sum(weight_k (x_k - x)), through the server optimizer where there is one, to `output`; fsyncs it.

    `inputs` are in site order. `previous` is x, the version that they started from, and `state` the server optimizer's
    after it (None: zero). x is needed where the weights do not sum to 1, with an optimizer, with encoded inputs and for
    LoRA; the last two, scaffold and robust rules need the `spec` too. `history` is for the report on updates, see
    anomalies.py. CorruptUpdate: an input does not match its digest;
    CorruptData: `previous` or `state` does not. Nothing may be used of the output then.
    """
    optimizer = optimizer or NoServerOptimizer(type="none")
    began = time.perf_counter()
    buffer = bytearray(BLOCK_ELEMENTS * 8)
    weights = [part.weight for part in inputs]
    robust = spec.aggregation.robust if spec else NotRobust(type="none")
    measured: dict[str, float] = {}
    with ExitStack() as stack:
        base = None if previous is None else stack.enter_context(_open_previous(previous))
        held = [_held(part.site, base, spec=spec, round_number=round_number) for part in inputs]
        if spec and spec.aggregation.measures_updates:
            gram = _gram(
                inputs, buffer=buffer, previous=previous, previous_digest=previous_digest, base=base, held=held
            )  # fmt: skip
            found = coefficients(robust, gram, weights=weights)
            measured = figures(gram, sites=[part.site for part in inputs], coefficients=found, history=history)
            weights = weights if found is None else found.tolist()
        readers = [_open(part, buffer, base=base, held=names) for part, names in zip(inputs, held, strict=True)]
        header, layout = _header(inputs[0].path, site=inputs[0].site) if base is None else (None, base.layout)
        header = header or tensors.make_header(layout.named)[0]
        before = None if previous is None else Reader(previous, buffer)
        controls = _controls(inputs, base, spec=spec, round_number=round_number, stack=stack)
        memory = None
        if not isinstance(optimizer, NoServerOptimizer) and state_output is not None:
            variables = _variables(layout, has_controls=controls is not None)
            memory = OptimizerState.begin(optimizer, variables, state, state_output, digest=state_digest)
            stack.callback(memory.close)
        layers = _layers(spec, round_number, weights) if before else None
        out = Output(output, header=None if layers and layers.grows else header)
        work = _Combination(weights, robust, readers, held, before, controls, layers, optimizer, memory, out)
        for (layer, is_pair), group in groupby(layout.tensors, key=_unit):
            if layers and is_pair:
                work.combine_layer(layer, list(group))
            else:
                for tensor in group:
                    work.combine_tensor(tensor)
        combined = time.perf_counter()
        digest = out.finish()
        _close(readers, inputs=inputs, before=before, previous_digest=previous_digest)
        optimizer_digest = memory.finish() if memory is not None else ""
    ended = time.perf_counter()
    return Combined(
        digest=digest,
        size=output.stat().st_size,
        optimizer_digest=optimizer_digest,
        metrics=(layers.metrics if layers else {}) | measured,
        seconds={"combine": combined - began, "sync": ended - combined},
    )


@dataclass
class _Combination:
    """What the tensors of a version are made with, one after the other. All readers stand at the same place."""

    weights: Sequence[float]
    robust: Robust
    readers: Sequence[Reader]
    # The tensors of each update and their shapes; empty where nobody has to know.
    held: Sequence[Mapping[str, tuple[int, ...]]]
    before: Reader | None
    controls: Controls | None
    layers: Layers | None
    optimizer: ServerOptimizer
    memory: OptimizerState | None
    out: Output

    def __post_init__(self) -> None:
        self._by_coordinate = is_coordinate_wise(self.robust)
        self._step = block_elements(len(self.readers)) if self._by_coordinate else BLOCK_ELEMENTS
        self._rest = 0.0 if self._by_coordinate else _rest(self.weights)
        self._total, self._term = np.empty(BLOCK_ELEMENTS), np.empty(BLOCK_ELEMENTS)

    def combine_tensor(self, tensor: tensors.TensorSpec) -> None:
        self.out.begin(tensor.name, tensor.dtype, tensor.shape)
        block = self._control if self.controls and _is_control(tensor) else self._block
        for start in range(0, tensor.elements, self._step):
            values = block(tensor, start, min(self._step, tensor.elements - start))
            self.out.write(values.astype(DTYPES[tensor.dtype]).tobytes())

    def _control(self, tensor: tensors.TensorSpec, start: int, count: int) -> Vector:
        assert self.controls and self.before
        old = self.before.values(count, DTYPES[tensor.dtype]).astype(np.float64)
        return self.controls.block(tensor.name, start, count, old=old)

    def _block(self, tensor: tensors.TensorSpec, start: int, count: int) -> Vector:
        dtype = DTYPES[tensor.dtype]
        travels = not self.held[0] or tensor.name in self.held[0]
        mean = self._sum(count, dtype) if travels else self._total[:count]
        if self.before is None:
            return mean
        # Also where it is not needed: its digest is taken from all of it.
        old = self.before.values(count, dtype)
        if not travels:
            mean[:] = old
        elif self._rest:
            mean += np.multiply(old, self._rest, out=self._term[:count], dtype=np.float64)
        if self.memory is not None:
            state = self.memory.block(tensor, start, count)
            if travels:
                mean = apply(self.optimizer, old=old.astype(np.float64), mean=mean, state=state)
            self.memory.save()
        return mean

    def _sum(self, count: int, dtype: np.dtype) -> Vector:
        """sum(weight_k x_k) of the next values, or what a rule makes of each coordinate by itself."""
        if self._by_coordinate:
            return coordinate_wise(self.robust, stacked(self.readers, count, dtype))
        mean, scaled = self._total[:count], self._term[:count]
        for place, (reader, weight) in enumerate(zip(self.readers, self.weights, strict=True)):
            np.multiply(reader.values(count, dtype), weight, out=scaled if place else mean, dtype=np.float64)
            if place:
                mean += scaled
        return mean

    def combine_layer(self, layer: str, group: Sequence[tensors.TensorSpec]) -> None:
        """The tensors of one adapter, whole: they are all in `group`, for their names follow one another."""
        assert self.layers and self.before
        factors = {split_name(tensor.name)[1]: tensor for tensor in group}
        old = {factor: _whole(self.before, tensor.shape, tensor.dtype) for factor, tensor in factors.items()}
        sites = [
            {
                factor: _whole(reader, shapes[tensor.name], tensor.dtype)
                for factor, tensor in factors.items()
                if tensor.name in shapes
            }
            for reader, shapes in zip(self.readers, self.held, strict=True)
        ]
        new = self.layers.combine(layer, sites=sites, old=old)
        for factor, tensor in factors.items():
            if self.memory is None or factor.startswith("fold"):
                continue
            state = self.memory.block(tensor, 0, tensor.elements)
            if factor in self.layers.trained:
                values = apply(self.optimizer, old=old[factor].ravel(), mean=new[factor].ravel(), state=state)
                new[factor] = values.reshape(tensor.shape)
            self.memory.save()
        dtype = group[0].dtype
        for factor, matrix in sorted(new.items()):
            self.out.begin(f"{layer}.{factor}.weight", dtype, matrix.shape)
            self.out.write(matrix.astype(DTYPES[dtype]).tobytes())


def _whole(reader: Reader, shape: tuple[int, ...], dtype: str) -> Matrix:
    values = reader.values(math.prod(shape), DTYPES[dtype]).astype(np.float64)
    # What is not finite was damaged since it was admitted, as the digest will tell; no decomposition gets that far.
    return np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0).reshape(shape)


def _layers(spec: JobSpec | None, round_number: int, weights: Sequence[float]) -> Layers | None:
    """Only where A and B mean their product: where updates are vectors, a pair is nothing else than other tensors."""
    if spec is None or not isinstance(spec.method, Lora):
        return None
    are_vectors = spec.aggregation.rule in DRIFT_RULES or spec.aggregation.robust.type != "none"
    return None if are_vectors else Layers(spec, round_number, weights)


def _variables(layout: tensors.Layout, *, has_controls: bool) -> tensors.Layout:
    """What a server optimizer has a state of: no folds, which are of another size each time, and no controls."""
    kept = tuple(
        tensor
        for tensor in layout.tensors
        if not split_name(tensor.name)[1].startswith("fold") and not (has_controls and _is_control(tensor))
    )
    return tensors.Layout(kept, layout.data_start)


def _gram(
    inputs: Sequence[Input], *, buffer: bytearray, previous: Path | None, previous_digest: str, base: TensorFile | None,
    held: Sequence[Mapping[str, tuple[int, ...]]],
) -> Matrix:  # fmt: skip
    """The Gram matrix of the updates' differences from `previous`, in a reading of its own. Errors as of `combine`."""
    if previous is None or base is None:
        raise Internal("Updates are compared by their difference from the version before, and there is none.")
    readers = [_open(part, buffer, base=base, held=names) for part, names in zip(inputs, held, strict=True)]
    before = Reader(previous, buffer)
    found = gram_matrix(readers, before=before, layout=base.layout, travelling=held[0])
    _close(readers, inputs=inputs, before=before, previous_digest=previous_digest)
    return found


def _close(
    readers: Sequence[Reader], *, inputs: Sequence[Input], before: Reader | None, previous_digest: str
) -> None:  # fmt: skip
    """CorruptUpdate, CorruptData: what was read is not what was stored."""
    for reader, part in zip(readers, inputs, strict=True):
        if reader.close() != part.digest:
            raise CorruptUpdate(part.site)
    if before is not None and before.close() != previous_digest:
        raise _damaged_previous()


def _unit(tensor: tensors.TensorSpec) -> tuple[str, bool]:
    """What is combined together: (layer, True) for the tensors of one adapter, else (name, False)."""
    layer, factor = split_name(tensor.name)
    return layer, bool(factor)


def _rest(weights: Sequence[float]) -> float:
    """What x itself weighs in x + sum(weight_k (x_k - x)): nothing in a mean, but for rounding."""
    rest = 1.0 - math.fsum(weights)
    return rest if abs(rest) > 1e-9 else 0.0


def _is_control(tensor: tensors.TensorSpec) -> bool:
    return tensor.name.startswith(CONTROL)


def _controls(
    inputs: Sequence[Input], base: TensorFile | None, *, spec: JobSpec | None, round_number: int, stack: ExitStack
) -> Controls | None:  # fmt: skip
    if base is None or spec is None or spec.aggregation.rule != "scaffold":
        return None
    rate, files = spec.learning_rate_at(round_number), []
    for part in inputs:
        try:
            files.append(stack.enter_context(TensorFile(part.path)))
        except (OSError, SilotuneError) as error:
            raise CorruptUpdate(part.site) from error
    scales = [part.control_weight / (part.steps * rate) for part in inputs]
    return Controls(base, files, scales, kept=1.0 - sum(part.control_weight for part in inputs))


def _held(
    site: str, base: TensorFile | None, *, spec: JobSpec | None, round_number: int
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """The tensors of a site's update and their shapes, in canonical order; empty where nobody has to know."""
    if base is None or spec is None:
        return {}
    found = update_tensors(spec, base.layout, round_number=round_number, site=site)
    return {name: shape for name, _, shape in found}


def _open(part: Input, buffer: bytearray, *, base: TensorFile | None, held: Mapping[str, tuple[int, ...]]) -> Reader:
    try:
        if part.encoding == "raw" or base is None:
            return Reader(part.path, buffer)
        named = [(name, "F32", shape) for name, shape in held.items()]
        return EncodedReader(part.path, buffer, held=named, base=base, encoding=part.encoding, block=part.block)
    except (OSError, SilotuneError) as error:
        raise CorruptUpdate(part.site) from error


def _header(path: Path, *, site: str) -> tuple[bytes, tensors.Layout]:
    try:
        return read_header(path)
    except SilotuneError as error:
        # It was admitted with a good header, so it is the disk's.
        raise CorruptUpdate(site) from error


def _open_previous(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except SilotuneError as error:
        raise _damaged_previous() from error


def _damaged_previous() -> CorruptData:
    return CorruptData("The version that the round started from no longer matches its digest.")
