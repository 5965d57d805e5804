"""DICOM images: a series of slices put in order by geometry, multi-frame objects, single pictures.

Decompression is pydicom's, with pylibjpeg, pyjpegls, Pillow and jpeg_frames.py; geometry of multi-frame objects is
highdicom's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut

from medfl_ray.data.formats.dicom_files import NOT_IMAGES, dicom_files, open_dicom
from medfl_ray.data.volume import LPS_TO_RAS, Affine, Volume
from medfl_ray.errors import GeometryError, LayoutError, UnreadableFile

PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
UNEVEN = 0.1  # Share of the slice spacing by which gaps may differ.
MAX_TILED_PIXELS = 64 * 1024 * 1024


def read_dicom(path: Path, series_uid: str = "") -> Volume:
    """Read a DICOM file, or the one image series of a folder.

    Raises:
      UnreadableFile: a file is damaged, or its compression cannot be decoded.
      LayoutError: the folder holds no image series, or several and `series_uid` names none of them.
      GeometryError: slices are missing, doubled, of different size, or not in space.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError
        return read_series([path])[0]
    found = [(file, open_dicom(file, pixels=False)) for file in dicom_files(path)]
    by_series: dict[str, list[Path]] = {}
    for file, header in found:
        if str(header.get("Modality", "")) not in NOT_IMAGES:
            by_series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(file)
    if series_uid:
        by_series = {uid: files for uid, files in by_series.items() if uid == series_uid}
    if len(by_series) != 1:
        raise LayoutError(
            f"the DICOM folder holds {len(by_series)} image series; expected one. Put each series into a folder of "
            "its own, "
            "or list the patients' folders with data.format: dicom"
        )
    uid, files = next(iter(by_series.items()))
    notes = () if uid else ("files without a series UID were taken as one series",)
    return read_series(files, notes)[0]


def read_series(files: Sequence[Path], notes: tuple[str, ...] = ()) -> tuple[Volume, tuple[Path, ...]]:
    """Build a volume from the files of one series, decoding one slice at a time.

    Returns the volume and the files in the order of its slices, second copies left out.
    """
    files, headers, notes = _without_copies(files, notes)
    modality = str(headers[0].get("Modality", ""))
    if modality in NOT_IMAGES and modality != "RTDOSE":
        raise LayoutError(f"the DICOM object is a {modality}, not an image; list it as a label or leave it out")
    if len(headers) == 1 and _num_frames(headers[0]) > 1:
        return _multi_frame(open_dicom(files[0]), notes), tuple(files)
    if any(_num_frames(header) > 1 for header in headers):
        raise GeometryError("the series mixes multi-frame objects with others; put each into a folder of its own")
    if len(headers) == 1 and "ImagePositionPatient" not in headers[0]:
        return _picture(open_dicom(files[0]), notes), tuple(files)
    order, affine = _in_space(headers)
    ordered = tuple(files[place] for place in order)
    return Volume(_stacked(ordered), affine, notes), ordered


def _stacked(files: Sequence[Path]) -> npt.NDArray[np.float32]:
    """Decode the slices of a series into one array [C, K, rows, columns]."""
    first = _pixels(open_dicom(files[0]))
    array = np.empty((first.shape[0], len(files), *first.shape[1:]), dtype=np.float32)
    array[:, 0] = first
    for place, file in enumerate(files[1:], start=1):
        pixels = _pixels(open_dicom(file))
        if pixels.shape != first.shape:
            raise GeometryError(
                f"the slices have different sizes ({sorted({first.shape[1:], pixels.shape[1:]})}); the series is mixed"
            )
        array[:, place] = pixels
    return array


def _num_frames(dataset: Dataset) -> int:
    return int(dataset.get("NumberOfFrames") or 1)


def _without_copies(
    files: Sequence[Path], notes: tuple[str, ...]
) -> tuple[list[Path], list[FileDataset], tuple[str, ...]]:
    """Drop second copies of one object; objects that share a UID but differ are an error.

    Returns the files that are kept, their headers, and the notes.
    """
    kept: dict[str, Path] = {}
    chosen: list[tuple[Path, FileDataset]] = []
    nameless = copies = 0
    for file in files:
        header = open_dicom(file, pixels=False)
        uid = str(header.get("SOPInstanceUID", ""))
        nameless += not uid
        if not uid or uid not in kept:
            kept.setdefault(uid, file)
            chosen.append((file, header))
        elif open_dicom(kept[uid]).get("PixelData") == open_dicom(file).get("PixelData"):
            copies += 1
        else:
            raise GeometryError(
                "two files share one SOP instance UID but have different pixels; export the series again"
            )
    if copies:
        notes = (*notes, f"{copies} second copies of slices were left out")
    if nameless:
        notes = (*notes, f"{nameless} files without a SOP instance UID were kept")
    return [file for file, _ in chosen], [header for _, header in chosen], notes


