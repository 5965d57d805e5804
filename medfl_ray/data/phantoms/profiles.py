"""Hospital profiles: the preset's first ones, then as many as are asked for, drawn from the index."""

from __future__ import annotations

from typing import Any

import numpy as np

from medfl_ray.data.phantoms.preset import HospitalProfile, PhantomPreset

# Field strength (T) -> share of hospitals, SNR range, bias amplitude range.
SCANNERS: tuple[tuple[float, float, tuple[float, float], tuple[float, float]], ...] = (
    (0.55, 0.1, (9.0, 14.0), (0.05, 0.15)),
    (1.5, 0.5, (15.0, 26.0), (0.1, 0.25)),
    (3.0, 0.4, (24.0, 42.0), (0.2, 0.4)),
)


def hospital_profile(preset: PhantomPreset, hospital_index: int, seed: int) -> HospitalProfile:
    """Return the profile of one hospital; the same for the same preset, index and seed."""
    if hospital_index < len(preset.hospitals):
        return preset.hospitals[hospital_index]
    rng = np.random.default_rng(np.random.SeedSequence([seed & (2**64 - 1), hospital_index], spawn_key=(1,)))
    scanner = SCANNERS[rng.choice(len(SCANNERS), p=[share for _, share, _, _ in SCANNERS])]
    values: dict[str, Any] = {
        "name": f"hospital-{hospital_index + 1:03d}",
        "field_tesla": scanner[0],
        "snr": rng.uniform(*scanner[2]),
        "bias_amplitude": rng.uniform(*scanner[3]),
        "missing": _missing(rng),
        "contrast": rng.uniform(0.8, 1.25),
        "contrast_seed": int(rng.integers(2**31)),
        "contrast_spread": rng.uniform(0.04, 0.1),
        "gain": float(np.exp(rng.uniform(np.log(200), np.log(4000)))),
        "slice_thickness_mm": (rng.choice([1.0, 1.2, 3.0, 5.0]), rng.choice([1.0, 3.0, 5.0, 6.0])),
        "field_of_view_mm": (rng.uniform(215, 240), rng.uniform(208, 235)),
        "orientation": str(rng.choice(["axial", "sagittal", "coronal"], p=[0.6, 0.3, 0.1])),
        "prevalence": rng.uniform(*preset.prevalence),
        "size_factor": rng.uniform(0.8, 1.15),
        "annotator_mm": float(np.clip(rng.normal(0, 0.8), -2, 2)),
        "annotator_smoothing_mm": rng.uniform(0, 3),
    }
    return HospitalProfile(**values)


def _missing(rng: np.random.Generator) -> tuple[str, ...]:
    """Most hospitals acquire everything; who does not, most often skips T1 or T2."""
    draw = rng.random()
    return ("T1",) if draw < 0.08 else ("T2",) if draw < 0.14 else ("FLAIR",) if draw < 0.16 else ()
