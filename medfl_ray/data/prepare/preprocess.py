"""Preparation of one image, by MONAI's transforms: the same object in training and serving.

Every step looks at one volume alone. Nothing is fitted over patients, so preparation costs no privacy.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from medfl_ray.config.data import DataConfig
from medfl_ray.data.prepare.nearest import take_nearest
from medfl_ray.data.volume import Affine, Array, Volume, spacing_of
from medfl_ray.errors import GeometryError, LabelError

Labels = npt.NDArray[np.uint8]


class Prepared(BaseModel):
    """A volume after preparation: image [C, *S], label [*S] or a class index, affine in RAS mm."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    image: npt.NDArray[Any]
    label: npt.NDArray[Any] | int | None
    affine: npt.NDArray[Any]
    spacing_mm: tuple[float, ...]


class Preprocessing(BaseModel):
    """How a volume is oriented, resampled and normalised; goes into the exported model's package.

    `label_values[i]` is the value in the label files of the model's class i + 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spatial_dims: Literal[2, 3] = 3
    orientation: Literal["RAS"] | None = "RAS"
    spacing_mm: tuple[float, ...] | None = None
    intensity: Literal["zscore", "percentile", "window", "none"] = "zscore"
    window: tuple[float, float] | None = None
    channels: tuple[str, ...] = ()
    label_values: tuple[int, ...] = ()

    @classmethod
    def from_config(
        cls, data: DataConfig, spatial_dims: int, channels: tuple[str, ...], label_values: tuple[int, ...]
    ) -> Preprocessing:
        """Take the preparation that a run asks for."""
        spacing = data.spacing_mm
        if spacing is not None and len(spacing) == 1:
            spacing = spacing * spatial_dims
        return cls(
            spatial_dims=2 if spatial_dims == 2 else 3,
            orientation="RAS" if spatial_dims == 3 else None,
            spacing_mm=spacing,
            intensity=data.intensity,
            window=data.window,
            channels=channels,
            label_values=label_values,
        )

    def prepare(self, image: Volume, label: Volume | int | None = None, max_voxels: int | None = None) -> Prepared:
        """Orient, resample and normalise a volume and, in training, its label.

        Args:
          max_voxels: most voxels of the prepared image, over all channels.

        Raises:
          GeometryError: the image does not have the dimensions or channels that the model needs, or is too large at the
            model's spacing.
          LabelError: the label has a value that no class has.
        """
        image = self._flatten(self._check_channels(image))
        array, affine = self._place(image.array, image.affine, "bilinear", max_voxels)
        if isinstance(label, Volume):
            label = self._flatten(label)
            placed, _ = self._place(label.array, label.affine, mode="nearest")
            target: Labels | int | None = self._classes(placed[0])
        else:
            target = label
        return Prepared(
            image=self._normalise(array), label=target, affine=affine, spacing_mm=spacing_of(affine, self.spatial_dims)
        )

    def restore(self, classes: Labels, affine: Affine, original: Volume) -> Labels:
        """Carry predicted classes [*S] back to the original image's grid and label values, nearest neighbour."""
        values = np.array([0, *self.label_values], dtype=np.uint8)
        if self.spatial_dims == 2:
            scale = np.array(self._flatten(original).spacing_mm) / np.array(spacing_of(affine, 2))
            matrix, offset, shape = np.diag(scale), np.zeros(2), self._flatten(original).spatial_shape
        else:
            chain = np.linalg.inv(affine) @ original.affine
            matrix, offset, shape = chain[:3, :3], chain[:3, 3], original.spatial_shape
        restored = take_nearest(classes, matrix, offset, shape)
        coded: Labels = values.take(restored) if self.label_values else restored
        return coded.reshape(original.spatial_shape)

    def _check_channels(self, image: Volume) -> Volume:
        if self.channels and image.array.shape[0] != len(self.channels):
            raise GeometryError(
                f"the image has {image.array.shape[0]} channels; expected {len(self.channels)} "
                f"({', '.join(self.channels)})"
            )
        return image

    def _flatten(self, volume: Volume) -> Volume:
        """Drop the one-voxel axis of a slice in a 2D task; refuse every other difference of dimensions."""
        found = len(volume.spatial_shape)
        if found == self.spatial_dims:
            return volume
        thin = [axis for axis, length in enumerate(volume.spatial_shape) if length == 1]
        if self.spatial_dims == 3 or not thin:
            raise GeometryError(
                f"the image has {found} axes (shape {volume.spatial_shape}); data.spatial_dims is {self.spatial_dims}"
            )
        kept = [axis for axis in range(3) if axis != thin[0]]
        spacing = [volume.spacing_mm[axis] for axis in kept]
        return Volume(np.squeeze(volume.array, axis=thin[0] + 1), np.diag([*spacing, 1.0, 1.0]), volume.notes)

    def _place(self, array: Array, affine: Affine, mode: str, max_voxels: int | None = None) -> tuple[Array, Affine]:
        from medfl_ray.data.prepare.placement import place

        return place(array, affine, self.orientation, self.spacing_mm, mode, max_voxels)

    def _classes(self, values: Array) -> Labels:
        """Turn label values into class indices 0..len(label_values)."""
        if not self.label_values:
            return values.astype(np.uint8)
        known = np.array([0, *self.label_values], dtype=np.float32)
        order = np.argsort(known)
        place = np.clip(np.searchsorted(known[order], values), 0, len(known) - 1)
        if not np.array_equal(known[order][place], values):
            strange = sorted(set(np.unique(values).tolist()) - set(known.tolist()))
            raise LabelError(
                f"the label has the value {strange[0]:g}; expected 0 (background) or one of "
                f"{sorted(self.label_values)}. "
                "Name every value in data.labels, or correct the label"
            )
        classes: Labels = order[place].astype(np.uint8)
        return classes

    def _normalise(self, array: Array) -> Array:
        from medfl_ray.data.prepare.placement import normalise

        return normalise(array, self.intensity, self.window)
