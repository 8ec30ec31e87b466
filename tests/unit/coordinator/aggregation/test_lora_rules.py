"""The LoRA rules against dense linear algebra: exact where theory says so, best possible where not, never m x n."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.layers import Layers
from coordinator.aggregation.lora_rules import Product, compress, leading_mean
from protos.adapters import cut_shape, trained_factors
from protos.jobspec import JobSpec, parse

OUT, IN, RANK = 30, 40, 6
RANKS = [6, 2, 4, 6]
EXACT = ["ffa-lora", "rolora", "flora", "fedex", "fed-sb"]


def spec_of(rule: str, *, rank: int = RANK, **aggregation: Any) -> JobSpec:
    return parse(
        {
            "name": "rules",
            "task": {"type": "synthetic"},
            "method": {"type": "lora", "rank": rank},
            "local": {"steps": 1},
            "rounds": 4,
            "seed": 3,
            "aggregation": {"rule": rule, **aggregation},
        }
    )


def old_factors(rule: str, *, rng: np.random.Generator, shape: tuple[int, int] = (OUT, IN), rank: int = RANK) -> dict:
    old = {"lora_A": rng.standard_normal((rank, shape[1])), "lora_B": rng.standard_normal((shape[0], rank))}
    if rule == "flora":
        old["lora_B"][:] = 0
    if rule == "fed-sb":
        old["lora_R"] = rng.standard_normal((rank, rank))
    return old


def trained_at(
    spec: JobSpec, old: dict, *, ranks: list[int], round_number: int, rng: np.random.Generator
) -> list[dict]:
    """What sites of these ranks might send: the leading part of what the round trains, moved at random."""
    sites = []
    for rank in ranks:
        site = {}
        for factor in trained_factors(spec, round_number=round_number):
            part = old[factor][tuple(slice(n) for n in cut_shape(old[factor].shape, factor=factor, rank=rank))]
            site[factor] = part + rng.standard_normal(part.shape)
        sites.append(site)
    return sites


def dense(factors: dict) -> np.ndarray:
    b = factors["lora_B"] @ factors["lora_R"] if "lora_R" in factors else factors["lora_B"]
    fold = factors["fold_B"] @ factors["fold_A"] if "fold_A" in factors else 0
    return b @ factors["lora_A"] + fold


def dense_mean(sites: list[dict], weights: np.ndarray, old: dict) -> np.ndarray:
    """sum p_k B_k A_k, with what a site did not train as it was."""
    total = np.zeros((OUT, IN))
    for site, weight in zip(sites, weights, strict=True):
        whole = {factor: matrix.copy() for factor, matrix in old.items()}
        for factor, part in site.items():
            whole[factor][tuple(slice(n) for n in part.shape)] = part
        total += weight * dense(whole)
    return total


def dense_mean_by_column(sites: list[dict], weights: np.ndarray, old: dict) -> np.ndarray:
    """The same, but each column over the sites that train it, and from the last version where none does."""
    total = np.zeros((OUT, IN))
    for column in range(RANK):
        having = [k for k, site in enumerate(sites) if column < len(site["lora_A"])]
        if not having:
            total += np.outer(old["lora_B"][:, column], old["lora_A"][column])
        for k in having:
            share = weights[k] / sum(weights[other] for other in having)
            total += share * np.outer(sites[k]["lora_B"][:, column], sites[k]["lora_A"][column])
    return total


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("round_number", [1, 2])
@pytest.mark.parametrize("rule", EXACT)
def test_an_exact_rule_gives_the_mean_of_the_products(rule: str, round_number: int, seed: int) -> None:
    rng, spec = np.random.default_rng(seed), spec_of(rule)
    ranks = RANKS if rule in ("flora", "fedex") else [RANK] * 4
    weights = rng.dirichlet(np.ones(4))
    old = old_factors(rule, rng=rng)
    sites = trained_at(spec, old, ranks=ranks, round_number=round_number, rng=rng)
    layers = Layers(spec, round_number, weights)
    new = layers.combine("layer", sites=sites, old=old)
    assert relative(dense(new), dense_mean(sites, weights, old)) < 1e-5
    assert layers.metrics["aggregation_error"] < 1e-6


@pytest.mark.parametrize("rule", ["mean", "ffa-lora", "rolora", "fed-sb"])
def test_with_mixed_ranks_each_column_is_the_mean_over_the_sites_that_train_it(rule: str) -> None:
    rng, spec = np.random.default_rng(5), spec_of(rule)
    ranks, weights = [2, 1, 4], np.array([0.5, 0.2, 0.3])
    old = old_factors(rule, rng=rng)
    sites = trained_at(spec, old, ranks=ranks, round_number=1, rng=rng)
    layers = Layers(spec, 1, weights)
    new = layers.combine("layer", sites=sites, old=old)
    assert (layers.metrics["aggregation_error"] < 1e-6) == (rule != "mean")
    for factor, matrix in old.items():
        for place in np.ndindex(matrix.shape):
            having = [
                k for k, site in enumerate(sites) if factor in site and np.all(np.array(place) < site[factor].shape)
            ]
            share = sum(weights[k] for k in having)
            wanted = sum(weights[k] * sites[k][factor][place] for k in having) / share if having else matrix[place]
            assert new[factor][place] == pytest.approx(wanted, rel=1e-12)


def test_the_svd_of_enough_rank_is_exact_and_of_less_the_best_that_a_dense_one_finds() -> None:
    rng = np.random.default_rng(1)
    for rank, ranks, exact in ((RANK, [1, 2, 1], False), (24, [6, 6, 6, 6], True)):
        spec = spec_of("svd", rank=rank)
        weights = rng.dirichlet(np.ones(len(ranks)))
        old = old_factors("svd", rng=rng, rank=rank)
        if exact:
            # Nobody has more than six columns: four sites' fit.
            old["lora_B"][:, 6:] = 0
        sites = trained_at(spec, old, ranks=ranks, round_number=1, rng=rng)
        wanted = dense_mean(sites, weights, old)
        layers = Layers(spec, 1, weights)
        found = dense(layers.combine("layer", sites=sites, old=old))
        u, s, vt = np.linalg.svd(wanted)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert relative(found, best) < 1e-5
        assert layers.metrics["aggregation_error"] == pytest.approx(relative(best, wanted), abs=1e-6)
        assert (layers.metrics["aggregation_error"] < 1e-6) == exact


def test_a_column_of_the_svd_that_holds_nothing_begins_anew() -> None:
    rng, spec = np.random.default_rng(2), spec_of("svd", svd_energy=0.9)
    old = old_factors("svd", rng=rng)
    left, right = np.linalg.qr(rng.standard_normal((OUT, 3)))[0], np.linalg.qr(rng.standard_normal((IN, 3)))[0]
    site = {"lora_B": np.zeros((OUT, RANK)), "lora_A": np.zeros((RANK, IN))}
    # Shares of the squared norm: 80, 15 and 5 %.
    site["lora_B"][:, :3], site["lora_A"][:3] = left * np.sqrt([0.8, 0.15, 0.05]), right.T
    layers = Layers(spec, 1, [1.0])
    new = layers.combine("layer", sites=[site], old=old)
    assert np.count_nonzero(np.any(new["lora_B"] != 0, axis=0)) == 2
    assert np.all(np.any(new["lora_A"] != 0, axis=1))
    assert layers.metrics["aggregation_error"] == pytest.approx(np.sqrt(0.05))


@pytest.mark.parametrize("ranks", [[6, 6, 6, 6], [3, 2, 4, 3]])
def test_the_error_of_the_mean_is_that_of_dense_matrices(ranks: list[int]) -> None:
    rng, spec = np.random.default_rng(4), spec_of("mean")
    weights = rng.dirichlet(np.ones(4))
    layers, missed, wanted = Layers(spec, 1, weights), 0.0, 0.0
    for layer in ("first", "second"):
        old = old_factors("mean", rng=rng)
        sites = trained_at(spec, old, ranks=ranks, round_number=1, rng=rng)
        new = layers.combine(layer, sites=sites, old=old)
        exact = dense_mean_by_column(sites, weights, old)
        if ranks[0] == RANK:
            assert relative(exact, dense_mean(sites, weights, old)) < 1e-9
        missed += np.linalg.norm(dense(new) - exact) ** 2
        wanted += np.linalg.norm(exact) ** 2
    assert layers.metrics["aggregation_error"] == pytest.approx(np.sqrt(missed / wanted), rel=1e-9)
    assert layers.metrics["aggregation_error"] > 0.1


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_fold_grows_until_it_holds_any_matrix_and_stays_exact(rule: str) -> None:
    rng, spec, weights = np.random.default_rng(6), spec_of(rule), np.array([0.6, 0.4])
    old = old_factors(rule, rng=rng)
    sizes = []
    for round_number in range(1, 6):
        sites = trained_at(spec, old, ranks=[6, 5], round_number=round_number, rng=rng)
        wanted = dense_mean(sites, weights, old)
        layers = Layers(spec, round_number, weights)
        old = layers.combine("layer", sites=sites, old=old)
        assert relative(dense(old), wanted) < 1e-9
        sizes.append(layers.metrics["fold_rank"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1]
    assert sizes[-1] == min(OUT, IN)


@pytest.mark.parametrize("rule", ["svd", "flora"])
def test_what_begins_anew_follows_from_the_seed_the_round_and_the_layer(rule: str) -> None:
    rng = np.random.default_rng(7)
    old = old_factors(rule, rng=rng)
    old["lora_B"][:] = 0
    # Nothing was learnt, so all of A begins anew.
    sites = [{factor: old[factor].copy() for factor in ("lora_A", "lora_B")}]

    def new_a(round_number: int, layer: str) -> np.ndarray:
        return Layers(spec_of(rule), round_number, [1.0]).combine(layer, sites=sites, old=old)["lora_A"]

    assert np.array_equal(new_a(1, "one"), new_a(1, "one"))
    assert not np.array_equal(new_a(1, "one"), new_a(2, "one"))
    assert not np.array_equal(new_a(1, "one"), new_a(1, "two"))


@pytest.mark.parametrize("rule", ["mean", "fedex"])
def test_one_site_alone_comes_back_bit_for_bit_and_leaves_no_fold(rule: str) -> None:
    rng = np.random.default_rng(8)
    old = old_factors(rule, rng=rng)
    [site] = trained_at(spec_of(rule), old, ranks=[RANK], round_number=1, rng=rng)
    site["lora_B"][0, 0] = -0.0
    new = Layers(spec_of(rule), 1, [1.0]).combine("layer", sites=[site], old=old)
    assert new.keys() == site.keys()
    assert all(new[factor].tobytes() == site[factor].tobytes() for factor in site)


def test_signs_do_not_depend_on_those_of_the_factors() -> None:
    rng = np.random.default_rng(9)
    b, a = rng.standard_normal((OUT, 4)), rng.standard_normal((4, IN))
    one, other = compress(Product(b, a), rank=4), compress(Product(-b, -a), rank=4)
    assert np.allclose(one.b, other.b)
    assert np.allclose(one.a, other.a)


def test_means_of_leading_parts_leave_the_rest() -> None:
    old = np.arange(6.0).reshape(2, 3)
    new = leading_mean([np.full((2, 1), 4.0), np.full((2, 2), 8.0)], weights=[0.25, 0.75], old=old)
    assert new.tolist() == [[7, 8, 2], [7, 8, 5]]


@pytest.mark.parametrize("rule", ["mean", "ffa-lora", "rolora", "svd", "flora", "fedex", "fed-sb"])
def test_no_matrix_of_the_layer_s_own_size_is_ever_made(rule: str) -> None:
    size, rank = 4096, 8
    rng, spec = np.random.default_rng(0), spec_of(rule, rank=rank)
    old = old_factors(rule, rng=rng, shape=(size, size), rank=rank)
    sites = trained_at(spec, old, ranks=[rank, rank, 4], round_number=1, rng=rng)
    tracemalloc.start()
    Layers(spec, 1, [0.5, 0.25, 0.25]).combine("layer", sites=sites, old=old)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Factors of all sites, some times over: a fifth of one float64 matrix of the layer's size.
    assert peak < size * size * 8 / 5