def _in_space(datasets: Sequence[Dataset]) -> tuple[list[int], Affine]:
    """Return the order of the slices along their normal, and the affine of [slice, row, column].

    Source: DICOM PS3.3 C.7.6.2.1.1, turned from LPS to RAS.
    """
    if any("ImagePositionPatient" not in d or "ImageOrientationPatient" not in d for d in datasets):
        raise GeometryError(
            "a slice lacks ImagePositionPatient or ImageOrientationPatient; slices cannot be put in order without"
        )
    orientations = np.array([[float(v) for v in d.ImageOrientationPatient] for d in datasets])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise GeometryError("the slices have different orientations; the series is mixed (a localiser among them?)")
    spacings = np.array([_pixel_spacing(d) for d in datasets])
    if np.abs(spacings - spacings[0]).max() > 1e-3:
        raise GeometryError("the slices have different pixel spacings; the series is mixed")
    along_columns, along_rows = orientations[0][:3], orientations[0][3:]
    normal = np.cross(along_columns, along_rows)
    positions = np.array([[float(v) for v in d.ImagePositionPatient] for d in datasets])
    order = np.argsort(positions @ normal, kind="stable")
    step = _slice_step(positions[order], normal, datasets[0])
    affine: Affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = along_rows * spacings[0][0]
    affine[:3, 2] = along_columns * spacings[0][1]
    affine[:3, 3] = positions[order[0]]
    return [int(place) for place in order], LPS_TO_RAS @ affine


def _slice_step(
    positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64], first: Dataset
) -> npt.NDArray[np.float64]:
    """Vector from one slice to the next; slices are evenly spaced or it is an error."""
    if len(positions) == 1:
        return normal * float(first.get("SpacingBetweenSlices") or first.get("SliceThickness") or 1.0)
    gaps = np.diff(positions @ normal)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise GeometryError(
            f"{int((gaps < 1e-3).sum()) + 1} slices lie at one place; the series holds several echoes, phases or "
            "copies. Separate them"
        )
    if gaps.max() > (1 + UNEVEN) * usual or gaps.min() < (1 - UNEVEN) * usual:
        raise GeometryError(
            f"slices are missing or uneven: gaps run from {gaps.min():.2f} to {gaps.max():.2f} mm, usually "
            f"{usual:.2f} mm. "
            "Export the complete series"
        )
    step: npt.NDArray[np.float64] = (positions[-1] - positions[0]) / (len(positions) - 1)
    return step


def _pixel_spacing(dataset: Dataset) -> tuple[float, float]:
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or (1.0, 1.0)
    return float(spacing[0]), float(spacing[1])


def _pixels(dataset: FileDataset) -> npt.NDArray[np.float32]:
    """Decode one frame to [C, rows, columns] in the unit of the modality (Hounsfield units in CT)."""
    values = decode_pixels(dataset)
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
    if values.ndim == 3:
        return np.moveaxis(values, -1, 0).astype(np.float32)
    try:
        scaled = apply_modality_lut(values, dataset).astype(np.float32)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UnreadableFile(
            f"the rescale slope or intercept is not usable ({type(error).__name__}); correct the DICOM header"
        ) from None
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        scaled = scaled.max() + scaled.min() - scaled
    return scaled[None]


def decode_pixels(dataset: FileDataset) -> npt.NDArray[np.generic]:
    """Decompress the pixels of an object.

    Raises:
      UnreadableFile: there are none, too few, or the transfer syntax cannot be decoded.
    """
    if not any(key in dataset for key in PIXELS):
        raise UnreadableFile("the DICOM object has no pixels; it is a truncated image or not an image at all")
    try:
        pixels: npt.NDArray[np.generic] = dataset.pixel_array
    except Exception as error:  # noqa: BLE001 - decoders of many packages fail with types of their own
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        name = getattr(syntax, "name", "no transfer syntax")
        raise UnreadableFile(
            f"the pixels cannot be decoded ({type(error).__name__}, {name}); the file is truncated or damaged"
        ) from None
    return pixels


def _picture(dataset: FileDataset, notes: tuple[str, ...]) -> Volume:
    rows_mm, columns_mm = _pixel_spacing(dataset)
    return Volume(_pixels(dataset), np.diag([rows_mm, columns_mm, 1.0, 1.0]), notes)


def _multi_frame(dataset: FileDataset, notes: tuple[str, ...]) -> Volume:
    """Build a volume from an enhanced multi-frame object, or the whole picture of a tiled one."""
    import highdicom

    if not any(key in dataset for key in PIXELS):
        raise UnreadableFile("the multi-frame object has no pixels; it is truncated")
    if "TotalPixelMatrixRows" in dataset:
        return _tiled(dataset, notes)
    try:
        image = highdicom.Image.from_dataset(dataset, copy=False)
        volume = image.get_volume(dtype=np.float32, apply_presentation_lut=False)
    except Exception as error:  # noqa: BLE001 - highdicom keeps frames in SQLite and passes its errors on
        raise GeometryError(
            f"the {_num_frames(dataset)} frames do not form one evenly spaced volume ({type(error).__name__}); "
            "a film, several phases or missing frames cannot be used as a volume"
        ) from None
    array = np.asarray(volume.array, dtype=np.float32)
    stacked = array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)
    return Volume(np.ascontiguousarray(stacked), LPS_TO_RAS @ np.asarray(volume.affine), notes)


def _tiled(dataset: FileDataset, notes: tuple[str, ...]) -> Volume:
    import highdicom

    num_pixels = int(dataset.TotalPixelMatrixRows) * int(dataset.TotalPixelMatrixColumns)
    if num_pixels > MAX_TILED_PIXELS:
        raise GeometryError(
            f"the slide has {num_pixels} pixels; at most {MAX_TILED_PIXELS} are read at once. Cut it into tiles"
        )
    try:
        matrix = highdicom.Image.from_dataset(dataset, copy=False).get_total_pixel_matrix(apply_icc_profile=False)
    except (RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UnreadableFile(
            f"the tiles of the slide cannot be put together ({type(error).__name__}); export it again"
        ) from None
    array = np.asarray(matrix, dtype=np.float32)
    return Volume(np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None], np.eye(4), notes)
