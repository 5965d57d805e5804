"""How whole images are cut into windows: the one source of these figures for evaluation, export and serving."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SlidingWindow(BaseModel):
    """How whole images are cut into windows and their logits blended; serving and training share it.

    `sigma_scale` is the width of the Gaussian weight over the window's edge, as in MONAI.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlap: float = Field(default=0.25, ge=0, lt=1)
    mode: Literal["gaussian", "constant"] = "gaussian"
    sigma_scale: float = Field(default=0.125, gt=0)
    padding: Literal["constant"] = "constant"
