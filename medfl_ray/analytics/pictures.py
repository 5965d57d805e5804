"""A prediction next to the truth, as a picture; drawn at the hospital, because it shows a patient."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from medfl_ray.training.scoring.evaluation import dice_per_label

FloatArray = npt.NDArray[np.floating]
LabelArray = npt.NDArray[np.integer]
Plane = npt.NDArray[Any]

BACKGROUND, TEXT, MUTED = "#0d1420", "#eef2f7", "#9fb0c3"
TRUTH_COLOUR = "#ffffff"
LABEL_COLOURS = ("#ff8a3d", "#35c4f0", "#ffd84d", "#7be08b", "#ff6fae", "#b79bff", "#58e0c9", "#ff5f5f")
PANEL_INCH, DPI = 2.6, 110


def prediction_png(
    image: FloatArray,
    truth: LabelArray | int | None,
    prediction: LabelArray | FloatArray | float,
    labels: Mapping[int, str],
    *,
    affine: FloatArray | None = None,
    channels: Sequence[str] = (),
) -> bytes:
    """Return a PNG of one case: image, truth and prediction of a slice, or image and class.

    Args:
      image: [C, *S], two or three spatial dimensions.
      truth: label map [*S], or the class of a classification; None where a case has no label.
      prediction: label map [*S]; for a classification the class, or its probabilities [L].
      labels: names of the label values, or of the classes.
      affine: index to RAS mm, [4, 4]; finds the axial axis and the sides. Without it axis 0 counts as axial.
      channels: names of the channels, for the caption.
    """
    predicted = np.asarray(prediction)
    if predicted.ndim < image.ndim - 1:
        return _classification_png(image, truth, predicted, labels, affine, channels)
    true_map = None if truth is None else np.asarray(truth)
    channel = informative_channel(image, true_map if true_map is not None else predicted)
    volumes = [image[channel], predicted.astype(np.int64)]
    if true_map is not None:
        volumes.append(true_map.astype(np.int64))
    planes, aspect = axial_planes(volumes, true_map if true_map is not None else predicted, affine)
    planes, aspect = _crop(planes, aspect)
    truth_plane = planes[2] if true_map is not None else None
    scores = dice_per_label(predicted, true_map, labels) if true_map is not None else {}
    caption = channels[channel] if channel < len(channels) else "image"
    return _segmentation_png(planes[0], truth_plane, planes[1], labels, scores, caption, aspect)


def informative_channel(image: FloatArray, region: LabelArray) -> int:
    """Return the channel in which the labelled region stands out most from the rest; 0 where nothing is labelled."""
    inside = np.asarray(region) > 0
    if len(image) == 1 or inside.ndim != image.ndim - 1 or not inside.any() or inside.all():
        return 0
    contrasts = [abs(c[inside].mean() - c[~inside].mean()) / (c.std() + 1e-6) for c in image]
    return int(np.argmax(contrasts))


def axial_planes(volumes: Sequence[Plane], region: LabelArray, affine: FloatArray | None) -> tuple[list[Plane], float]:
    """Cut the axial slice in which the region is largest (otherwise the middle one), radiological sides up.

    Returns the planes [rows, columns] with anterior on top and the patient's right on the left, and the
    height of a pixel over its width.
    """
    if volumes[0].ndim == 2:
        return list(volumes), 1.0
    axis, order, flips, aspect = _axial_axes(affine)
    sizes = (np.asarray(region) > 0).sum(axis=tuple(a for a in range(3) if a != axis))
    index = int(sizes.argmax()) if sizes.max() else volumes[0].shape[axis] // 2
    planes = []
    for volume in volumes:
        plane = volume.take(index, axis=axis)
        plane = plane.T if order else plane
        planes.append(plane[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1])
    return planes, aspect


def _axial_axes(affine: FloatArray | None) -> tuple[int, bool, tuple[bool, bool], float]:
    """Return the axial axis, whether the other two swap, flips of rows and columns, and the pixel's aspect."""
    if affine is None:
        return 0, False, (False, False), 1.0
    steps = np.asarray(affine)[:3, :3]
    sizes = np.linalg.norm(steps, axis=0)
    axis = int(np.abs(steps[2] / np.maximum(sizes, 1e-9)).argmax())
    others = [a for a in range(3) if a != axis]
    across = max(others, key=lambda a: abs(steps[0, a]))
    down = next(a for a in others if a != across)
    # RAS: x grows to the patient's right, which is shown on the left; y grows to the front, which is on top.
    flips = (bool(steps[1, down] > 0), bool(steps[0, across] > 0))
    return axis, down > across, flips, float(sizes[down] / max(sizes[across], 1e-9))


