"""DICOM-SEG objects by highdicom, one binary segment per label, coded with SNOMED."""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import highdicom
import numpy as np
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset, FileDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from medfl_ray.data.formats.label_codes import LabelCode, code_of
from medfl_ray.data.uploads.read import Upload
from medfl_ray.data.volume import LPS_TO_RAS
from medfl_ray.errors import DataError

if TYPE_CHECKING:
    from medfl_ray.data.results.mask_files import Mask, MaskOrigin

MANUFACTURER, MODEL_NAME = "medfl-ray", "medfl-ray serve"
SERIES_NUMBER = 9000
# What every composite object names, if only by an empty value; old archives leave some of it out.
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")


def referable_headers(upload: Upload) -> tuple[FileDataset, ...]:
    """Return the image's headers with what a result copies from them.

    Raises:
      DataError: an image has no UID to refer to.
    """
    for header in upload.headers:
        missing = [keyword for keyword in NEEDED if not header.get(keyword)]
        if missing:
            raise DataError(f"the images have no {missing[0]}, and no DICOM object can refer to them; ask for nifti")
        for keyword in MAY_BE_EMPTY:
            if keyword not in header:
                setattr(header, keyword, "")
    return upload.headers


def write_segmentation(mask: Mask, upload: Upload, labels: Mapping[int, str], origin: MaskOrigin) -> bytes:
    """Write a mask as a DICOM-SEG object in the image's frame of reference.

    Raises:
      DataError: there is no label, or the images lack what the object must state.
    """
    headers = referable_headers(upload)
    if not labels:
        raise DataError("the model names no label, so that a DICOM-SEG object would have no segment; ask for nifti")
    segmentation = Segmentation(
        source_images=list(headers),
        pixel_array=_pixels(mask, upload, headers, labels),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=[_describe(number, name, origin) for number, name in enumerate(labels.values(), start=1)],
        series_instance_uid=generate_uid(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=version("medfl-ray"),
        device_serial_number="0",
        content_label="SEGMENTATION",
        content_description=f"{origin.model} {origin.version}"[:64],
        series_description=f"{origin.model} {origin.version}"[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=bool(mask.any()),
    )
    buffer = io.BytesIO()
    segmentation.save_as(buffer)
    return buffer.getvalue()


def _pixels(
    mask: Mask, upload: Upload, headers: tuple[FileDataset, ...], labels: Mapping[int, str]
) -> np.ndarray | highdicom.Volume:
    """Segments as planes [K, rows, columns, segments]; of multi-frame images with their place in the patient."""
    planes = mask if mask.ndim == 3 else mask[None]
    stacked = np.stack([planes == value for value in labels], axis=-1).astype(np.uint8)
    if len(headers) > 1 or mask.ndim == 2 or int(headers[0].get("NumberOfFrames") or 1) == 1:
        return stacked
    return highdicom.Volume(
        stacked,
        LPS_TO_RAS @ upload.volume.affine,
        "PATIENT",
        frame_of_reference_uid=headers[0].FrameOfReferenceUID,
        channels={"SegmentNumber": list(range(1, len(labels) + 1))},
    )


def _describe(number: int, name: str, origin: MaskOrigin) -> SegmentDescription:
    code = code_of(name)
    description = SegmentDescription(
        segment_number=number,
        segment_label=name[:64] or f"label {number}",
        segmented_property_category=CodedConcept.from_code(code.category),
        segmented_property_type=CodedConcept.from_code(code.kind),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=origin.model[:64], version=origin.version[:64], family=codes.DCM.ArtificialIntelligence
        ),
        tracking_uid=generate_uid(),
        tracking_id=name[:64] or f"label {number}",
    )
    if code.modifiers:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = _modifiers(code)
    return description


def _modifiers(code: LabelCode) -> list[Dataset]:
    return [CodedConcept.from_code(modifier) for modifier in code.modifiers]
