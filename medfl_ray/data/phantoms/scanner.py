"""From tissue fractions to MR signal: contrast, texture, bias field, slice thickness, Rician noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from medfl_ray.data.phantoms.geometry import FloatArray, Grid, SmoothField
from medfl_ray.data.phantoms.preset import HospitalProfile
from medfl_ray.data.phantoms.tissues import BRIGHTNESS, LESION_PARTS, PATCHINESS, TEXTURE, TISSUES

PARTS = TISSUES + LESION_PARTS
PATCHINESS_OF_PART = np.array([PATCHINESS.get(p, 0.05) for p in PARTS], dtype=np.float32)
TEXTURE_OF_PART = np.array([TEXTURE[p] for p in PARTS], dtype=np.float32)


def intensities(profile: HospitalProfile, channels: Sequence[str], rng: np.random.Generator) -> FloatArray:
    """Mean intensity [C, parts] of one patient: the hospital's protocol, and the patient's own variation."""
    protocol = np.random.default_rng(profile.contrast_seed)
    means = np.zeros((len(channels), len(PARTS)), dtype=np.float32)
    drawn = {name: np.exp(protocol.normal(0, profile.contrast_spread, len(PARTS))) for name in BRIGHTNESS}
    for index, channel in enumerate(channels):
        base = np.array([BRIGHTNESS[channel][part] for part in PARTS])
        patient = np.exp(rng.normal(0, 0.03, len(PARTS)))
        means[index] = (base * drawn[channel]) ** profile.contrast * patient
    return means


def acquire(
    fractions: FloatArray,
    head: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    grid: Grid,
    channels: Sequence[str],
    profile: HospitalProfile,
    rng: np.random.Generator,
) -> FloatArray:
    """Return the image [C, *grid] as the scanner stores it: whole numbers, zero where a sequence is missing.

    Args:
      fractions: [parts, N] of the N voxels where `head` is true; the rest is air.
      head: [*grid] mask.
    """
    means = intensities(profile, channels, rng)
    signal = np.stack([of_parts(own, fractions) for own in means])
    signal *= _texture(fractions, head, grid, rng)
    bias = _bias(grid, profile, rng)
    image = np.zeros((len(channels), *grid.shape), dtype=np.float32)
    for index, channel in enumerate(channels):
        own = float(rng.uniform(0.7, 1.3))
        noise_seed = int(rng.integers(2**63))
        gain = profile.gain * float(rng.uniform(0.8, 1.25))
        if channel in profile.missing:
            continue
        clean = np.zeros(grid.shape, dtype=np.float32)
        clean[head] = signal[index]
        clean *= np.exp(np.float32(own) * bias)
        thickness = profile.slice_thickness_mm[channel in {"T2", "FLAIR"}]
        image[index] = np.rint(gain * _rician(_thicken(clean, grid, thickness), profile, noise_seed))
    return image


def of_parts(weights: FloatArray, fractions: FloatArray) -> FloatArray:
    """Return the weighted sum [N] of fractions [parts, N].

    Not by the linear algebra library, whose last bits depend on its threads on some processors.
    """
    total: FloatArray = np.einsum("p,pn->n", weights, fractions)
    return total


def _texture(
    fractions: FloatArray, head: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], grid: Grid, rng: np.random.Generator
) -> FloatArray:
    fine = ndimage.gaussian_filter(rng.standard_normal(grid.shape, dtype=np.float32), 0.6, truncate=2.5)[head]
    fine /= max(float(fine.std()), 1e-6)
    patches = SmoothField(rng, 12.0).on(grid)[head]
    relief = 1 + of_parts(TEXTURE_OF_PART, fractions) * fine + of_parts(PATCHINESS_OF_PART, fractions) * patches
    clipped: FloatArray = np.clip(relief, 0.2, 2.0).astype(np.float32)
    return clipped


def _bias(grid: Grid, profile: HospitalProfile, rng: np.random.Generator) -> FloatArray:
    """Log of the receive field: smooth, stronger at a higher field strength by the profile's amplitude."""
    field = SmoothField(rng, 90.0).on(grid)
    return np.asarray(np.float32(profile.bias_amplitude) * np.tanh(field), dtype=np.float32)


def _thicken(clean: FloatArray, grid: Grid, thickness_mm: float) -> FloatArray:
    """Average across the slice; a voxel already averages over its own spacing."""
    spacing = grid.spacing_mm[2]
    extra = np.sqrt(max(thickness_mm**2 - spacing**2, 0.0)) / spacing / np.sqrt(12)
    if extra < 0.05 or grid.shape[2] == 1:
        return clean
    return np.asarray(ndimage.gaussian_filter1d(clean, extra, axis=2, truncate=3), dtype=np.float32)


def _rician(clean: FloatArray, profile: HospitalProfile, seed: int) -> FloatArray:
    """Magnitude of a complex signal with Gaussian noise in both parts."""
    rng = np.random.default_rng(seed)
    std = np.float32(BRIGHTNESS["T1"]["white"] / profile.snr)
    noise = rng.standard_normal((2, *clean.shape), dtype=np.float32) * std
    return np.asarray(np.sqrt((clean + noise[0]) ** 2 + noise[1] ** 2), dtype=np.float32)
