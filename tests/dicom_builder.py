"""A small oblique CT with labels in DICOM, written as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

OBLIQUE_LPS = np.array(
    [[0.9, 0.1, 0.0, -20.0], [-0.1, 0.9, 0.0, -30.0], [0.0, 0.0, 2.5, 40.0], [0.0, 0.0, 0.0, 1.0]]
)  # columns: step along the DICOM column index, row index and slice index, in LPS mm


def _slice_of(index: int, pixels: np.ndarray, uids: dict[str, str], patient: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    slice_.Modality, slice_.PatientID, slice_.PatientName = "CT", patient, "Made^Up"
    slice_.PatientBirthDate = slice_.PatientSex = slice_.AccessionNumber = slice_.StudyTime = ""
    slice_.StudyID, slice_.StudyDate, slice_.ReferringPhysicianName = "1", "20200101", ""
    slice_.Manufacturer, slice_.SeriesNumber, slice_.SeriesDescription = "made up", 1, "CT"
    slice_.StudyInstanceUID, slice_.SeriesInstanceUID = uids["study"], uids["series"]
    slice_.FrameOfReferenceUID, slice_.PositionReferenceIndicator = uids["frame"], ""
    slice_.ImageType, slice_.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], index + 1
    steps = np.linalg.norm(OBLIQUE_LPS[:3, :3], axis=0)
    directions = OBLIQUE_LPS[:3, :3] / steps
    slice_.ImageOrientationPatient = [float(v) for v in (*directions[:, 0], *directions[:, 1])]
    slice_.ImagePositionPatient = [float(v) for v in (OBLIQUE_LPS @ [0, 0, index, 1])[:3]]
    slice_.PixelSpacing, slice_.SliceThickness = [float(steps[1]), float(steps[0])], float(steps[2])
    slice_.Rows, slice_.Columns = pixels.shape
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
    slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = "2", "-1000", "HU"
    slice_.PixelData = pixels.astype("<u2").tobytes()
    return slice_


class DicomBuilder:
    """A CT whose box of bright voxels is at [slices 1:4, rows 3:7, columns 2:6], and labels of that box."""

    shape = (6, 10, 12)
    box = (slice(1, 4), slice(3, 7), slice(2, 6))

    def __init__(self, patient: str = "PAT1") -> None:
        self.uids = {key: str(generate_uid()) for key in ("study", "series", "frame")}
        self.stored = np.random.default_rng(1).integers(0, 100, self.shape)
        self.stored[self.box] = 900
        self.slices = [_slice_of(i, pixels, self.uids, patient) for i, pixels in enumerate(self.stored)]

    @property
    def affine_ras(self) -> np.ndarray:
        """Affine of [slice, row, column] to RAS mm, by hand."""
        lps = OBLIQUE_LPS[:, [2, 1, 0, 3]]
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps

    def mask(self) -> np.ndarray:
        mask = np.zeros(self.shape, np.uint8)
        mask[self.box] = 1
        return mask

    def save(self, folder: Path, shuffle: bool = True) -> Path:
        """Write the slices under names whose order says nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        order = np.random.default_rng(3).permutation(len(self.slices)) if shuffle else range(len(self.slices))
        for name, slice_ in zip(order, self.slices, strict=True):
            slice_.save_as(folder / f"IM{name:03d}.dcm", enforce_file_format=True)
        return folder

    def seg(self, path: Path, masks: dict[str, np.ndarray] | None = None, fractional: bool = False) -> Path:
        from highdicom.seg import Segmentation, SegmentDescription
        from highdicom.sr.coding import CodedConcept

        masks = masks if masks is not None else {"lesion": self.mask()}
        descriptions = [
            SegmentDescription(
                segment_number=i + 1,
                segment_label=name,
                segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
                segmented_property_type=CodedConcept("108369006", "SCT", "Neoplasm"),
                algorithm_type="MANUAL",
            )
            for i, name in enumerate(masks)
        ]
        pixels = np.stack(list(masks.values()), axis=-1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Segmentation(
            source_images=self.slices,
            pixel_array=pixels.astype(np.float32 if fractional else np.uint8),
            segmentation_type="FRACTIONAL" if fractional else "BINARY",
            segment_descriptions=descriptions,
            series_instance_uid=generate_uid(),
            series_number=2,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="made up",
            manufacturer_model_name="made up",
            software_versions="1",
            device_serial_number="1",
        ).save_as(path)
        return path

    def outline(self, index: int, margin: float = 0.4, shrink: float = 0.0) -> list[float]:
        """Corners in LPS mm of the box's outline in one slice, `margin` voxels outside the outer centres."""
        rows, columns = self.box[1], self.box[2]
        low_r, high_r = rows.start - margin + shrink, rows.stop - 1 + margin - shrink
        low_c, high_c = columns.start - margin + shrink, columns.stop - 1 + margin - shrink
        corners = [(low_c, low_r), (high_c, low_r), (high_c, high_r), (low_c, high_r)]
        return [float(v) for c, r in corners for v in (OBLIQUE_LPS @ [c, r, index, 1])[:3]]

    def rtstruct(self, path: Path, regions: dict[str, list[list[float]]] | None = None) -> Path:
        if regions is None:
            regions = {"Lesion": [self.outline(i) for i in range(self.box[0].start, self.box[0].stop)]}
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = RTStructureSetStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        plan = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        plan.SOPClassUID, plan.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
        plan.Modality, plan.PatientID = "RTSTRUCT", self.slices[0].PatientID
        plan.StudyInstanceUID, plan.SeriesInstanceUID = self.uids["study"], generate_uid()
        series, study, frame = Dataset(), Dataset(), Dataset()
        series.SeriesInstanceUID = self.uids["series"]
        study.RTReferencedSeriesSequence = [series]
        frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = self.uids["frame"], [study]
        plan.ReferencedFrameOfReferenceSequence = [frame]
        plan.StructureSetROISequence, plan.ROIContourSequence = [], []
        for number, (name, outlines) in enumerate(regions.items(), start=1):
            region, contours = Dataset(), Dataset()
            region.ROINumber, region.ROIName = number, name
            contours.ReferencedROINumber, contours.ContourSequence = number, []
            for outline in outlines:
                contour = Dataset()
                contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(outline) // 3
                contour.ContourData = outline
                contours.ContourSequence.append(contour)
            plan.StructureSetROISequence.append(region)
            plan.ROIContourSequence.append(contours)
        path.parent.mkdir(parents=True, exist_ok=True)
        plan.save_as(path, enforce_file_format=True)
        return path
