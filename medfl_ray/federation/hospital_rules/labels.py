"""Which label a hospital's figure carries when it leaves the hospital."""

from __future__ import annotations

import math
from collections.abc import Mapping

from medfl_ray.config.base import DataKind
from medfl_ray.messages import Label, Metric


def label_for(declared: DataKind, enable_dp: bool) -> Label:
    """Return the label of an uncharged figure that was computed from a hospital's data.

    A Dice score on private patients is itself a release. Under DP it is suppressed, for showing it
    would void the guarantee; with DP off it is shown and called what it is, unprotected.
    """
    if declared != "private":
        return "public"
    return "suppressed" if enable_dp else "unprotected"


def labelled(values: Mapping[str, float], declared: DataKind, enable_dp: bool) -> dict[str, Metric]:
    """Wrap figures in metrics; a suppressed figure loses its value here, inside the hospital.

    Figures that are not finite (the loss of a round in which no patient was drawn) are left out, except
    where they are suppressed: that one is missing would tell what the value would have told.
    """
    label = label_for(declared, enable_dp)
    if label == "suppressed":
        return {name: Metric(value=None, label=label) for name in values}
    return {name: Metric(value=value, label=label) for name, value in values.items() if math.isfinite(value)}
