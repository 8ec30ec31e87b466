"""A round's LoRA layers, one after the other: the job's rule for each, its fold, and what the rule missed in all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.aggregation import lora_rules
from coordinator.aggregation.lora_rules import Factors, Matrix, Outcome, Product
from protos.adapters import Factor, trained_factors
from protos.jobspec import FOLDING_RULES, JobSpec

# Those that take the mean of the products itself, not of factors.
PRODUCT_RULES = ("svd", "flora", "fedex")


@dataclass
class Layers:
    """`weights` are the sites', in the order in which `combine` takes their factors; they sum to 1."""

    spec: JobSpec
    round_number: int
    weights: Sequence[float]
    # Squared, over the layers so far: the wanted mean, and what the new version misses of it.
    _wanted: float = 0.0
    _missed: float = 0.0
    _fold_rank: int = 0

    @property
    def trained(self) -> frozenset[Factor]:
        return trained_factors(self.spec, round_number=self.round_number)

    @property
    def grows(self) -> bool:
        """Whether the new version may have other shapes than the last one."""
        return self.spec.aggregation.rule in FOLDING_RULES

    @property
    def metrics(self) -> dict[str, float]:
        """aggregation_error: ||wanted - got|| / ||wanted||, Frobenius, over all pairs. fold_rank: the largest fold's.

        Wanted is the mean of the products B A (see lora_rules.wanted_mean), and got what the new version has in its
        place before any server optimizer. Where a rule is exact, rounding leaves some 1e-8.
        """
        error = math.sqrt(self._missed / self._wanted) if self._wanted else 0.0
        return {"aggregation_error": error, **({"fold_rank": float(self._fold_rank)} if self._fold_rank else {})}

    def combine(self, layer: str, *, sites: Sequence[Factors], old: Factors) -> dict[Factor, Matrix]:
        """All factors of a layer in the next version; `old` are those of the last one, `sites` what each has trained.

        Float64. The fold grows by what the rule adds to it; once it has more columns than the layer's matrix could
        need, it is written in as many as that without loss.
        """
        pair = {factor: old[factor] for factor in old if not factor.startswith("fold")}
        by_column = self.spec.aggregation.rule not in PRODUCT_RULES
        wanted = lora_rules.wanted_mean(sites, weights=self.weights, old=pair, by_column=by_column)
        outcome = self._apply_rule(layer, wanted=wanted, sites=sites, old=pair)
        got = lora_rules.standing(outcome.factors)
        fold = Product(old["fold_B"], old["fold_A"]) if "fold_A" in old else None
        if outcome.added is not None:
            got = got.plus(outcome.added)
            fold = outcome.added if fold is None else fold.plus(outcome.added)
        self._wanted += wanted.squared_norm()
        self._missed += wanted.plus(got, times=-1.0).squared_norm()
        factors = dict(outcome.factors)
        if fold is not None:
            most = min(len(fold.b), fold.a.shape[1])
            if fold.rank > most:
                fold = lora_rules.compress(fold, rank=most)
            factors |= {"fold_A": fold.a, "fold_B": fold.b}
            self._fold_rank = max(self._fold_rank, fold.rank)
        return factors

    def _apply_rule(self, layer: str, *, wanted: Product, sites: Sequence[Factors], old: Factors) -> Outcome:
        seed = lora_rules.layer_seed(self.spec.seed, round_number=self.round_number, layer=layer)
        match self.spec.aggregation.rule:
            case "svd":
                return lora_rules.reproject(wanted, old=old, energy=self.spec.aggregation.svd_energy, seed=seed)
            case "flora":
                return lora_rules.stack(wanted, old=old, seed=seed)
            case "fedex":
                return lora_rules.residual(wanted, sites=sites, weights=self.weights, old=old)
        return lora_rules.average(sites, weights=self.weights, old=old)
