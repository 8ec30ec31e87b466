"""SCAFFOLD's control variates: the mean gradient of all sites, from what each site has trained.

With x and c of the version before, and x_k what site k made of x in tau_k steps of the round's learning rate:

    d_k = (x - x_k) / (tau_k learning_rate)              the mean of the site's corrected gradients g - c_k + c
    c  <- c + |S| / N sum p_k (d_k - c)

A site's own c_k becomes c_k - c + d_k (client_agent/training/drift.py), so with equal p_k this is c + |S| / N mean
(c_k+ - c_k): Karimireddy et al. 2020 (arXiv:1910.06378), option II. As d_k follows from what travels anyway, c travels
down only, and no site can claim another one than it trained with. |S| / N, the part of all sites that is in the round,
is in the `control_weight` of each; p_k need not be equal where everyone is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.adapters import CONTROL
from protos.encoded_files import TensorFile


@dataclass(frozen=True)
class Controls:
    """`scales` are control_weight / (tau_k learning_rate) of each update, `kept` is 1 less the sum of control weights.

    The files are read where a control's own tensor lies, beside the readers of `combine`, which take their digests.
    """

    base: TensorFile
    updates: Sequence[TensorFile]
    scales: Sequence[float]
    kept: float

    def block(self, name: str, start: int, count: int, *, old: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values start .. start + count of the control tensor `name` in the next version; `old` are those of now."""
        of = name.removeprefix(CONTROL)
        new = self.kept * old
        before = self._values(self.base, of, start, count)
        for update, scale in zip(self.updates, self.scales, strict=True):
            new += scale * (before - self._values(update, of, start, count))
        return new

    @staticmethod
    def _values(file: TensorFile, name: str, start: int, count: int) -> NDArray[np.float64]:
        return file.leading(name, file.shape(name))(start, count).astype(np.float64)
