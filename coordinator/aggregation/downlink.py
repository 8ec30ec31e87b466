"""The way down: a new version as a rounded difference from version 0, which every site makes by itself.

The version that is committed is what comes out of that difference, so that the coordinator, who keeps it, and the
sites, who rebuild it, have the same bits. What rounding lost belongs to the version, like the server optimizer's state,
and is added to the next one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordinator.aggregation.reading import digest_of_file
from protos.adapters import moving
from protos.encoded_files import TensorFile, rebuild, write_encoded
from protos.errors import CorruptData
from protos.jobspec import JobSpec


def round_version(
    version: Path,
    *,
    spec: JobSpec,
    round_number: int = 1,
    initial: str,
    initial_digest: str,
    seed: int,
    encoded: str,
    residual: str = "",
    residual_digest: str = "",
    residual_output: str = "",
) -> dict[str, Any]:
    """Replaces the file `version` by what sites make of it, and writes to `encoded` what they get. All are paths.

    {"digest", "encoded_digest", "encoded_size", "residual_digest"}. CorruptData: version 0 or the residual of the
    version before do not match their digests. Without `residual_output` what rounding loses is lost.
    """
    for path, digest, what in ((initial, initial_digest, "Version 0"), (residual, residual_digest, "The residual")):
        if path and digest_of_file(Path(path)) != digest:
            raise CorruptData(f"{what} of the job no longer matches its digest.")
    with TensorFile(version) as new:
        moved, way = moving(spec, new.layout.named), spec.encoding
        write_encoded(
            lambda name: new.leading(name, new.shape(name)),
            tensors=moved,
            base=Path(initial),
            encoding=way.down,
            block=way.block,
            seed=seed,
            output=Path(encoded),
            before=Path(residual) if residual else None,
            residual=Path(residual_output) if residual_output else None,
            energy=way.energy(round_number=round_number, rounds=spec.rounds),
        )
    made = rebuild(
        Path(encoded), base=Path(initial), encoding=way.down, block=way.block, output=version, tensors=moved
    )  # fmt: skip
    return {
        "digest": made,
        "encoded_digest": digest_of_file(Path(encoded)),
        "encoded_size": Path(encoded).stat().st_size,
        "residual_digest": digest_of_file(Path(residual_output)) if residual_output else "",
    }
