"""The file of a new version, hashed as it is written."""

from __future__ import annotations

import os
from pathlib import Path

from protos import tensors
from protos.digests import new_hasher
from protos.encodings import Named
from protos.errors import Internal


class Output:
    """Its header is known, or follows from what was written."""

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
