"""What a checkpoint's manifest.json holds, checked. Apart, so that training imports without pydantic."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_NAME = r"^rank-\d{5,}\.safetensors$"  # no separator, no "..": a manifest can't name anything outside of its folder


class File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """sha256: of all the other fields, as JSON with its keys sorted."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal[1]
    phase: str
    step: Annotated[int, Field(ge=0)]
    ranks: Annotated[int, Field(ge=1)]
    values: dict[str, Any]
    files: dict[Annotated[str, Field(pattern=_NAME)], File]
    sha256: str
