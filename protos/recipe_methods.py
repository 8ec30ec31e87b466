"""[base_model] and [method] of a recipe: what is frozen, and what is trained and travels."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from protos.digests import DIGEST
from protos.recipe_part import Name, Part, SiteName


class BaseModelRef(Part):
    """The frozen starting point. Without a digest the first site to build version 0 pins its own for all others."""

    name: Name
    digest: Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")] | None = None
    # Keep only the first n encoder layers.
    layers: Annotated[int, Field(ge=1, le=1000)] | None = None
    # Which revision of a hub repository the name stands for; the digest is what counts.
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/\-]{0,127}$")] | None = None
    # Frozen weights in 4 or 8 bits (bitsandbytes; QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quantization: bool = False
    # How frozen weights lie in memory. What is trained is float32 everywhere.
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "eager", "sdpa", "flash"] = "auto"

    @model_validator(mode="after")
    def _double_what(self) -> BaseModelRef:
        if self.double_quantization and self.quantization not in ("nf4", "fp4"):
            raise ValueError("double_quantization goes with quantization nf4 or fp4")
        return self


class Full(Part):
    """Every weight is federated, except the embeddings where they are frozen."""

    type: Literal["full"]
    freeze_embeddings: bool = False


class Lora(Part):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) and the task's head are federated."""

    type: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Names of the linear layers that get an adapter, as PEFT understands them.
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("query", "value")
    # What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
    # A site of a lower rank has the same scale, that of `rank`, so that its factors mean the same as the others'.
    scale: Literal["alpha/rank", "rslora"] = "alpha/rank"
    # Sites that train fewer than `rank` columns: {site: columns}.
    ranks: dict[SiteName, Annotated[int, Field(ge=1, le=1024)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ranks_are_lower(self) -> Lora:
        for site, rank in self.ranks.items():
            if rank > self.rank:
                raise ValueError(f"ranks gives {site} {rank}, more than rank = {self.rank}")
        return self

    @property
    def factor(self) -> float:
        """What B A is multiplied with, at every site."""
        return self.alpha / (self.rank if self.scale == "alpha/rank" else math.sqrt(self.rank))


Method = Annotated[Full | Lora, Field(discriminator="type")]