def _crop(planes: Sequence[Plane], aspect: float) -> tuple[list[Plane], float]:
    """Cut away empty air around the head, keeping a margin."""
    image = planes[0].astype(np.float64)
    low, high = np.percentile(image, [1, 99])
    inside = image > low + 0.08 * (high - low)
    if not inside.any():
        return list(planes), aspect
    spans = []
    for axis in (0, 1):
        hit = np.flatnonzero(inside.any(axis=1 - axis))
        margin = max(1, image.shape[axis] // 25)
        spans.append(slice(max(0, hit[0] - margin), hit[-1] + 1 + margin))
    return [plane[spans[0], spans[1]] for plane in planes], aspect


def _segmentation_png(
    image: Plane,
    truth: Plane | None,
    prediction: Plane,
    labels: Mapping[int, str],
    scores: Mapping[str, float],
    caption: str,
    aspect: float,
) -> bytes:
    panels = 2 if truth is None else 3
    figure, axes = _panels(panels, image.shape[0] * aspect / image.shape[1])
    for panel in axes:
        _show(panel, image, aspect)
    axes[0].set_title(caption, color=TEXT, fontsize=11)
    if truth is not None:
        axes[1].set_title("truth", color=TEXT, fontsize=11)
        _paint(axes[1], truth, labels)
    _paint(axes[-1], prediction, labels)
    if truth is not None:
        _outline(axes[-1], truth > 0, TRUTH_COLOUR, 1.0, "dashed")
    axes[-1].set_title("prediction", color=TEXT, fontsize=11)
    names = {v: f"{n}  Dice {scores[n]:.2f}" if n in scores else n for v, n in labels.items()}
    entries: list[Patch | Line2D] = [Patch(color=_colour(v), label=names[v]) for v in list(labels)[:6]]
    if truth is not None:
        entries.append(
            Line2D([], [], color=TRUTH_COLOUR, linestyle="dashed", linewidth=1, label="outline of the truth")
        )
    figure.legend(
        handles=entries, loc="lower center", ncols=min(4, len(entries)), frameon=False, fontsize=9.5, labelcolor=TEXT
    )
    return _png(figure)


def _classification_png(
    image: FloatArray,
    truth: LabelArray | int | None,
    prediction: Plane,
    labels: Mapping[int, str],
    affine: FloatArray | None,
    channels: Sequence[str],
) -> bytes:
    planes, aspect = axial_planes([image[0]], np.zeros(image.shape[1:], dtype=np.int64), affine)
    figure, axes = _panels(2, planes[0].shape[0] * aspect / planes[0].shape[1])
    _show(axes[0], planes[0], aspect)
    axes[0].set_title(channels[0] if channels else "image", color=TEXT, fontsize=11)
    if prediction.ndim:
        probabilities = prediction.astype(float)
    else:
        size = max([*labels, int(prediction), 1]) + 1
        probabilities = np.eye(size)[int(prediction)]
    names = [labels.get(value, f"class {value}") for value in range(len(probabilities))]
    axis = axes[1]
    axis.barh(range(len(names)), probabilities, color=[_colour(v) for v in range(len(names))], height=0.5)
    for place, (name, value) in enumerate(zip(names, probabilities, strict=True)):
        mark = "  (truth)" if truth is not None and place == int(truth) else ""
        text = f"{name}: {value:.2f}{mark}" if prediction.ndim else f"{name}{mark}"
        axis.text(0, place - 0.32, text, color=TEXT, fontsize=10, va="bottom")
    axis.set_ylim(len(names) - 0.4, -0.9)
    axis.set_xlim(0, 1)
    axis.set_title("predicted probability" if prediction.ndim else "predicted class", color=TEXT, fontsize=11)
    return _png(figure)


def _panels(count: int, height_over_width: float) -> tuple[Figure, list[Axes]]:
    height = PANEL_INCH * float(np.clip(height_over_width, 0.6, 1.6))
    figure = Figure(figsize=(PANEL_INCH * count, height + 0.75), dpi=DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, count, squeeze=False)
    top, bottom = 1 - 0.32 / (height + 0.75), 0.38 / (height + 0.75)
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, wspace=0.03)
    axes: list[Axes] = list(grid[0])
    for panel in axes:
        panel.set_axis_off()
    return figure, axes


def _show(panel: Axes, image: Plane, aspect: float) -> None:
    low, high = np.percentile(image.astype(np.float64), [1, 99.5])
    panel.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="bicubic")


def _paint(panel: Axes, plane: Plane, labels: Mapping[int, str]) -> None:
    for value in labels:
        mask = plane == value
        if value == 0 or not mask.any():
            continue
        tint = np.zeros((*mask.shape, 4))
        tint[mask] = (*to_rgb(_colour(value)), 0.25)
        panel.imshow(tint, aspect=panel.get_aspect(), interpolation="nearest")
        _outline(panel, mask, _colour(value), 1.6, "solid")


def _outline(panel: Axes, mask: npt.NDArray[np.bool_], colour: str, width: float, style: str) -> None:
    # A label at the border of the picture still gets a closed line.
    if mask.any():
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(n) - 1 for n in padded.shape)
        panel.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)
        panel.set_xlim(-0.5, mask.shape[1] - 0.5)
        panel.set_ylim(mask.shape[0] - 0.5, -0.5)


def _colour(value: int) -> str:
    return LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)] if value > 0 else MUTED


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=BACKGROUND)
    return buffer.getvalue()
