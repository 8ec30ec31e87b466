"""[aggregation] and [encoding] of a recipe: how updates combine, and how tensors are written for the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protos.recipe_part import Part
from protos.recipe_robust import NotRobust, Robust


class NoServerOptimizer(Part):
    """The mean becomes the next version as it is."""

    type: Literal["none"]


class FedAvgM(Part):
    """Server momentum (Hsu et al. 2019, arXiv:1909.06335): u = momentum u + delta; x += learning_rate u."""

    type: Literal["fedavgm"]
    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedAdam(Part):
    """FedOpt (Reddi et al. 2021, arXiv:2003.00295) with Adam's second moment. No bias correction, as published."""

    type: Literal["fedadam"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class FedYogi(Part):
    """FedOpt (Reddi et al. 2021, arXiv:2003.00295) with Yogi's second moment."""

    type: Literal["fedyogi"]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


class Nesterov(Part):
    """DiLoCo's outer step (Douillard et al. 2023, arXiv:2311.08105): u = momentum u + delta; x += learning_rate (delta
    + momentum u). Its sites train with AdamW, and many steps a round."""

    type: Literal["nesterov"]
    learning_rate: Annotated[float, Field(gt=0)] = 0.7
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


ServerOptimizer = Annotated[NoServerOptimizer | FedAvgM | FedAdam | FedYogi | Nesterov, Field(discriminator="type")]


class Aggregation(Part):
    """How updates combine. LORA_RULES are for LoRA alone: they know that A and B mean their product."""

    # mean      the weighted mean of each tensor (FedAvg, McMahan et al. 2017, arXiv:1602.05629; of A and of B
    #           separately with LoRA: FedIT, Zhang et al. 2023, arXiv:2305.05644, not exact)
    # ffa-lora  A stays as in version 0, B is averaged: exact (Sun et al. 2024, arXiv:2403.12313)
    # rolora    odd rounds train B, even ones A: exact (Chen et al. 2025, arXiv:2502.01755)
    # svd       the mean of the products, cut to the rank again (FlexLoRA, Bai et al. 2024, arXiv:2402.11505, in factor
    #           space as FLoRIST, 2025, arXiv:2506.09199)
    # flora     factors are stacked into what is frozen, and begin anew: exact (Wang et al. 2024, arXiv:2409.05976)
    # fedex     factors are averaged, and what that misses goes into what is frozen: exact (Singhal et al. 2024,
    #           arXiv:2410.09432)
    # fed-sb    only an r x r matrix between fixed A and B is trained: exact (Singhal et al. 2025, arXiv:2502.15436).
    #           A and B span the base weights' leading singular directions, as in LoRA-XS (Balazy et al. 2024,
    #           arXiv:2405.17604), not those of a first gradient, which is what the paper takes
    # fednova   each site's delta by its number of steps, so that who makes more of them does not pull the version to
    #           its own optimum (Wang et al. 2020, arXiv:2007.07481); A and B separately with LoRA
    # scaffold  the mean; each step at a site is corrected by how its gradients differ from those of all sites, for
    #           which a version carries a second tensor of each (Karimireddy et al. 2020, arXiv:1910.06378, option II);
    #           A and B separately with LoRA
    rule: Literal["mean", "ffa-lora", "rolora", "svd", "flora", "fedex", "fed-sb", "fednova", "scaffold"] = "mean"
    weights: Literal["examples", "steps", "equal"] = "examples"
    # No site's share exceeds this part of the whole; the excess goes to the others in proportion.
    max_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # svd: the fewest directions that hold this part of the squared sum are kept, `rank` at most.
    svd_energy: Annotated[float, Field(gt=0, le=1)] = 1.0
    server_optimizer: ServerOptimizer = NoServerOptimizer(type="none")
    # What holds when some updates are wrong; see protos/recipe_robust.py.
    robust: Robust = NotRobust(type="none")
    # Length and direction of every site's update in the record of each round; always where robust is not none.
    report: bool = False

    @property
    def measures_updates(self) -> bool:
        """Whether each round compares the updates with each other, which reads them once more."""
        return self.report or self.robust.type != "none"


# They combine pairs of LoRA factors.
LORA_RULES = ("ffa-lora", "rolora", "svd", "flora", "fedex", "fed-sb")
# They take tensor by tensor, also the factors of a pair.
DRIFT_RULES = ("fednova", "scaffold")
# After such a round a column of A or B no longer stands for what it stood for before.
REBASING_RULES = ("svd", "flora")
# What these cannot put into A and B goes into frozen tensors beside them, of which there are more each round.
FOLDING_RULES = ("flora", "fedex")


class Encoding(Part):
    """How tensors are written for the way up (updates) and down (versions).

    Anything but raw is the difference, up to the version that the round began with and down to version 0, rounded at
    random without bias (bf16), in blocks with a common scale (int8, int4), or cut to its largest directions (svd:
    FedKD, Wu et al. 2022, arXiv:2108.13323).
    """

    up: Literal["raw", "bf16", "int8", "int4", "svd"] = "raw"
    down: Literal["raw", "bf16", "int8", "int4", "svd"] = "raw"
    # What rounding lost is added to the next update of the same site, and to the next version.
    error_feedback: bool = True
    # Values that share a scale.
    block: Literal[32, 64, 128, 256] = 64
    # svd: the part of each matrix's squared sum that is kept, in the first round and in the last.
    svd_energy_start: Annotated[float, Field(gt=0, le=1)] = 0.95
    svd_energy_end: Annotated[float, Field(gt=0, le=1)] = 0.98

    @model_validator(mode="after")
    def _energy_of_what(self) -> Encoding:
        if "svd" not in (self.up, self.down) and (self.svd_energy_start, self.svd_energy_end) != (0.95, 0.98):
            raise ValueError("svd_energy_start and svd_energy_end go with up or down = 'svd'")
        return self

    def energy(self, *, round_number: int, rounds: int) -> float:
        """What svd keeps in round 1 .. rounds."""
        part = (round_number - 1) / (rounds - 1) if rounds > 1 else 0.0
        return self.svd_energy_start + (self.svd_energy_end - self.svd_energy_start) * part
