"""From a volume to a mask, or to class probabilities, with the preparation that the model was trained with.

`Predictor.segment` does the whole work. `Predictor.start` gives the same work in steps (windows out, logits in, mask),
for a server that runs windows of several volumes together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from medfl_ray.data.prepare.preprocess import Prepared
from medfl_ray.data.volume import Volume, without_voxels
from medfl_ray.errors import InferenceError
from medfl_ray.export.description import PackageDescription
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.sliding_window import Array, Blender, LabelImage, WindowPlan, batches, plan_windows

Mask = npt.NDArray[np.uint8]
Progress = Callable[[float], None]
WINDOWS_AT_ONCE = 1
MM3_PER_ML = 1000.0


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A mask [*S] on the grid of the volume it was made from: label values, 0 is background.

    `labels` names the values. `volumes_ml` has every name; it is empty for a picture without a depth.
    """

    mask: Mask = field(repr=False)
    labels: dict[int, str]
    volumes_ml: dict[str, float]
    model: str
    version: str = ""


def label_values(description: PackageDescription) -> dict[int, str]:
    """Return the names of a mask's values; the value of class k is the training labels' own."""
    own = description.preprocessing.label_values
    return {own[index - 1] if own else index: name for index, name in sorted(description.labels.items())}


class SegmentationSteps:
    """One volume on its way through a model: windows out, logits in, a mask at the end.

    Windows may be run in any order and together with those of other volumes of the same model.
    """

    def __init__(
        self, description: PackageDescription, volume: Volume, version: str = "", max_voxels: int | None = None
    ) -> None:
        """Prepare a volume.

        Args:
          max_voxels: most voxels of the prepared image, over all channels.

        Raises:
          GeometryError: the volume does not have the dimensions or channels that the model needs.
        """
        self._description, self._version = description, version
        self._prepared: Prepared = description.preprocessing.prepare(volume, max_voxels=max_voxels)
        self._grid = without_voxels(volume)
        image = self._prepared.image
        settings = description.sliding_window
        self.plan: WindowPlan = plan_windows(image.shape[1:], description.patch_size, settings.overlap)
        self._label_image = LabelImage(self.plan.image_shape)
        self._blender = Blender(self.plan, settings, self._label_image.receive, normalise=False)

    @property
    def fraction_done(self) -> float:
        """Windows that are blended, of all."""
        return self._blender.num_added / len(self.plan)

    def windows(self, numbers: range | list[int]) -> Array:
        """Return windows [N, C, *P] by their numbers, 0 to len(plan) - 1."""
        return self.plan.cut(self._prepared.image, numbers)

    def add(self, number: int, logits: Array) -> None:
        """Take the logits [L, *P] of one window; they are overwritten.

        Raises:
          InferenceError: they are not finite or not of the window's size.
        """
        self._blender.add(number, logits)

    def finish(self) -> Segmentation:
        """Return the mask on the volume's own grid.

        Raises:
          InferenceError: a window is missing.
        """
        if self._blender.num_added < len(self.plan):
            raise InferenceError(f"{self._blender.num_added} of {len(self.plan)} windows were run; add the others")
        mask = self._description.preprocessing.restore(self._label_image.classes, self._prepared.affine, self._grid)
        labels = label_values(self._description)
        return Segmentation(mask, labels, volumes_ml(mask, labels, self._grid), self._description.name, self._version)


class Predictor:
    """A loaded model for whole volumes; `version` is the registry's, kept in every result."""

    def __init__(
        self,
        model: OnnxModel,
        version: str = "",
        windows_at_once: int = WINDOWS_AT_ONCE,
        max_voxels: int | None = None,
    ) -> None:
        """Take a model that is loaded; images that have more than `max_voxels` at its spacing are refused."""
        self.model, self.version, self.max_voxels = model, version, max_voxels
        self._at_once = windows_at_once

    @property
    def description(self) -> PackageDescription:
        """What the model's package says of itself."""
        return self.model.description

    def start(self, volume: Volume) -> SegmentationSteps:
        """Prepare a volume for a run in steps.

        Raises:
          GeometryError: the volume does not have the dimensions or channels that the model needs.
          InferenceError: the model does not segment.
        """
        self._expect("segmentation")
        return SegmentationSteps(self.description, volume, self.version, self.max_voxels)

    def segment(self, volume: Volume, progress: Progress | None = None) -> Segmentation:
        """Return the mask of a volume.

        Args:
          progress: called with the fraction of windows that are done; an error that it raises ends the work.

        Raises:
          GeometryError: the volume does not have the dimensions or channels that the model needs.
          InferenceError: the model does not segment, or its output is not finite.
        """
        steps = self.start(volume)
        for numbers in batches(len(steps.plan), self._at_once):
            for number, logits in zip(numbers, self.model.run(steps.windows(numbers)), strict=True):
                steps.add(number, logits)
            if progress is not None:
                progress(steps.fraction_done)
        return steps.finish()

    def classify(self, volume: Volume) -> dict[str, float]:
        """Return the probability of each class of a volume; an image smaller than the patch is padded with zeros.

        Raises:
          GeometryError: the volume does not have the dimensions or channels that the model needs.
          InferenceError: the model does not classify, or its output is not finite.
        """
        self._expect("classification")
        image = self.description.preprocessing.prepare(volume, max_voxels=self.max_voxels).image
        (logits,) = self.model.run(_padded(image, self.description.patch_size)[None])
        if not np.isfinite(logits).all():
            raise InferenceError("the model's output is not finite on this image; check the image's intensities")
        powers = np.exp(logits - logits.max())
        names = self.description.labels
        return {names.get(k, str(k)): float(value) for k, value in enumerate(powers / powers.sum())}

    def _expect(self, task: str) -> None:
        if self.description.task != task:
            raise InferenceError(
                f"the model {self.description.name!r} is for {self.description.task}, not for {task}; "
                "choose another model"
            )


def volumes_ml(mask: Mask, labels: dict[int, str], volume: Volume) -> dict[str, float]:
    """Return the volume of each label in ml; nothing for a picture, which has no depth."""
    if mask.ndim != 3:
        return {}
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / MM3_PER_ML
    # One pass for any number of labels; plane by plane, for bincount works on eight bytes a voxel.
    counts = np.sum([np.bincount(plane.reshape(-1), minlength=256) for plane in mask], axis=0)
    return {name: float(counts[value]) * voxel_ml for value, name in labels.items()}


def _padded(image: Array, smallest: tuple[int, ...]) -> Array:
    missing = [max(0, low - edge) for low, edge in zip(smallest, image.shape[1:], strict=True)]
    return np.pad(image, [(0, 0), *((amount // 2, amount - amount // 2) for amount in missing)])
