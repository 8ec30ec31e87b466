"""What all tables of a recipe have in common: an unknown key fails, a number is finite, nothing changes afterwards."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from protos.identity import NAME

SiteName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/\-]{0,127}$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
