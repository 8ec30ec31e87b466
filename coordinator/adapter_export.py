"""A LoRA version as one plain PEFT adapter: what its rule has put between or beside the factors becomes part of them.

fed-sb's R is multiplied into B. The fold of flora and fedex stands in further columns, so the adapter has a higher rank
than the job, and its configuration the alpha that keeps the scale. One layer is in memory at a time.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protos import tensors
from protos.adapters import Factor, split_name
from protos.encoded_files import CHUNK_VALUES, VALUE_BYTES, TensorFile
from protos.errors import CorruptData
from protos.jobspec import FOLDING_RULES, JobSpec, Lora

# How PEFT's names begin before the base model's own.
PREFIX = "base_model.model."


def is_plain(spec: JobSpec) -> bool:
    """Whether every version of the job is a plain adapter as it stands."""
    return not isinstance(spec.method, Lora) or spec.aggregation.rule not in ("fed-sb", *FOLDING_RULES)


def write_plain_adapter(version: Path, *, config: Path, method: Lora, target: Path) -> None:
    """Writes the adapter to `target`, and its ranks into the adapter_config.json at `config`.

    CorruptData: a site made that file, and it is no configuration.
    """
    with TensorFile(version) as source:
        layers: dict[str, dict[Factor, tensors.TensorSpec]] = {}
        named = []
        for (layer, is_adapter), group in groupby(source.layout.tensors, key=_unit):
            found = {split_name(tensor.name)[1]: tensor for tensor in group}
            if not is_adapter:
                named += [(tensor.name, tensor.dtype, tensor.shape) for tensor in found.values()]
                continue
            layers[layer] = found
            (rank, n), (m, _) = found["lora_A"].shape, found["lora_B"].shape
            rank += found["fold_A"].shape[0] if "fold_A" in found else 0
            named += [(f"{layer}.lora_A.weight", "F32", (rank, n)), (f"{layer}.lora_B.weight", "F32", (m, rank))]
        header, layout = tensors.make_header(named)
        with target.open("wb") as out:
            out.write(header)
            for tensor in layout.tensors:
                layer, factor = split_name(tensor.name)
                if layer in layers and factor:
                    out.write(_factor(source, layers[layer], factor).astype(np.float32).tobytes())
                    continue
                for start in range(0, tensor.size_bytes, CHUNK_VALUES * VALUE_BYTES):
                    count = min(CHUNK_VALUES * VALUE_BYTES, tensor.size_bytes - start)
                    out.write(source.read(tensor.name, start, count))
    ranks = {split_name(name)[0]: shape[0] for name, _, shape in named if split_name(name)[1] == "lora_A"}
    _write_ranks(config, ranks=ranks, factor=method.factor)


def _unit(tensor: tensors.TensorSpec) -> tuple[str, bool]:
    layer, factor = split_name(tensor.name)
    return layer, bool(factor)


def _factor(source: TensorFile, found: dict[Factor, tensors.TensorSpec], factor: Factor) -> NDArray:
    def read(name: Factor) -> NDArray:
        tensor = found[name]
        return source.leading(tensor.name, tensor.shape)(0, tensor.elements).reshape(tensor.shape)

    if factor == "lora_A":
        return np.vstack([read(name) for name in ("lora_A", "fold_A") if name in found])
    b = read("lora_B")
    if "lora_R" in found:
        b = b.astype(np.float64) @ read("lora_R")
    return np.hstack([b, read("fold_B")]) if "fold_B" in found else b


def _write_ranks(config: Path, *, ranks: dict[str, int], factor: float) -> None:
    """PEFT multiplies with alpha / rank; alpha follows each layer's rank, so that this is the job's factor."""
    try:
        fields = dict(json.loads(config.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptData("The job's adapter_config.json is missing or no JSON object.") from error
    most = max(ranks.values())
    others = {layer.removeprefix(PREFIX): rank for layer, rank in ranks.items() if rank != most}
    fields |= {
        "r": most,
        "lora_alpha": factor * most,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": {layer: factor * rank for layer, rank in others.items()},
    }
    config.write_text(json.dumps(fields, indent=2, sort_keys=True))
