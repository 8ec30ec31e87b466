"""The next version from the updates of a round, in constant memory: the weighted mean, or what a LoRA rule makes.

For each tensor in canonical order and each block of BLOCK_ELEMENTS: read the block from every update, add weight times
value in float64, apply the server optimizer, write. All updates are read through one buffer, so neither the number of
sites nor the size of the model is in the memory, and the sum is the same bit for bit on every run and for every order
of arrival. BLAKE3 of each input is taken from the bytes that are summed, not from an earlier reading.

Only a layer's LoRA pair is taken whole (see layers.py): what it stands for is a product.
"""

from __future__ import annotations

import math
import os
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
from coordinator.aggregation.reading import BLOCK_ELEMENTS as BLOCK_ELEMENTS
from coordinator.aggregation.reading import DTYPES as DTYPES
from coordinator.aggregation.reading import EncodedReader, Reader
from coordinator.aggregation.robust import coefficients, coordinate_wise, is_coordinate_wise
from coordinator.aggregation.server_optimizer import OptimizerState, apply
from protos import tensors
from protos.adapters import CONTROL, split_name, update_tensors
from protos.digests import new_hasher
from protos.encoded_files import TensorFile
from protos.encodings import Named
from protos.errors import CorruptData, Internal, SilotuneError
from protos.jobspec import DRIFT_RULES, JobSpec, Lora, NoServerOptimizer, ServerOptimizer
from protos.recipe_robust import NotRobust


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


class _Output:
    """The new version's file, hashed as it is written. Its header is known, or follows from what was written."""

    def __init__(self, path: Path, *, header: bytes | None) -> None:
        self._path, self._header = path, header
        self._file = path.open("wb")
        self._hasher = new_hasher()
        self._named: list[Named] = []
        self.write(header or b"")

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self._hasher.update(block)

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """What is written next is this tensor."""
        self._named.append((name, dtype, shape))

    def finish(self) -> str:
        """The digest of what is on disk when this returns."""
        if self._header is None:
            self._put_header_before()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hasher.hexdigest()

    def _put_header_before(self) -> None:
        if self._named != sorted(self._named):
            raise Internal("The tensors of a version came in another order than the canonical one.")
        self._file.close()
        data = self._path.rename(self._path.with_suffix(".data"))
        self._file, self._hasher = self._path.open("wb"), new_hasher()
        self.write(tensors.make_header(self._named)[0])
        with data.open("rb") as source:
            while piece := source.read(1 << 20):
                self.write(piece)
        data.unlink()


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
    by_coordinate = is_coordinate_wise(robust)
    step = block_elements(len(inputs)) if by_coordinate else BLOCK_ELEMENTS
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
        rest = 0.0 if by_coordinate else _rest(weights)
        readers = [_open(part, buffer, base=base, held=names) for part, names in zip(inputs, held, strict=True)]
        header, layout = _header(inputs[0].path, site=inputs[0].site) if base is None else (None, base.layout)
        header = header or tensors.make_header(layout.named)[0]
        before = None if previous is None else Reader(previous, buffer)
        controls = _controls(inputs, base, spec=spec, round_number=round_number, stack=stack)
        memory = None
        if not isinstance(optimizer, NoServerOptimizer) and state_output is not None:
            # A fold is no variable of the optimizer, and of another size each time; nor is a control.
            kept = tuple(
                tensor
                for tensor in layout.tensors
                if not split_name(tensor.name)[1].startswith("fold") and not (controls and _is_control(tensor))
            )
            variables = tensors.Layout(kept, layout.data_start)
            memory = OptimizerState.begin(optimizer, variables, state, state_output, digest=state_digest)
        layers = None
        # Where updates are plain vectors, a pair is nothing else than other tensors.
        vectors = spec is not None and (spec.aggregation.rule in DRIFT_RULES or robust.type != "none")
        if spec and before and isinstance(spec.method, Lora) and not vectors:
            layers = Layers(spec, round_number, weights)
        out = _Output(output, header=None if layers and layers.grows else header)
        total, term = np.empty(BLOCK_ELEMENTS), np.empty(BLOCK_ELEMENTS)
        for (layer, is_pair), group in groupby(layout.tensors, key=_unit):
            if layers and before and is_pair:
                _combine_layer(
                    layer, list(group), layers=layers, before=before, readers=readers, held=held,
                    optimizer=optimizer, memory=memory, out=out,
                )  # fmt: skip
                continue
            for tensor in group:
                dtype = DTYPES[tensor.dtype]
                out.begin(tensor.name, tensor.dtype, tensor.shape)
                travels = not held[0] or tensor.name in held[0]
                for start in range(0, tensor.elements, step):
                    count = min(step, tensor.elements - start)
                    if controls and before and _is_control(tensor):
                        control = before.values(count, dtype).astype(np.float64)
                        out.write(controls.block(tensor.name, start, count, old=control).astype(dtype).tobytes())
                        continue
                    mean, scaled = total[:count], term[:count]
                    if by_coordinate and travels:
                        mean = coordinate_wise(robust, stacked(readers, count, dtype))
                    contributing = () if by_coordinate or not travels else zip(readers, weights, strict=True)
                    for place, (reader, weight) in enumerate(contributing):
                        values = reader.values(count, dtype)
                        np.multiply(values, weight, out=scaled if place else mean, dtype=np.float64)
                        if place:
                            np.add(mean, scaled, out=mean)
                    # Also where it is not needed: its digest is taken from all of it.
                    old = None if before is None else before.values(count, dtype)
                    if old is not None and not travels:
                        mean[:] = old
                    elif old is not None and rest:
                        np.multiply(old, rest, out=scaled, dtype=np.float64)
                        np.add(mean, scaled, out=mean)
                    if old is not None and memory is not None:
                        state_block = memory.block(tensor, start, count)
                        if travels:
                            mean = apply(optimizer, old=old.astype(np.float64), mean=mean, state=state_block)
                        memory.save()
                    out.write(mean.astype(dtype).tobytes())
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


