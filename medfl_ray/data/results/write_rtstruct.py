"""RTSTRUCT objects: the outlines of each label, slice by slice, in the patient's millimetres."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from contourpy import FillType, contour_generator
from matplotlib.colors import to_rgb
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from scipy.spatial import KDTree

from medfl_ray.data.results.write_seg import MANUFACTURER, MODEL_NAME, SERIES_NUMBER, referable_headers
from medfl_ray.data.uploads.read import Upload
from medfl_ray.data.volume import LPS_TO_RAS
from medfl_ray.errors import DataError

if TYPE_CHECKING:
    from medfl_ray.data.results.mask_files import Mask, MaskOrigin

Points = npt.NDArray[np.float64]
COPIED = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName", "FrameOfReferenceUID",
)  # fmt: skip
NEIGHBOURS, STEPS_PER_VOXEL, FROM_CENTRE = 8, 50, 0.05
COLOURS = ("#ff8a3d", "#35c4f0", "#ffd84d", "#7be08b", "#ff6fae", "#b79bff", "#58e0c9", "#ff5f5f")


def write_structure_set(mask: Mask, upload: Upload, labels: Mapping[int, str], origin: MaskOrigin) -> bytes:
    """Write a mask as an RTSTRUCT object; a hole is cut by a keyhole, as DICOM asks (PS3.3 C.8.8.6.3).

    Raises:
      DataError: the image is a picture without a place in the patient, or lacks UIDs.
    """
    headers = referable_headers(upload)
    if mask.ndim != 3 or not headers[0].get("FrameOfReferenceUID"):
        raise DataError("the image has no frame of reference, so that contours have no place; ask for nifti")
    plan = _empty_object(headers[0], origin)
    plan.ReferencedFrameOfReferenceSequence = [_referenced_images(headers)]
    plan.StructureSetROISequence, plan.ROIContourSequence, plan.RTROIObservationsSequence = [], [], []
    to_mm = LPS_TO_RAS @ upload.volume.affine
    for number, (value, name) in enumerate(labels.items(), start=1):
        plan.StructureSetROISequence.append(_region(number, name, headers[0], origin))
        plan.ROIContourSequence.append(_contours(number, mask == value, to_mm, headers))
        plan.RTROIObservationsSequence.append(_observation(number))
    buffer = io.BytesIO()
    plan.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def outlines(plane: npt.NDArray[np.bool_]) -> Iterator[Points]:
    """Yield closed outlines [N, 2] in (row, column) voxels of the regions of a plane, holes joined by keyholes.

    Outlines pass half-way between voxels inside and outside, so that filling them gives the plane back.
    """
    if not plane.any():
        return
    padded = np.pad(plane.astype(np.float64), 1)
    generator = contour_generator(z=padded, fill_type=FillType.OuterOffset)
    for points, offsets in zip(*generator.filled(0.5, np.inf), strict=True):
        rings = [_straightened(points[a:b][:-1, ::-1] - 1.0) for a, b in pairwise(offsets)]
        outline = rings[0]
        for hole in rings[1:]:
            outline = _keyhole(outline, hole)
        yield outline


def _straightened(ring: Points) -> Points:
    """Drop the points of a closed ring that lie between two others on one line."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    kept = ring[np.abs(turns) > 1e-9]
    return kept if len(kept) >= 3 else ring


def _keyhole(outline: Points, hole: Points) -> Points:
    """Join a hole to its outline by a short cut of no width; it keeps off voxel centres, whose side it would blur."""
    nearest = min(NEIGHBOURS, len(outline))
    distances, found = KDTree(outline).query(hole, k=nearest)
    order = np.argsort(distances, axis=None)
    pairs = [(int(np.reshape(found, -1)[flat]), int(flat) // nearest) for flat in order]
    outer, inner = next((p for p in pairs if _keeps_off_centres(outline[p[0]], hole[p[1]])), pairs[0])
    around = np.roll(hole, -inner, axis=0)
    return np.concatenate([outline[: outer + 1], around, around[:1], outline[outer:]])


def _keeps_off_centres(start: Points, end: Points) -> bool:
    """Whether a line between two points stays away from whole-numbered points."""
    steps = int(np.ceil(np.abs(end - start).max() * STEPS_PER_VOXEL)) + 1
    along = start + np.linspace(0, 1, steps)[:, None] * (end - start)
    return bool(np.linalg.norm(along - np.rint(along), axis=1).min() > FROM_CENTRE)


def _contours(
    number: int, mask: npt.NDArray[np.bool_], to_mm: npt.NDArray[np.float64], headers: Sequence[FileDataset]
) -> Dataset:
    region = Dataset()
    region.ROIDisplayColor = [round(255 * part) for part in to_rgb(COLOURS[(number - 1) % len(COLOURS)])]
    region.ReferencedROINumber = number
    region.ContourSequence = []
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        for outline in outlines(mask[index]):
            voxels = np.column_stack([np.full(len(outline), index), outline, np.ones(len(outline))])
            region.ContourSequence.append(_contour((to_mm @ voxels.T)[:3].T, headers, int(index)))
    if not region.ContourSequence:
        del region.ContourSequence
    return region


def _contour(points_mm: Points, headers: Sequence[FileDataset], index: int) -> Dataset:
    contour, image = Dataset(), Dataset()
    header = headers[index] if len(headers) > 1 else headers[0]
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    contour.ContourImageSequence = [image]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(points_mm)
    contour.ContourData = [f"{value:.4f}" for value in points_mm.ravel()]
    return contour


def _region(number: int, name: str, header: FileDataset, origin: MaskOrigin) -> Dataset:
    region = Dataset()
    region.ROINumber, region.ROIName = number, name[:64] or f"label {number}"
    region.ReferencedFrameOfReferenceUID = header.FrameOfReferenceUID
    region.ROIGenerationAlgorithm = "AUTOMATIC"
    region.ROIGenerationDescription = f"{origin.model} {origin.version}"[:64]
    return region


def _observation(number: int) -> Dataset:
    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIInterpretedType = observation.ROIInterpreter = ""
    return observation


def _referenced_images(headers: Sequence[FileDataset]) -> Dataset:
    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = headers[0].SeriesInstanceUID
    series.ContourImageSequence = []
    for header in headers:
        image = Dataset()
        image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        series.ContourImageSequence.append(image)
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # detached study management, as DICOM prescribes here
    study.ReferencedSOPInstanceUID = headers[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = headers[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _empty_object(header: FileDataset, origin: MaskOrigin) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = RTStructureSetStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    plan = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    plan.SOPClassUID, plan.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    if "SpecificCharacterSet" in header:
        plan.SpecificCharacterSet = header.SpecificCharacterSet
    for keyword in COPIED:
        plan[keyword] = header[keyword]
    now = dt.datetime.now(tz=dt.UTC)
    plan.Modality, plan.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    plan.SeriesNumber, plan.InstanceNumber = SERIES_NUMBER + 1, 1
    plan.Manufacturer, plan.ManufacturerModelName, plan.OperatorsName = MANUFACTURER, MODEL_NAME, ""
    plan.PositionReferenceIndicator = ""
    plan.SeriesDescription = f"{origin.model} {origin.version}"[:64]
    plan.StructureSetLabel = "SEGMENTATION"
    plan.StructureSetDate = plan.InstanceCreationDate = plan.SeriesDate = now.strftime("%Y%m%d")
    plan.StructureSetTime = plan.InstanceCreationTime = plan.SeriesTime = now.strftime("%H%M%S")
    plan.ApprovalStatus = "UNAPPROVED"
    return plan
