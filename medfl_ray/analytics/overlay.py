"""A mask over its image as a picture: the slice in which the mask is largest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from medfl_ray.analytics.pictures import prediction_png
from medfl_ray.data.volume import Volume


def overlay_png(volume: Volume, mask: npt.NDArray[np.uint8], labels: Mapping[int, str]) -> bytes:
    """Return a PNG of the image next to the image with the mask on it.

    It shows a patient: it belongs to the sender of the image.
    """
    named = {value: name for value, name in labels.items() if value > 0}
    affine = volume.affine if mask.ndim == 3 else None
    return prediction_png(np.asarray(volume.array), None, mask, named, affine=affine)