def _combine_layer(
    layer: str,
    group: Sequence[tensors.TensorSpec],
    *,
    layers: Layers,
    before: Reader,
    readers: Sequence[Reader],
    held: Sequence[Mapping[str, tuple[int, ...]]],
    optimizer: ServerOptimizer,
    memory: OptimizerState | None,
    out: _Output,
) -> None:
    """The tensors of one adapter, whole: they are all in `group`, for their names follow one another."""

    def read(reader: Reader, shape: tuple[int, ...], dtype: str) -> Matrix:
        values = reader.values(math.prod(shape), DTYPES[dtype]).astype(np.float64)
        # What is not finite was damaged since it was admitted, as the digest will tell; no decomposition gets that far.
        return np.nan_to_num(values, copy=False, posinf=0.0, neginf=0.0).reshape(shape)

    factors = {split_name(tensor.name)[1]: tensor for tensor in group}
    old = {factor: read(before, tensor.shape, tensor.dtype) for factor, tensor in factors.items()}
    sites = [
        {
            factor: read(reader, shapes[tensor.name], tensor.dtype)
            for factor, tensor in factors.items()
            if tensor.name in shapes
        }
        for reader, shapes in zip(readers, held, strict=True)
    ]
    new = layers.combine(layer, sites=sites, old=old)
    for factor, tensor in factors.items():
        if memory is None or factor.startswith("fold"):
            continue
        state = memory.block(tensor, 0, tensor.elements)
        if factor in layers.trained:
            values = apply(optimizer, old=old[factor].ravel(), mean=new[factor].ravel(), state=state)
            new[factor] = values.reshape(tensor.shape)
        memory.save()
    dtype = group[0].dtype
    for factor, matrix in sorted(new.items()):
        out.begin(f"{layer}.{factor}.weight", dtype, matrix.shape)
        out.write(matrix.astype(DTYPES[dtype]).tobytes())


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
