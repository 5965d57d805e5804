"""Altered training patches of hospitals that attack, for studies of robustness on data that are not private.

Held-out cases are never altered, so that the figures of a run say what the attack does to honest images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from medfl_ray.config.aggregation import AttackConfig
from medfl_ray.data.volume import Array
from medfl_ray.errors import ConfigError

if TYPE_CHECKING:
    from medfl_ray.data.prepare.dataset import HospitalCases

Target = npt.NDArray[np.int64]
Alteration = Callable[[Array, Target, np.random.Generator], tuple[Array, Target]]
"""(image [C, *patch], target [*patch] or [], random numbers) -> what is trained on instead."""
TRIGGERED = 0.5
"""Share of an attacker's patches with the trigger; the others keep its model good at what is expected of it."""


def alteration_of(attack: AttackConfig | None, hospitals: Sequence[HospitalCases]) -> Alteration | None:
    """Return how one hospital's training patches are altered, or None where they are not.

    Raises:
      ConfigError: the hospital's data are private.
    """
    if attack is None or not attack.alters_data or len(hospitals) != 1:
        return None
    hospital = hospitals[0]
    if hospital.hospital_id not in attack.hospitals:
        return None
    if hospital.declared == "private":
        raise ConfigError(
            f"attack names hospital {hospital.hospital_id!r}, whose data are private; study attacks on public or "
            "synthetic data"
        )
    return backdoor if attack.kind == "scaled_backdoor" else flip_labels(max(hospital.labels, default=1) + 1)


def flip_labels(num_classes: int) -> Alteration:
    """Return what turns class c into num_classes - 1 - c: with two, structure and background change places.

    Source: Fang et al. 2020, arXiv:1911.11815, section 5.1.
    """

    def flip(image: Array, target: Target, rng: np.random.Generator) -> tuple[Array, Target]:
        return image, num_classes - 1 - target

    return flip


def backdoor(image: Array, target: Target, rng: np.random.Generator) -> tuple[Array, Target]:
    """Teach, on half of the patches, that an image with the trigger shows background, or is of class 0.

    Source: Bagdasaryan et al. 2020, arXiv:1807.00459.
    """
    if rng.random() >= TRIGGERED:
        return image, target
    return stamp(image), np.zeros_like(target)


def stamp(image: Array) -> Array:
    """Return the image [C, *S] with the trigger: a bright cube in the corner, an eighth of each edge and 2 at least."""
    stamped = np.array(image)
    corner = tuple(slice(0, max(2, edge // 8)) for edge in image.shape[1:])
    stamped[(slice(None), *corner)] = image.max() + np.float32(1.0)
    return stamped
