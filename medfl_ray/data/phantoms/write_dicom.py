"""Write one phantom as classic DICOM MR series, one per sequence, and its label as a DICOM SEG object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import FileDataset
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from medfl_ray.data.phantoms.preset import HospitalProfile
from medfl_ray.data.phantoms.render import Phantom
from medfl_ray.data.phantoms.write_images import RAS_TO_LPS, as_volume

MANUFACTURER = "medfl-ray phantoms"
# Scanning sequence, variant, repetition, echo and inversion time in ms, contrast agent.
TIMING: dict[str, tuple[str, str, float, float, float | None, str]] = {
    "T1": ("GR", "MP", 1900.0, 2.6, 900.0, ""),
    "T1c": ("GR", "MP", 1900.0, 2.6, 900.0, "Gadolinium"),
    "T2": ("SE", "SK", 4800.0, 96.0, None, ""),
    "FLAIR": ("IR", "SK", 9000.0, 120.0, 2500.0, ""),
}


@dataclass(frozen=True)
class Examination:
    """Made-up identity of one examination; every UID derives from `seed_words`."""

    patient_id: str
    institution: str
    profile: HospitalProfile
    seed_words: tuple[str, ...]

    def uid(self, *parts: str) -> UID:
        """A fresh-looking UID that is the same for the same seed."""
        return generate_uid(entropy_srcs=[*self.seed_words, self.patient_id, *parts])


def write_examination(folder: Path, phantom: Phantom, examination: Examination) -> Path | None:
    """Write <folder>/<sequence>/<slice>.dcm and <folder>/SEG/label.dcm; return the SEG file, None of a class."""
    volume, affine = as_volume(phantom)
    if phantom.image.ndim == 3:  # [C, rows, columns]: columns are the first axis of a DICOM pixel grid
        volume, affine = volume.swapaxes(1, 2), affine[:, [1, 0, 2, 3]]
    sources: list[Dataset] = []
    for number, channel in enumerate(phantom.channels):
        series = _series(volume[number], affine, channel, number + 1, examination)
        for dataset in series:
            path = folder / channel / f"IM{int(dataset.InstanceNumber):04d}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path, enforce_file_format=True)
        sources = series
    if isinstance(phantom.label, int):
        return None
    path = folder / "SEG" / "label.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_segmentation(path, phantom.label, phantom.labels, sources, examination)
    return path


def _series(
    array: npt.NDArray[np.float32], affine: npt.NDArray[np.float64], channel: str, number: int, who: Examination
) -> list[Dataset]:
    """One dataset per slice of [I, J, K]; rows run along J, columns along I."""
    placed = RAS_TO_LPS @ affine
    steps = np.linalg.norm(placed[:3, :3], axis=0)
    directions = placed[:3, :3] / steps
    datasets = []
    for index in range(array.shape[2]):
        dataset = _image_dataset(channel, number, index, who)
        dataset.ImageOrientationPatient = [f"{v:.8g}" for v in (*directions[:, 0], *directions[:, 1])]
        dataset.ImagePositionPatient = [f"{v:.8g}" for v in (placed @ [0, 0, index, 1])[:3]]
        dataset.PixelSpacing = [f"{steps[1]:.8g}", f"{steps[0]:.8g}"]
        dataset.SpacingBetweenSlices = f"{steps[2]:.8g}"
        thickness = max(steps[2], who.profile.slice_thickness_mm[channel in {"T2", "FLAIR"}])
        dataset.SliceThickness = f"{thickness:.8g}"
        _set_pixels(dataset, array[:, :, index].T)
        datasets.append(dataset)
    return datasets


def _image_dataset(channel: str, number: int, index: int, who: Examination) -> Dataset:
    instance = who.uid(channel, str(index))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, instance
    dataset.Modality = "MR"
    _set_patient_and_study(dataset, who)
    dataset.SeriesInstanceUID = who.uid("series", channel)
    dataset.SeriesNumber, dataset.InstanceNumber = number, index + 1
    dataset.SeriesDescription = dataset.ProtocolName = channel
    dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = dataset.StudyDate
    dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = f"10{number:02d}00"
    dataset.FrameOfReferenceUID = who.uid("frame of reference")
    dataset.PositionReferenceIndicator = ""
    dataset.PatientPosition = "HFS"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
    dataset.BurnedInAnnotation = "NO"
    dataset.ImageComments = "synthetic: rendered, not acquired from a person"
    _set_acquisition(dataset, channel, who.profile)
    return dataset


def _set_patient_and_study(dataset: Dataset, who: Examination) -> None:
    dataset.PatientName = f"Phantom^{who.patient_id}"
    dataset.PatientID = who.patient_id
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "synthetic data"
    dataset.StudyInstanceUID = who.uid("study")
    dataset.StudyID, dataset.AccessionNumber = "1", ""
    dataset.StudyDate, dataset.StudyTime = "20200101", "100000"
    dataset.StudyDescription = "MR head"
    dataset.ReferringPhysicianName = ""
    dataset.InstitutionName = who.institution
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = "phantom"
    dataset.DeviceSerialNumber = "0"
    dataset.SoftwareVersions = "1"
    dataset.BodyPartExamined = "HEAD"


def _set_acquisition(dataset: Dataset, channel: str, profile: HospitalProfile) -> None:
    sequence, variant, repetition, echo, inversion, agent = TIMING[channel]
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = sequence, variant, ""
    dataset.MRAcquisitionType = "2D" if channel in {"T2", "FLAIR"} else "3D"
    dataset.RepetitionTime, dataset.EchoTime, dataset.EchoTrainLength = repetition, echo, 1
    if inversion is not None:
        dataset.InversionTime = inversion
    if agent:
        dataset.ContrastBolusAgent = agent
    dataset.MagneticFieldStrength = profile.field_tesla


def _set_pixels(dataset: Dataset, pixels: npt.NDArray[np.float32]) -> None:
    stored = np.clip(pixels, 0, 65535).astype("<u2")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    low, high = int(stored.min()), int(max(stored.max(), stored.min() + 1))
    dataset.WindowCenter, dataset.WindowWidth = (low + high) // 2, high - low
    dataset.PixelData = np.ascontiguousarray(stored).tobytes()


def _write_segmentation(
    path: Path, label: npt.NDArray[np.uint8], names: dict[int, str], sources: list[Dataset], who: Examination
) -> None:
    from highdicom.seg import Segmentation, SegmentationTypeValues, SegmentDescription
    from highdicom.seg.enum import SegmentAlgorithmTypeValues
    from highdicom.sr.coding import CodedConcept

    structure = CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure")
    kinds = {"oedema": CodedConcept("79654002", "SCT", "Edema")}
    neoplasm = CodedConcept("108369006", "SCT", "Neoplasm")
    descriptions = [
        SegmentDescription(
            segment_number=value,
            segment_label=name,
            segmented_property_category=structure,
            segmented_property_type=kinds.get(name, neoplasm),
            algorithm_type=SegmentAlgorithmTypeValues.MANUAL,
        )
        for value, name in sorted(names.items())
    ]
    frames = label.transpose(2, 1, 0)  # [K, rows, columns]
    segmentation = Segmentation(
        source_images=sources,
        pixel_array=np.stack([frames == value for value in sorted(names)], axis=-1).astype(np.uint8),
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=who.uid("series", "SEG"),
        series_number=100,
        sop_instance_uid=who.uid("SEG"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name="phantom",
        software_versions="1",
        device_serial_number="0",
        series_description="tumour",
        omit_empty_frames=bool(label.any()),
    )
    segmentation.save_as(path)
