"""A sheet of pictures: one slice per case, its labels in colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medfl_ray.data.cases import Case
from medfl_ray.data.prepare.loading import read_case
from medfl_ray.data.prepare.preprocess import Prepared, Preprocessing
from medfl_ray.data.volume import Volume
from medfl_ray.errors import DataError

COLOURS = ("#e41a1c", "#4daf4a", "#377eb8", "#ff7f00", "#984ea3", "#ffff33", "#a65628", "#f781bf")
COLUMNS = 6


def write_picture_sheet(cases: Sequence[Case], labels: Mapping[int, str], path: Path, most: int = 24) -> int:
    """Draw up to `most` cases, spread evenly over the list, as a PNG; return how many were drawn.

    Volumes are shown as an axial slice through the largest labelled area, the patient's right on the left,
    front up. Cases that cannot be read are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tiles = []
    for position in np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(int)):
        prepared = _prepare(cases[position], labels)
        if prepared is not None:
            tiles.append((int(position), prepared))
    if not tiles:
        return 0
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.45 * rows + 0.5), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (position, prepared) in zip(axes.flat, tiles, strict=False):
        _draw(axis, prepared, f"case {position + 1}")
    _legend(figure, labels)
    figure.savefig(path, dpi=100)
    return len(tiles)


def _prepare(case: Case, labels: Mapping[int, str]) -> Prepared | None:
    try:
        image, label = read_case(case, labels)
        dims = 2 if len(image.spatial_shape) == 2 else 3
        preparation = Preprocessing(
            spatial_dims=2 if dims == 2 else 3, orientation="RAS" if dims == 3 else None, intensity="percentile"
        )
        return preparation.prepare(Volume(image.array[:1], image.affine), label)
    except DataError:
        return None


def _draw(axis: Any, prepared: Prepared, title: str) -> None:
    image, label = prepared.image[0], prepared.label
    mask = label if isinstance(label, np.ndarray) else None
    if image.ndim == 3:
        middle = int(np.argmax((mask > 0).sum(axis=(0, 1)))) if mask is not None and mask.any() else image.shape[2] // 2
        # [x, y] towards right and front becomes [row, column] with front up and the patient's right on the left.
        image = image[::-1, ::-1, middle].T
        mask = mask[::-1, ::-1, middle].T if mask is not None else None
        aspect = prepared.spacing_mm[1] / prepared.spacing_mm[0]
    else:
        aspect = prepared.spacing_mm[0] / prepared.spacing_mm[1]
    axis.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
    if mask is not None:
        axis.imshow(_coloured(mask), aspect=aspect, interpolation="nearest")
    name = title if label is None or mask is not None else f"{title}: class {label}"
    axis.set_title(name, color="white", fontsize=8, pad=2)


def _coloured(mask: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    from matplotlib.colors import to_rgb

    picture = np.zeros((*mask.shape, 4))
    for value in np.unique(mask[mask > 0]):
        picture[mask == value] = (*to_rgb(COLOURS[(int(value) - 1) % len(COLOURS)]), 0.45)
    return picture


def _legend(figure: Any, labels: Mapping[int, str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=COLOURS[(value - 1) % len(COLOURS)], label=name) for value, name in list(labels.items())[:12]
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(6, len(handles)),
            labelcolor="white",
            frameon=False,
            fontsize=8,
        )
