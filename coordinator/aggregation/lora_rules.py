"""How the LoRA pairs of one layer combine: pure functions over the sites' factors, in float64.

A site's adapter stands for B A [m, n] (with fed-sb B R A), all with one common scale, and the mean that is wanted is
sum p_k B_k A_k. The mean of the factors is another matrix: what it misses is sum p_k (B_k - B)(A_k - A), which is zero
when the sites have one factor in common. Each rule deals with that in its own way:

    average   mean     each factor by itself (FedIT, Zhang et al. 2023, arXiv:2305.05644); not exact
              ffa-lora, rolora, fed-sb     one factor is common or fixed in the round, so the same is exact
              (Sun et al. 2024, arXiv:2403.12313; Chen et al. 2025, arXiv:2502.01755; Singhal et al. 2025,
              arXiv:2502.15436)
    reproject svd      the best approximation of rank r (FlexLoRA, Bai et al. 2024, arXiv:2402.11505; in factor space
              and with an energy threshold as FLoRIST, 2025, arXiv:2506.09199)
    stack     flora    all of it goes into the fold, and the pair begins anew (Wang et al. 2024, arXiv:2409.05976)
    residual  fedex    as mean, and what that misses goes into the fold (Singhal et al. 2024, arXiv:2410.09432)

A site of lower rank has the leading columns of B and rows of A. Where factors are averaged, each column is averaged
over the sites that train it, so that those who do not have it cannot dilute it. Where products are averaged, a site's
other columns count too, at what the round began with: they were frozen there, and part of its model (see
client_agent/training/adapters.py).

No m x n matrix is ever made: a sum of products is kept as factors, [p_1 B_1 ... p_K B_K] [A_1; ...; A_K], and only when
these have as many columns as the smaller of m and n, so that they are the larger of the two, are they multiplied.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.adapters import Factor

Matrix = NDArray[np.float64]
# Factors of a layer by name, "lora_A" ...; of a site only what it trained.
Factors = Mapping[Factor, Matrix]

# Against the norm of the wanted mean. Weights come in float32: what is smaller than this is their rounding.
NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Product:
    """The matrix `b` @ `a`, [m, p] and [p, n]: never multiplied out."""

    b: Matrix
    a: Matrix

    @property
    def rank(self) -> int:
        """Columns of `b`; the matrix itself may have a lower rank."""
        return self.b.shape[1]

    def plus(self, other: Product, *, times: float = 1.0) -> Product:
        return Product(np.hstack([self.b, times * other.b]), np.vstack([self.a, other.a]))

    def squared_norm(self) -> float:
        """Frobenius, squared: tr(A' B' B A) = sum of (B' B) * (A A')."""
        return max(0.0, float(np.sum((self.b.T @ self.b) * (self.a @ self.a.T))))


@dataclass(frozen=True)
class Outcome:
    """What a rule makes of a layer: its factors in the next version, and what is added to its fold (or nothing)."""

    factors: Factors
    added: Product | None = None


def average(sites: Sequence[Factors], *, weights: Sequence[float], old: Factors) -> Outcome:
    """Each factor that was trained becomes its weighted mean; the others stay."""
    factors = dict(old)
    for factor in old:
        parts = [site[factor] for site in sites if factor in site]
        if parts:
            factors[factor] = leading_mean(parts, weights=weights, old=old[factor])
    return Outcome(factors)


def reproject(wanted: Product, *, old: Factors, energy: float, seed: Sequence[int]) -> Outcome:
    """The leading directions of the mean, as many as hold `energy` of its squared norm and as the pair has room for.

    What is left of the pair begins anew, B at zero, so that it can still be trained. B and A share the singular values:
    a site of lower rank has the leading ones.
    """
    rank = len(old["lora_A"])
    kept = compress(wanted, rank=rank, energy=energy, negligible=NEGLIGIBLE * math.sqrt(wanted.squared_norm()))
    a = fresh_a(old["lora_A"].shape, seed=seed)
    b = np.zeros_like(old["lora_B"])
    a[: kept.rank], b[:, : kept.rank] = kept.a, kept.b
    return Outcome({**old, "lora_A": a, "lora_B": b})


def stack(wanted: Product, *, old: Factors, seed: Sequence[int]) -> Outcome:
    """All of the mean goes into the fold; the pair begins anew as in version 0: A random, B zero."""
    # Columns that nobody trained are still zero.
    trained = np.any(wanted.b != 0, axis=0)
    added = Product(wanted.b[:, trained], wanted.a[trained])
    a = fresh_a(old["lora_A"].shape, seed=seed)
    return Outcome({**old, "lora_A": a, "lora_B": np.zeros_like(old["lora_B"])}, added if added.rank else None)


def residual(
    wanted: Product, *, sites: Sequence[Factors], weights: Sequence[float], old: Factors
) -> Outcome:  # fmt: skip
    """The mean of the factors; what it misses of the wanted mean goes into the fold, in as few columns as it has."""
    factors = average(sites, weights=weights, old=old).factors
    missed = wanted.plus(standing(factors), times=-1.0)
    added = compress(missed, rank=missed.rank, negligible=NEGLIGIBLE * math.sqrt(wanted.squared_norm()))
    return Outcome(factors, added if added.rank else None)


def wanted_mean(
    sites: Sequence[Factors], *, weights: Sequence[float], old: Factors, by_column: bool
) -> Product:  # fmt: skip
    """sum p_k B_k A_k: over the sites' completed pairs, or each column over the sites that train it.

    The first is the mean of the sites' models. The second is what a rule aims at that averages columns: the same where
    all ranks are equal, else with weights p_k / sum of p over those who train the column.
    """
    if any(len(site) == 1 for site in sites):
        # One factor alone was trained, and the product is linear in it.
        return standing(average(sites, weights=weights, old=old).factors)
    if not by_column:
        pairs = [{factor: _completed(site[factor], old[factor]) for factor in site} for site in sites]
        parts = [Product(weight * pair["lora_B"], pair["lora_A"]) for weight, pair in zip(weights, pairs, strict=True)]
    else:
        ranks = [len(site["lora_A"]) for site in sites]
        share = np.zeros(len(old["lora_A"]))
        for weight, rank in zip(weights, ranks, strict=True):
            share[:rank] += weight
        parts = [
            Product(site["lora_B"] * (weight / share[:rank]), site["lora_A"])
            for site, weight, rank in zip(sites, weights, ranks, strict=True)
        ]
        parts.append(Product(old["lora_B"][:, max(ranks) :], old["lora_A"][max(ranks) :]))
    return Product(np.hstack([part.b for part in parts]), np.vstack([part.a for part in parts]))


def standing(factors: Factors) -> Product:
    """What a pair stands for, but for the common scale."""
    b = factors["lora_B"]
    return Product(b @ factors["lora_R"] if "lora_R" in factors else b, factors["lora_A"])


def leading_mean(parts: Sequence[Matrix], *, weights: Sequence[float], old: Matrix) -> Matrix:
    """The weighted mean of leading parts of a factor, each element over the sites that have it.

    Filling up with zeros, or with old values, would thin out what few sites train. Elements that no site has stay.
    """
    # -0.0, because adding to it changes no bit, not even that of a -0.0.
    total, share = np.full_like(old, -0.0), np.zeros_like(old)
    for part, weight in zip(parts, weights, strict=True):
        here = tuple(slice(size) for size in part.shape)
        total[here] += weight * part
        share[here] += weight
    whole = share.flat[0]
    np.divide(total, share, out=total, where=(share != whole) & (share > 0))
    return np.where(share > 0, total, old)


def compress(product: Product, *, rank: int, energy: float = 1.0, negligible: float = 0.0) -> Product:
    """The best approximation of a product with at most `rank` columns (Eckart and Young 1936), fewest first.

    Directions whose singular value is `negligible` or less are left out, and those beyond `energy` of the squared norm.
    By QR of both factors and the SVD of the small core between them. Signs are fixed, so that it repeats bit for bit:
    the largest element of each column of B is positive.
    """
    m, n = len(product.b), product.a.shape[1]
    if product.rank >= min(m, n):
        u, s, vt = np.linalg.svd(product.b @ product.a, full_matrices=False)
    else:
        qb, rb = np.linalg.qr(product.b)
        qa, ra = np.linalg.qr(product.a.T)
        u, s, vt = np.linalg.svd(rb @ ra.T)
        u, vt = qb @ u, vt @ qa.T
    squares = np.cumsum(s * s)
    enough = int(np.searchsorted(squares, energy * squares[-1])) + 1 if energy < 1 else len(s)
    kept = min(rank, enough, int(np.count_nonzero(s > negligible)))
    u, vt, root = u[:, :kept], vt[:kept], np.sqrt(s[:kept])
    signs = np.where(np.take_along_axis(u, np.argmax(np.abs(u), axis=0)[None], axis=0) < 0, -1.0, 1.0)
    return Product(u * (signs * root), vt * (signs.T * root[:, None]))


def fresh_a(shape: tuple[int, ...], *, seed: Sequence[int]) -> Matrix:
    """A as PEFT begins it: uniform within 1 / sqrt(n), which is its kaiming_uniform_(a=sqrt(5))."""
    bound = 1 / math.sqrt(shape[1])
    return np.random.default_rng(list(seed)).uniform(-bound, bound, shape)


def layer_seed(job_seed: int, *, round_number: int, layer: str) -> list[int]:
    """For what begins anew after a round."""
    name = int.from_bytes(hashlib.sha256(layer.encode()).digest()[:8], "big")
    return [job_seed, round_number, name]


def _completed(part: Matrix, old: Matrix) -> Matrix:
    if part.shape == old.shape:
        return part
    whole = old.copy()
    whole[tuple(slice(size) for size in part.shape)] = part
    return whole
