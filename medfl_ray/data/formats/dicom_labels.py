"""Labels in DICOM: SEG objects and RTSTRUCT contours, laid on the grid of their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from medfl_ray.data.formats.dicom_files import LABEL_MODALITIES, open_dicom
from medfl_ray.data.volume import LPS_TO_RAS, Volume
from medfl_ray.errors import GeometryError, LabelError, UnreadableFile

Mask = npt.NDArray[np.bool_]
HALF = 0.5  # Probability from which a voxel of a fractional segment belongs to it.


def read_dicom_label(path: Path, reference: Volume, labels: Mapping[int, str], by_name_alone: bool = False) -> Volume:
    """Read a SEG or RTSTRUCT object as label values [1, *S] on the image's grid.

    Segments and regions are matched to `labels` by name, and without a match by number unless the name alone counts,
    as it does of private data. Where they
    overlap, the higher value wins. Regions that `labels` does not name are left out; both is noted.

    Raises:
      LabelError: the object is of another kind, or has none of the regions.
      GeometryError: the object does not lie on the image's grid.
    """
    if not path.is_file():
        raise UnreadableFile("the label file does not exist or is a folder; expected one DICOM SEG or RTSTRUCT file")
    dataset = open_dicom(path)
    modality = str(dataset.get("Modality", ""))
    if modality not in LABEL_MODALITIES:
        raise LabelError(f"the label is a DICOM {modality or 'object without modality'}; expected SEG or RTSTRUCT")
    names = _names(dataset)
    values = match_values(names, labels, by_name_alone)
    if modality == "SEG":
        masks = _segments(dataset, values, reference)
    else:
        from medfl_ray.data.formats.contours import fill_regions

        masks = fill_regions(dataset, values, reference)
    return _merge(masks, values, reference, [names[n] for n in names if n not in values])


def name_segments(files: Sequence[Path]) -> dict[int, str]:
    """Return {value: name} over the segments and regions of several label objects.

    Numbers are kept where all files agree on them; otherwise the names are numbered in order.
    """
    by_file = [_names(open_dicom(file, pixels=False)) for file in files]
    merged: dict[int, str] = {}
    for names in by_file:
        for number, name in names.items():
            if merged.setdefault(number, name).casefold() != name.casefold():
                every = sorted({n.casefold(): n for found in by_file for n in found.values()}.values())
                return {i + 1: n for i, n in enumerate(every)}
    return dict(sorted(merged.items()))


def match_values(names: Mapping[int, str], labels: Mapping[int, str], by_name_alone: bool = False) -> dict[int, int]:
    """Return {segment number: label value} for the segments that are wanted.

    Raises:
      LabelError: no segment matches, with the names that were found.
    """
    wanted = {name.casefold().strip(): value for value, name in labels.items()}
    by_name = {n: wanted[name.casefold().strip()] for n, name in names.items() if name.casefold().strip() in wanted}
    if by_name:
        return by_name
    by_number = {n: n for n in names if not labels or n in labels}
    if by_name_alone or not by_number or not _plain_numbers(names):
        raise LabelError(
            f"the label object has the regions {sorted(names.values())}; expected one of {sorted(labels.values())} "
            "(data.labels)"
        )
    return by_number


def _plain_numbers(names: Mapping[int, str]) -> bool:
    return all(0 < number <= 255 for number in names)


def _names(dataset: Dataset) -> dict[int, str]:
    """Segment or region names by number."""
    if "SegmentSequence" in dataset:
        return {
            int(s.SegmentNumber): str(s.get("SegmentLabel", ""))
            for s in dataset.SegmentSequence
            if int(s.SegmentNumber)
        }
    regions = dataset.get("StructureSetROISequence") or []
    return {int(r.ROINumber): str(r.get("ROIName", "")) for r in regions}


def _merge(masks: Mapping[int, Mask], values: Mapping[int, int], reference: Volume, left_out: list[str]) -> Volume:
    array = np.zeros(reference.spatial_shape, dtype=np.float32)
    overlap = 0
    for number in sorted(masks, key=lambda n: values[n]):
        overlap += int((array[masks[number]] > 0).sum())
        array[masks[number]] = values[number]
    notes = [f"{overlap} voxels belong to several regions; the higher label value was kept"] if overlap else []
    if left_out:
        notes.append(f"regions without a label value were left out: {', '.join(sorted(left_out))}")
    return Volume(array[None], reference.affine, tuple(notes))


def _segments(dataset: Dataset, values: Mapping[int, int], reference: Volume) -> dict[int, Mask]:
    """Masks of the segments of a SEG object; fractional ones from a probability of a half."""
    import highdicom

    if not any(key in dataset for key in ("PixelData", "FloatPixelData")):
        raise UnreadableFile("the SEG object has no pixels; it is truncated")
    try:
        segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
    except Exception as error:  # noqa: BLE001 - any missing attribute of the object ends up here
        raise UnreadableFile(f"the SEG object is damaged ({type(error).__name__}); export it again") from None
    if len(reference.spatial_shape) == 2:
        return _flat_segments(segmentation, values, reference)
    numbers = sorted(values)
    try:
        volume = segmentation.get_volume(segment_numbers=numbers, combine_segments=False, dtype=np.float32)
    except Exception as error:  # noqa: BLE001 - highdicom keeps frames in SQLite and passes its errors on
        raise GeometryError(
            f"the frames of the SEG object do not form a volume ({type(error).__name__}); export it again"
        ) from None
    grid = highdicom.VolumeGeometry(LPS_TO_RAS @ reference.affine, reference.spatial_shape, "PATIENT")
    try:
        matched = volume.match_geometry(grid, tol=0.05 * min(reference.spacing_mm))
    except (RuntimeError, ValueError):
        raise GeometryError(
            f"the SEG object does not lie on the grid of its image (shape {reference.spatial_shape}); it was drawn on "
            "another "
            "series, or resampled"
        ) from None
    return {number: np.asarray(matched.array[..., i]) >= HALF for i, number in enumerate(numbers)}


def _flat_segments(segmentation: Dataset, values: Mapping[int, int], reference: Volume) -> dict[int, Mask]:
    """Masks of a SEG on one picture, which has no place in the patient: one frame per segment."""
    frames = np.atleast_3d(np.asarray(segmentation.pixel_array))
    frames = frames if frames.shape[1:] == reference.spatial_shape else np.moveaxis(frames, -1, 0)
    groups = segmentation.PerFrameFunctionalGroupsSequence
    if frames.shape[1:] != reference.spatial_shape:
        raise GeometryError(
            f"the SEG frames have shape {frames.shape[1:]}, the picture {reference.spatial_shape}; they must be equal"
        )
    scale = float(segmentation.get("MaximumFractionalValue") or 1)
    masks: dict[int, Mask] = {n: np.zeros(reference.spatial_shape, dtype=bool) for n in values}
    for frame, group in zip(frames, groups, strict=False):
        number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        if number in masks:
            masks[number] |= frame / scale >= HALF
    return masks
