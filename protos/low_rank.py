"""A matrix as the product of two thin ones, cut from its singular value decomposition (FedKD, Wu et al. 2022,
arXiv:2108.13323): as few directions as hold a part of the squared sum.

The factors of a [P, Q] matrix are one array [K, P + Q]: row k is sqrt(s_k) u_k, then sqrt(s_k) v_k. Where they would be
as large as the matrix, the matrix itself is written. Each rebuilt value is added up in the order of the rows, product
by product, so that it has the same bits on every machine and however much of the matrix is asked for. The decomposition
itself is a library's: its last bits may differ between machines, and what it gets wrong is in the residual.
"""

from __future__ import annotations

import numpy as np

from protos.encodings import may_be_cut
from protos.errors import UpdateRejected
from protos.rounding import Values, check_sane


def cut(matrix: Values, *, energy: float, name: str) -> Values | None:
    """The factors [K, P + Q] of the fewest directions that hold `energy` of the squared sum of `matrix` [P, Q].

    A matrix of zeros has none: K = 0. None where factors are no smaller than the matrix. UpdateRejected: a value is not
    finite, or absurdly large, or the library's decomposition did not converge.
    """
    check_sane(np.abs(matrix).max(initial=0), name=name)
    if not may_be_cut(matrix.shape, rank=1):
        return None
    if not matrix.any():
        return np.zeros((0, sum(matrix.shape)), dtype=np.float32)
    try:
        left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise UpdateRejected(
            f"Tensor {name!r} could not be cut to its largest directions: {error}.",
            hint="Another encoding than svd takes it as it is.",
        ) from error
    held = np.cumsum(sizes.astype(np.float64) ** 2)
    rank = min(int(np.searchsorted(held / held[-1], energy)) + 1, len(sizes))
    if not may_be_cut(matrix.shape, rank=rank):
        return None
    roots = np.sqrt(sizes[:rank])[:, None]
    return np.concatenate([roots * left[:, :rank].T, roots * right[:rank]], axis=1).astype(np.float32, copy=False)


def product(factors: Values, *, rows: int, first: int, last: int) -> Values:
    """The values first .. last, row-major, of the matrix of `rows` rows that the factors [K, P + Q] stand for.

    What was damaged may be rebuilt to anything.
    """
    left, right = factors[:, :rows], factors[:, rows:]
    columns = right.shape[1]
    top, bottom = first // columns, -(-last // columns)
    total = np.zeros((bottom - top, columns), dtype=np.float32)
    term = np.empty_like(total)
    with np.errstate(invalid="ignore", over="ignore"):
        for one, other in zip(left[:, top:bottom], right, strict=True):
            np.multiply(one[:, None], other, out=term)
            total += term
    return total.reshape(-1)[first - top * columns : last - top * columns]
