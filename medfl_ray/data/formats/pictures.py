"""PNG, JPEG and TIFF pictures."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from medfl_ray.data.volume import Volume
from medfl_ray.errors import GeometryError, UnreadableFile

COLOUR_CHANNELS = (3, 4)


def read_picture(path: Path, as_label: bool) -> Volume:
    """Read a picture as [C, rows, columns], or a many-page TIFF as [1, pages, rows, columns], 1 mm apart.

    An alpha channel is dropped. Of a palette picture a label keeps the indices, an image takes the colours.

    Raises:
      UnreadableFile: the file is truncated, not a picture, or too large to be one.
      GeometryError: the TIFF has axes that are neither pages, rows, columns nor colours.
    """
    try:
        values = _read_tiff(path) if path.suffix.lower() in (".tif", ".tiff") else _read_pillow(path, as_label)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableFile("the picture has more pixels than a medical image should; cut it into tiles") from None
    except (
        tifffile.TiffFileError,
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        OSError,
        zlib.error,
        IndexError,
    ) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, UnreadableFile, GeometryError)):
            raise
        raise UnreadableFile(
            f"not a complete picture ({type(error).__name__}); copy it again from its source"
        ) from None
    return Volume(np.ascontiguousarray(values, dtype=np.float32), np.eye(4))


def _read_pillow(path: Path, as_label: bool) -> npt.NDArray[np.generic]:
    with Image.open(path) as opened:
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if (picture.mode == "P" and not as_label) or picture.mode in ("CMYK", "YCbCr", "HSV", "LAB", "PA"):
            picture = picture.convert("RGB")
        values = np.asarray(picture)
    if values.ndim == 2:
        return values[None]
    # LA and RGBA end with alpha, which is not an image channel.
    kept = values[..., : {2: 1, 4: 3}.get(values.shape[2], values.shape[2])]
    return np.moveaxis(kept, 2, 0)


def _read_tiff(path: Path) -> npt.NDArray[np.generic]:
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        values, axes = series.asarray(), series.axes
    if "S" in axes:
        place = axes.index("S")
        values = np.moveaxis(values, place, 0)[:3]
        return _spatial(values, values.ndim - 1)
    if "C" in axes:
        return _spatial(np.moveaxis(values, axes.index("C"), 0), values.ndim - 1)
    return _spatial(values[None], values.ndim)


def _spatial(values: npt.NDArray[np.generic], num_axes: int) -> npt.NDArray[np.generic]:
    if num_axes not in (2, 3):
        raise GeometryError(
            f"the TIFF file has {num_axes} axes beside its channels; expected rows and columns, or pages too"
        )
    return values
