"""Windows over an image and their blending, equal to MONAI's sliding-window inference, without torch.

A planner says where the windows lie, a blender takes their logits back. Between the two, windows of several images
may share one run of the model. Windows lie in rows along the first axis, so that the blender can let go of the planes
that no later window reaches: it holds one window's depth of logits, whatever the size of the image.

Shapes: C image channels, L output channels, S voxels of the image per axis, P voxels of the window per axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medfl_ray.data.prepare.windows import SlidingWindow
from medfl_ray.errors import InferenceError
from medfl_ray.export.description import PackageDescription

Array = npt.NDArray[np.float32]
Classes = npt.NDArray[np.uint8]
Run = Callable[[Array], Array]
MIN_WEIGHT = 1e-3
MAX_CLASSES = 256


@dataclass(frozen=True)
class WindowPlan:
    """Where the windows of one image lie.

    `starts` count voxels of the image after padding, the first axis outermost; `before` is the padding in front of
    each axis of an image that is smaller than the window.
    """

    image_shape: tuple[int, ...]
    padded_shape: tuple[int, ...]
    window: tuple[int, ...]
    before: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.starts)

    def cut(self, image: Array, numbers: Sequence[int]) -> Array:
        """Return windows [N, C, *P] of an image [C, *S] by their numbers; zeros where they lie outside."""
        windows = np.zeros((len(numbers), image.shape[0], *self.window), dtype=np.float32)
        for window, number in zip(windows, numbers, strict=True):
            source, target = [], []
            for start, before, edge, length in zip(
                self.starts[number], self.before, self.window, self.image_shape, strict=True
            ):
                first, last = max(start - before, 0), min(start - before + edge, length)
                source.append(slice(first, last))
                target.append(slice(first - start + before, last - start + before))
            window[(slice(None), *target)] = image[(slice(None), *source)]
        return windows


def plan_windows(image_shape: Sequence[int], window: Sequence[int], overlap: float) -> WindowPlan:
    """Place windows as MONAI does: at a fixed interval, the last of each axis moved back to the image's end."""
    padded = tuple(max(length, edge) for length, edge in zip(image_shape, window, strict=True))
    per_axis = [_starts(length, edge, overlap) for length, edge in zip(padded, window, strict=True)]
    before = tuple((length - given) // 2 for length, given in zip(padded, image_shape, strict=True))
    return WindowPlan(tuple(image_shape), padded, tuple(window), before, tuple(itertools.product(*per_axis)))


def _starts(length: int, edge: int, overlap: float) -> list[int]:
    interval = edge if edge == length else max(1, int(edge * (1 - overlap)))
    count = math.ceil((length - edge) / interval) + 1
    return [min(index * interval, length - edge) for index in range(count)]


def window_weights(window: Sequence[int], settings: SlidingWindow) -> Array:
    """Return the weight [*P] of each voxel of a window: a Gaussian around its middle, or one everywhere."""
    if settings.mode == "constant":
        return np.ones(tuple(window), dtype=np.float32)
    weights = np.ones((), dtype=np.float32)
    for edge in window:
        from_middle = np.arange(edge, dtype=np.float32) - np.float32((edge - 1) / 2)
        sigma = edge * settings.sigma_scale
        weights = weights[..., None] * np.exp(from_middle**2 / np.float32(-2 * sigma**2))
    # MONAI's floor, so that no voxel is left without a weight.
    return np.maximum(weights, np.float32(max(float(weights.min()), MIN_WEIGHT)))


class Blender:
    """Adds up the weighted logits of an image's windows and hands over each plane once, when it is complete.

    Windows may come in any order; they are added in the plan's order, so that the sum has the same bits however the
    windows were batched.
    """

    def __init__(
        self, plan: WindowPlan, settings: SlidingWindow, on_planes: Callable[[int, Array], None], normalise: bool
    ) -> None:
        """Take a receiver of complete planes: called with the first plane's number and their logits [L, n, ...].

        Args:
          normalise: divide the sums by the weights. Labels do not need it, because it does not change their order.
        """
        self._plan, self._on_planes = plan, on_planes
        self._weights = window_weights(plan.window, settings)
        self._waiting: dict[int, Array] = {}
        self._next = 0
        self._first_plane = 0
        self._sums: Array | None = None
        shape = (plan.window[0], *plan.padded_shape[1:])
        self._total: Array | None = np.zeros(shape, dtype=np.float32) if normalise else None

    @property
    def num_added(self) -> int:
        """Windows that are in the sums."""
        return self._next

    def add(self, number: int, logits: Array) -> None:
        """Take the logits [L, *P] of one window; they are overwritten.

        Raises:
          InferenceError: they do not have the window's size, or the window came before.
        """
        if not self._next <= number < len(self._plan) or number in self._waiting:
            raise InferenceError(f"window {number} of {len(self._plan)} was added twice or does not exist")
        if logits.shape[1:] != self._plan.window:
            raise InferenceError(
                f"the model's output has the size {logits.shape[1:]} for a window of {self._plan.window}; a "
                "segmentation model returns one value per voxel and class"
            )
        self._waiting[number] = logits
        while self._next in self._waiting:
            self._add_next(self._waiting.pop(self._next))
            self._next += 1
        if self._next == len(self._plan):
            self._hand_over(self._plan.padded_shape[0])

    def _add_next(self, logits: Array) -> None:
        start = self._plan.starts[self._next]
        if self._sums is None:
            shape = (len(logits), self._plan.window[0], *self._plan.padded_shape[1:])
            self._sums = np.zeros(shape, dtype=np.float32)
        if start[0] > self._first_plane:
            self._hand_over(start[0])
        place = tuple(slice(at, at + edge) for at, edge in zip(start[1:], self._plan.window[1:], strict=True))
        if not logits.flags.writeable:
            logits = logits.copy()
        logits *= self._weights
        self._sums[(slice(None), slice(None), *place)] += logits
        if self._total is not None:
            self._total[(slice(None), *place)] += self._weights

    def _hand_over(self, until: int) -> None:
        """Pass on the planes before `until` and move the rest to the front."""
        assert self._sums is not None
        count = until - self._first_plane
        planes = self._sums[:, :count]
        if self._total is not None:
            planes /= self._total[:count]
            _move_to_front(self._total[None], count)
        self._pass_on(planes)
        _move_to_front(self._sums, count)
        self._first_plane = until

    def _pass_on(self, planes: Array) -> None:
        """Cut the padding off the planes."""
        plan = self._plan
        first = max(self._first_plane - plan.before[0], 0)
        last = min(self._first_plane + planes.shape[1] - plan.before[0], plan.image_shape[0])
        if last <= first:
            return
        offset = first + plan.before[0] - self._first_plane
        inside = [slice(b, b + n) for b, n in zip(plan.before[1:], plan.image_shape[1:], strict=True)]
        self._on_planes(first, planes[(slice(None), slice(offset, offset + last - first), *inside)])


def _move_to_front(planes: Array, count: int) -> None:
    """Drop the first planes of [L, n, ...] and fill up with zeros at the end."""
    kept = planes.shape[1] - count
    if kept > 0:
        planes[:, :kept] = planes[:, count:].copy()
    planes[:, max(kept, 0) :] = 0


class LabelImage:
    """The label of each voxel [*S], filled plane by plane from blended logits."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Make room for an image of this size."""
        self.classes: Classes = np.zeros(shape, dtype=np.uint8)

    def receive(self, first: int, planes: Array) -> None:
        """Write the class with the largest logit, the first of equal ones.

        Raises:
          InferenceError: the logits are not finite, or there are more classes than a byte can name.
        """
        if len(planes) > MAX_CLASSES:
            raise InferenceError(f"the model has {len(planes)} classes; a mask holds at most {MAX_CLASSES}")
        target = self.classes[first : first + planes.shape[1]]
        largest = planes[0].copy()
        for index in range(1, len(planes)):
            target[planes[index] > largest] = index
            np.maximum(largest, planes[index], out=largest)
        if not np.isfinite(largest).all():
            raise InferenceError(
                "the model's output is not finite on this image; check the image's intensities, or use the model's "
                "float32 variant"
            )


def sliding_window(run: Run, image: Array, description: PackageDescription, at_once: int = 1) -> Array:
    """Return logits [L, *S] of an image [C, *S], from windows of the size that the network was trained on."""
    settings = description.sliding_window
    plan = plan_windows(image.shape[1:], description.patch_size, settings.overlap)
    logits: Array = np.zeros((description.out_channels, *image.shape[1:]), dtype=np.float32)

    def receive(first: int, planes: Array) -> None:
        logits[:, first : first + planes.shape[1]] = planes

    blender = Blender(plan, settings, receive, normalise=True)
    for numbers in batches(len(plan), at_once):
        for number, result in zip(numbers, run(plan.cut(image, numbers)), strict=True):
            blender.add(number, result)
    return logits


def batches(count: int, at_once: int) -> list[range]:
    """Split numbers 0..count-1 into runs of at most `at_once`."""
    return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
