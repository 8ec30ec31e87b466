"""[aggregation] and [encoding] of a recipe: how updates combine, and how tensors are written for the way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protos.recipe_part import Part


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


ServerOptimizer = Annotated[NoServerOptimizer | FedAvgM | FedAdam | FedYogi, Field(discriminator="type")]


class Aggregation(Part):
    """How updates combine. All but "mean" are for LoRA: they know that A and B mean their product (see RULES)."""

    # mean      the weighted mean of each tensor (FedAvg, McMahan et al. 2017, arXiv:1602.05629; of A and of B
    #           separately with LoRA: FedIT, Zhang et al. 2023, arXiv:2305.05644, not exact)
    # ffa-lora  A stays as in version 0, B is averaged: exact (Sun et al. 2024, arXiv:2403.12313)
    # rolora    odd rounds train B, even ones A: exact (Chen et al. 2025, arXiv:2502.01755)
    # svd       the mean of the products, cut to the rank again (FlexLoRA, Bai et al. 2024, arXiv:2402.11505, in factor
    #           space as FLoRIST, 2025, arXiv:2506.09199)
    # flora     factors are stacked into what is frozen, and begin anew: exact (Wang et al. 2024, arXiv:2409.05976)
    # fedex     factors are averaged, and what that misses goes into what is frozen: exact (Singhal et al. 2024,
    #           arXiv:2410.09432)
    # fed-sb    only an r x r matrix between fixed A and B is trained: exact (Singhal et al. 2025, arXiv:2502.15436)
    rule: Literal["mean", "ffa-lora", "rolora", "svd", "flora", "fedex", "fed-sb"] = "mean"
    weights: Literal["examples", "steps", "equal"] = "examples"
    # No site's share exceeds this part of the whole; the excess goes to the others in proportion.
    max_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # svd: the fewest directions that hold this part of the squared sum are kept, `rank` at most.
    svd_energy: Annotated[float, Field(gt=0, le=1)] = 1.0
    server_optimizer: ServerOptimizer = NoServerOptimizer(type="none")


# After such a round a column of A or B no longer stands for what it stood for before.
REBASING_RULES = ("svd", "flora")
# What these cannot put into A and B goes into frozen tensors beside them, of which there are more each round.
FOLDING_RULES = ("flora", "fedex")


class Encoding(Part):
    """How tensors are written for the way up (updates) and down (versions).

    Anything but raw is the difference, up to the version that the round began with and down to version 0, rounded at
    random without bias (bf16) or in blocks with a common scale (int8, int4).
    """

    up: Literal["raw", "bf16", "int8", "int4"] = "raw"
    down: Literal["raw", "bf16", "int8", "int4"] = "raw"
    # What rounding lost is added to the next update of the same site, and to the next version.
    error_feedback: bool = True
    # Values that share a scale.
    block: Literal[32, 64, 128, 256] = 64
