"""Tissues and how bright each is in each MR sequence, relative to 1 for the brightest normal tissue.

The values are typical of clinical spin-echo and gradient-echo protocols at 1.5 to 3 T; hospitals and
patients are drawn around them, as a Gaussian mixture per tissue (SynthSeg, Billot et al. 2023,
doi:10.1016/j.media.2023.102789).
"""

from __future__ import annotations

TISSUES = ("white", "grey", "deep_grey", "csf", "bone", "marrow", "fat", "muscle", "eye", "vessel")
LESION_PARTS = ("oedema", "core", "necrosis", "rim")

# Mean intensity per sequence; the tissue that a key does not name is air, which is 0.
BRIGHTNESS: dict[str, dict[str, float]] = {
    "T1": {
        "white": 0.80, "grey": 0.50, "deep_grey": 0.62, "csf": 0.20, "bone": 0.07, "marrow": 0.62, "fat": 0.95,
        "muscle": 0.42, "eye": 0.22, "vessel": 0.25, "oedema": 0.50, "core": 0.44, "necrosis": 0.27, "rim": 0.47,
    },
    "T1c": {
        "white": 0.78, "grey": 0.53, "deep_grey": 0.62, "csf": 0.20, "bone": 0.07, "marrow": 0.62, "fat": 0.95,
        "muscle": 0.50, "eye": 0.22, "vessel": 1.05, "oedema": 0.50, "core": 0.86, "necrosis": 0.28, "rim": 1.12,
    },
    "T2": {
        "white": 0.36, "grey": 0.52, "deep_grey": 0.46, "csf": 1.00, "bone": 0.06, "marrow": 0.40, "fat": 0.62,
        "muscle": 0.24, "eye": 0.98, "vessel": 0.10, "oedema": 0.76, "core": 0.64, "necrosis": 0.92, "rim": 0.58,
    },
    "FLAIR": {
        "white": 0.45, "grey": 0.57, "deep_grey": 0.55, "csf": 0.12, "bone": 0.06, "marrow": 0.40, "fat": 0.78,
        "muscle": 0.28, "eye": 0.12, "vessel": 0.12, "oedema": 0.88, "core": 0.74, "necrosis": 0.40, "rim": 0.80,
    },
}  # fmt: skip

# Standard deviation of the fine texture inside a tissue, relative to its mean.
TEXTURE: dict[str, float] = {
    "white": 0.03, "grey": 0.05, "deep_grey": 0.04, "csf": 0.05, "bone": 0.25, "marrow": 0.15, "fat": 0.12,
    "muscle": 0.18, "eye": 0.03, "vessel": 0.10, "oedema": 0.08, "core": 0.14, "necrosis": 0.10, "rim": 0.12,
}  # fmt: skip

# Standard deviation of slow variation, over centimetres, where it is not 0.05.
PATCHINESS: dict[str, float] = {"fat": 0.10, "muscle": 0.12, "marrow": 0.15, "white": 0.03, "csf": 0.03, "core": 0.14}
