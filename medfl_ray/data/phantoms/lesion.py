"""Gliomas: a noise-perturbed blob with core, dead centre and an oedema that follows white matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.data.phantoms.geometry import FloatArray, Grid, SmoothField
from medfl_ray.data.phantoms.preset import LesionPreset


@dataclass(frozen=True, eq=False)
class Lesion:
    """One tumour, described in the anatomy's coordinates (mm)."""

    centre_mm: npt.NDArray[np.float32]
    stretch: npt.NDArray[np.float32]  # [3, 3], volume-preserving
    radius_mm: float
    core_share: float
    necrosis_share: float  # of the core's radius; 0 for a solid core
    roughness: float
    mass_effect: float
    border: SmoothField
    inner: SmoothField

    def distance(self, coordinates: list[FloatArray]) -> FloatArray:
        """Distance from the centre over the radius, in the stretched ball."""
        offsets = [axis - centre for axis, centre in zip(coordinates, self.centre_mm, strict=True)]
        squares = sum(sum(self.stretch[row, k] * offsets[k] for k in range(3)) ** 2 for row in range(3))
        return np.asarray(np.sqrt(squares) / np.float32(self.radius_mm), dtype=np.float32)

    def displace(self, coordinates: list[FloatArray], distance: FloatArray) -> list[FloatArray]:
        """Coordinates of the tissue that the tumour has pushed to each place."""
        pull = 1 - np.float32(self.mass_effect) * np.exp(-((distance / 1.3) ** 2))
        return [c + (axis - c) * pull for axis, c in zip(coordinates, self.centre_mm, strict=True)]


@dataclass(frozen=True, eq=False)
class LesionMaps:
    """Fractions 0..1 of each voxel: whole tumour, its core and the core's dead centre (each within the former)."""

    whole: FloatArray
    core: FloatArray
    necrosis: FloatArray


def draw_lesion(rng: np.random.Generator, preset: LesionPreset, size_factor: float, sites_mm: FloatArray) -> Lesion:
    """Draw one tumour at one of the sites."""
    low, high = preset.radius_mm
    axes = np.exp(rng.normal(0, 0.13, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    necrotic = rng.random() < preset.necrosis_probability
    return Lesion(
        centre_mm=sites_mm[rng.integers(len(sites_mm))],
        stretch=(np.diag(axes / axes.prod() ** (1 / 3)) @ rotation).astype(np.float32),
        radius_mm=float(rng.uniform(low, high) * size_factor),
        core_share=float(rng.uniform(*preset.core_share)),
        necrosis_share=float(rng.uniform(0.5, 0.72)) if necrotic else 0.0,
        roughness=preset.roughness,
        mass_effect=preset.mass_effect,
        border=SmoothField(rng, 16.0),
        inner=SmoothField(rng, 13.0),
    )


def lesion_maps(lesion: Lesion, grid: Grid, distance: FloatArray, white: FloatArray, brain: FloatArray) -> LesionMaps:
    """Return a lesion's fractions on a grid; `white` and `brain` are the tissue there, 0..1."""
    border, inner = lesion.border.on(grid), lesion.inner.on(grid)
    voxel = np.float32(np.cbrt(np.prod(grid.spacing_mm)) / lesion.radius_mm)
    rough = np.float32(lesion.roughness)
    within = np.clip((brain - 0.25) / 0.4, 0, 1)
    core_level = distance / np.float32(lesion.core_share) + rough * (0.4 * border + 0.5 * inner)
    core = _inside(core_level, voxel / lesion.core_share) * within
    # Oedema spreads along white matter and halts at the cortex.
    oedema_level = distance + rough * (0.7 * border) + 0.22 * (0.5 - white)
    whole = np.maximum(_inside(oedema_level, voxel) * within, core)
    if lesion.necrosis_share == 0:
        return LesionMaps(whole, core, np.zeros_like(core))
    scale = lesion.core_share * lesion.necrosis_share
    dead = _inside(distance / np.float32(scale) + rough * (0.5 * border + 0.9 * inner), voxel / scale)
    return LesionMaps(whole, core, np.minimum(dead, core))


def _inside(level: npt.NDArray[np.floating], voxel: float | np.float32) -> FloatArray:
    """Fraction of a voxel where the level is below 1."""
    fraction: FloatArray = np.clip((1 - level) / np.float32(voxel) + np.float32(0.5), 0, 1).astype(np.float32)
    return fraction
