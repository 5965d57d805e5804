"""Images that may be shown, for what an export has to try out: calibration of int8, and what a variant loses.

Ranges of activations end up in the file that a hospital or the public downloads. That is why they are never taken
from private patients: only from the run's own public or synthetic data, a folder declared so, or phantoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.prepare.dataset import HospitalData
from medfl_ray.errors import ExportError
from medfl_ray.export.package import ModelPackage
from medfl_ray.export.parity import Image, phantom_image

Labels = npt.NDArray[np.uint8]
NUM_CALIBRATION = 8
NUM_MEASURED = 8
NUM_PHANTOMS = 4


@dataclass(frozen=True)
class CalibrationFolder:
    """A folder of images whose owner declares them public or synthetic."""

    directory: Path
    declared: Literal["public", "synthetic"]
    format: str = "auto"


@dataclass(frozen=True)
class OpenImages:
    """Prepared images [C, *S]: some to calibrate on, others to measure on where there are others.

    `truths` are true label images [*S] of the measured ones, none where an image has no such label.
    """

    calibration: tuple[Image, ...]
    measured: tuple[Image, ...]
    truths: tuple[Labels, ...]
    origin: str


def open_images(package: ModelPackage, data: HospitalData | None, folder: CalibrationFolder | None) -> OpenImages:
    """Take a folder's images, or the run's own that are not private, or phantoms.

    Raises:
      ExportError: the data are private.
      DataError: the folder cannot be read.
    """
    if folder is not None:
        return _from_folder(package, folder)
    if data is not None:
        if data.declared == "private":
            raise ExportError(
                "the images for calibration are private; ranges of their intensities would be released with the model. "
                "Give a folder of public or synthetic images with --calibration"
            )
        held_out = [data.holdout[i] for i in range(min(NUM_MEASURED, len(data.holdout)))]
        return _of_cases(
            _images(data.train, NUM_CALIBRATION), held_out, f"{len(held_out)} held-out {data.declared} images"
        )
    phantoms = [phantom_image(package, index) for index in range(2 * NUM_PHANTOMS)]
    return OpenImages(tuple(phantoms[:NUM_PHANTOMS]), tuple(phantoms[NUM_PHANTOMS:]), (), f"{NUM_PHANTOMS} phantoms")


def _from_folder(package: ModelPackage, folder: CalibrationFolder) -> OpenImages:
    from medfl_ray.data.layouts.labelled_folder import open_labelled_folder

    cases = open_labelled_folder(
        folder.directory, folder.format, package.task, package.preprocessing, package.labels
    ).holdout
    calibration = min(NUM_CALIBRATION, max(1, len(cases) // 2))
    first = calibration if len(cases) > 1 else 0
    measured = [cases[i] for i in range(first, min(first + NUM_MEASURED, len(cases)))]
    origin = f"{len(measured)} {folder.declared} images of a folder"  # whose name may be anything, a patient's too
    return _of_cases(_images(cases, calibration), measured, origin)


def _of_cases(calibration: tuple[Image, ...], measured: Sequence[PreparedCase], origin: str) -> OpenImages:
    truths = [case.label for case in measured if isinstance(case.label, np.ndarray)]
    return OpenImages(calibration, tuple(case.image for case in measured), tuple(truths), origin)


def _images(cases: Sequence[PreparedCase], count: int) -> tuple[Image, ...]:
    return tuple(cases[i].image for i in range(min(count, len(cases))))
