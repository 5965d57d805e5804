"""What a model package says of itself: model.json, as serving, the registry and the model card read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfl_ray.config.model import ModelConfig
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.prepare.windows import SlidingWindow
from medfl_ray.errors import ExportError
from medfl_ray.export.precision import VariantName

DESCRIPTION = "model.json"
PACKAGE_FORMAT = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ChannelIntensities(_Part):
    """Mean, standard deviation and percentiles (1, 25, 50, 75, 99) of one channel's voxels before normalisation."""

    mean: float
    std: float
    percentiles: tuple[float, float, float, float, float]


class Fingerprint(_Part):
    """Intensities that a model was trained on, of public or synthetic images alone; serving measures drift from it."""

    origin: str
    num_images: int
    channels: tuple[ChannelIntensities, ...]


class Variant(_Part):
    """One ONNX file of the package and what its precision costs, measured on the images that `images` names.

    `dice_loss` is 1 minus the Dice with the float32 labels; `truth_loss` is what float32's Dice with the true labels
    is above this one's, where the images have labels; `speed` is float32's seconds over this one's.
    """

    file: str
    sha256: str
    size_bytes: int
    dice_loss: float | None = None
    truth_loss: float | None = None
    speed: float | None = None
    images: str = ""


class PackageDescription(_Part):
    """The whole of model.json; shapes: C image channels, L output channels, S voxels per axis."""

    format: Literal[2] = 2
    name: str
    task: Literal["segmentation", "classification"]
    network: ModelConfig
    spatial_dims: Literal[2, 3]
    channels: tuple[str, ...]
    labels: dict[int, str]
    out_channels: int
    patch_size: tuple[int, ...]
    size_divisor: int
    dynamic_batch: bool
    dynamic_space: bool
    dynamic_space_note: str
    preprocessing: Preprocessing
    sliding_window: SlidingWindow = SlidingWindow()
    fingerprint: Fingerprint | None = None
    privacy: dict[str, Any]
    weights_checksum: str
    opset: int
    input: str
    output: str
    variants: dict[VariantName, Variant]
    parity: dict[str, Any]

    @property
    def num_channels(self) -> int:
        """Image channels of the network."""
        return self.network.in_channels or len(self.channels)


def read_description(directory: Path) -> PackageDescription:
    """Read model.json of a package.

    Raises:
      ExportError: there is none, it is damaged, or an earlier version wrote it.
    """
    path = directory / DESCRIPTION
    try:
        return PackageDescription.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{directory.name!r} has no {DESCRIPTION}; export the run's model first: medfl-ray export RUN"
        ) from None
    except (OSError, UnicodeDecodeError, ValidationError):
        raise ExportError(
            f"{DESCRIPTION} of {directory.name!r} is damaged or of another version; write it again with "
            "medfl-ray export RUN"
        ) from None
