"""Broken images, labels and layouts: each gives one clear error that names no patient."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfl_ray.data.formats.readers import read_volume
from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ConfigError, DataError, GeometryError, LabelError, LayoutError, UnreadableFile

SHAPE = (10, 12, 8)


def image(**changes):
    array = np.random.default_rng(0).normal(size=changes.pop("shape", SHAPE)).astype(np.float32)
    place, value = changes.pop("at", ((), None))
    if value is not None:
        array[place] = value
    return array


def label(shape=SHAPE, value=1, dtype=np.uint8):
    array = np.zeros(shape, dtype)
    array[2:5, 2:5, 2:5] = value
    return array


SINGULAR = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


def shifted(millimetres):
    affine = np.eye(4)
    affine[0, 3] = millimetres
    return affine


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def scribble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = b"\0" * 40
    path.write_bytes(bytes(content))


def header_with_no_spacing(folder, write):
    """pixdim 0 and an sform of zeros, as broken converters write them."""
    path = folder / "imagesTr/b.nii"
    write(path, image())
    content = bytearray(path.read_bytes())
    content[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # qform_code 0, sform_code 1
    content[280:328] = bytes(48)
    path.write_bytes(bytes(content))
    with gzip.open(folder / "imagesTr/b.nii.gz", "wb") as stream:
        stream.write(path.read_bytes())


def _plain(folder, write):
    """Replace case b's image by an uncompressed one."""
    raw = json.loads((folder / "dataset.json").read_text())
    raw["training"][1]["image"] = "imagesTr/b.nii"
    (folder / "dataset.json").write_text(json.dumps(raw))
    return write(folder / "imagesTr/b.nii", image())


BROKEN_FILES = {
    "NaN voxels": (
        lambda d, write: write(d / "imagesTr/b.nii.gz", image(at=((1, 2, 3), np.nan))),
        DataError, "1 of 960 voxels are NaN",
    ),
    "infinite voxels": (
        lambda d, write: write(d / "imagesTr/b.nii.gz", image(at=((slice(2), 0, 0), np.inf))),
        DataError, "2 of 960 voxels are NaN or infinite",
    ),
    "truncated gzip": (lambda d, write: cut(d / "imagesTr/b.nii.gz"), UnreadableFile, "not a complete NIfTI file"),
    "damaged gzip": (lambda d, write: scribble(d / "imagesTr/b.nii.gz"), UnreadableFile, "not a complete NIfTI file"),
    "truncated without compression": (
        lambda d, write: cut(_plain(d, write)), UnreadableFile, "not a complete NIfTI file",
    ),
    "empty file": (lambda d, write: (d / "imagesTr/b.nii.gz").write_bytes(b""), UnreadableFile, "not a complete NIfTI"),
    "text as image": (lambda d, write: (d / "imagesTr/b.nii.gz").write_text("hello"), UnreadableFile, "not a complete"),
    "missing image": (lambda d, write: (d / "imagesTr/b.nii.gz").unlink(), UnreadableFile, "image file does not exist"),
    "missing label": (lambda d, write: (d / "labelsTr/b.nii.gz").unlink(), UnreadableFile, "label file does not exist"),
    "truncated label": (lambda d, write: cut(d / "labelsTr/b.nii.gz"), UnreadableFile, "not a complete NIfTI file"),
    "label value without a name": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label(value=7)),
        LabelError, "value 7; expected 0 .background. or one of .1, 2.",
    ),
    "negative label": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label(value=-1, dtype=np.int16)),
        LabelError, "value -1; expected 0",
    ),
    "label of fractions": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label(value=0.5, dtype=np.float32)),
        LabelError, "not whole numbers",
    ),
    "NaN label": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label(value=np.nan, dtype=np.float32)),
        DataError, "27 of 960 voxels are NaN",
    ),
    "label of another shape": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label((9, 12, 8))),
        GeometryError, r"label has shape \(9, 12, 8\), its image \(10, 12, 8\)",
    ),
    "label elsewhere in space": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label(), shifted(3)),
        GeometryError, "lies elsewhere in space",
    ),
    "label mirrored in space": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", label(), np.diag([-1.0, 1, 1, 1])),
        GeometryError, "lies elsewhere in space",
    ),
    "label with channels": (
        lambda d, write: write(d / "labelsTr/b.nii.gz", np.stack([label()] * 2, axis=-1)),
        LabelError, "label has 2 channels",
    ),
    "another number of channels": (
        lambda d, write: write(d / "imagesTr/b.nii.gz", image(shape=(*SHAPE, 3))),
        GeometryError, r"image has 3 channels; expected 1 \(M0\)",
    ),
    "too many axes": (
        lambda d, write: write(d / "imagesTr/b.nii.gz", image(shape=(4, 4, 4, 2, 2))),
        GeometryError, "has 5 axes",
    ),
    "no voxels": (
        lambda d, write: write(d / "imagesTr/b.nii.gz", image(shape=(10, 0, 8))),
        DataError, "axes; expected 2, 3|no voxels",
    ),
    "zero spacing": (header_with_no_spacing, GeometryError, "spacing is 0 x 0 x 0 mm"),
    "singular affine": (
        lambda d, write: write(d / "imagesTr/b.nii.gz", image(), SINGULAR),
        GeometryError, "singular direction matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_file(name, decathlon, write_nifti, make_run):
    spoil, kind, message = BROKEN_FILES[name]
    folder = decathlon(patient_id=["Mrs-A", "Mrs-B", "Mrs-C", "Mrs-D"])
    spoil(folder, write_nifti)
    hospital = {"id": "h", "directory": str(folder), "num_patients": 4}
    data = open_hospital_data(make_run({"hospitals": [hospital], "declared": "private"}), ("h",))
    data.check_cases()
    assert data.num_train_patients + len(data.holdout) == 3, "the other patients stay"
    (text,) = data.notes
    assert re.search(message, text)
    with pytest.raises(kind, match=message) as caught:
        open_hospital_data(make_run({"hospitals": [hospital], "declared": "public"}), ("h",)).decode(1)
    assert "case 2 of 4" in str(caught.value)
    assert "case 2 of 4" in text
    assert "\n" not in text
    assert "Mrs" not in text
    assert "b.nii" not in text  # a private file's name may hold an identifier
    assert str(folder) not in text


def manifest(folder, text):
    (folder / "manifest.csv").write_text(text)


BROKEN_LAYOUTS = {
    "dataset.json is not JSON": (lambda d: (d / "dataset.json").write_text("{"), "not valid JSON at line 1"),
    "dataset.json is a list": (lambda d: (d / "dataset.json").write_text("[]"), "holds a list; expected an object"),
    "no training list": (lambda d: (d / "dataset.json").write_text("{}"), "no 'training' list"),
    "an entry without image": (
        lambda d: (d / "dataset.json").write_text('{"training": [{"label": "x"}]}'), "entry 1 of 'training'",
    ),
    "region-based labels": (
        lambda d: (d / "dataset.json").write_text('{"training": [{"image": "a"}], "labels": {"whole": [1, 2]}}'),
        "region-based labels are not supported",
    ),
    "one patient on two sides": (
        lambda d: manifest(d, "patient_id,image,label,split\np1,a,b,train\np1,c,d,holdout\n"),
        "cases 1 and 2 of 2 are of one patient but on two sides",
    ),
    "no patient_id": (lambda d: manifest(d, "patient_id,image,label\n,a,b\n"), "case 1 of 1 in the manifest has no "
    "patient_id"),
    "no image": (lambda d: manifest(d, "patient_id,image,label\np,,b\n"), "has no image"),
    "an unknown split": (lambda d: manifest(d, "patient_id,image,label,split\np,a,b,tomorrow\n"), "split 'tomorrow'; "
    "expected"),
    "a row too long": (lambda d: manifest(d, "patient_id,image,label\np,a,b,c\n"), "line 2 of manifest.csv has more "
    "or fewer"),
    "a row too short": (lambda d: manifest(d, "patient_id,image,label\np,a\n"), "line 2 of manifest.csv has more or "
    "fewer"),
    "only a header": (lambda d: manifest(d, "patient_id,image,label\n"), "lists no case"),
    "not text": (lambda d: (d / "manifest.csv").write_bytes(b"\xff\xfe\x00patient"), "not a UTF-8 CSV file"),
    "manifest.json without cases": (lambda d: (d / "manifest.json").write_text('{"cases": 3}'), "no list of cases"),
    "different channels": (
        lambda d: manifest(d, "patient_id,images,label\np,a;b,c\nq,a,c\n"), r"cases with \[1, 2\] images",
    ),
    "empty folder": (lambda d: None, "is empty; expected"),
    "unknown files": (lambda d: (d / "a.bin").write_bytes(b"x"), "no known layout"),
    "nnU-Net case without a channel": (
        lambda d: [
            (d / "imagesTr").mkdir(), (d / "labelsTr").mkdir(),
            *[(d / f"imagesTr/{name}.nii.gz").touch() for name in ("a_0000", "a_0001", "b_0000")],
            (d / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "T2"}, "labels": {"x": 1}}'),
        ],
        r"case 2 of 2 has channels \[0\]; dataset.json expects \[0, 1\]",
    ),
    "nnU-Net without labels": (
        lambda d: [
            (d / "imagesTr").mkdir(), (d / "imagesTr/a_0000.nii.gz").touch(),
            (d / "dataset.json").write_text('{"channel_names": {"0": "T1"}}'),
        ],
        "no imagesTr or no labelsTr",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_LAYOUTS)
def test_broken_layout(name, tmp_path):
    spoil, message = BROKEN_LAYOUTS[name]
    spoil(tmp_path)
    with pytest.raises(LayoutError, match=message):
        discover_cases(tmp_path)


def test_one_image_for_two_patients(tmp_path):
    manifest(tmp_path, "patient_id,image,label\np,a.png,1\nq,a.png,0\n")
    with pytest.raises(LayoutError, match="cases 1 and 2 of 2 list one image for two patients"):
        discover_cases(tmp_path)


def test_unknown_format(tmp_path):
    (tmp_path / "a.mha").write_text("ObjectType = Image")
    with pytest.raises(UnreadableFile, match=r"format \.mha is not supported"):
        read_volume(tmp_path / "a.mha")


def test_file_that_the_system_cannot_read(tmp_path, dicom, monkeypatch):
    folder = dicom().save(tmp_path / "series")

    def fail(self, *arguments, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UnreadableFile, match=r"cannot be read \(Input/output error\)"):
        read_volume(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="folder 'nowhere' does not exist"):
        discover_cases(tmp_path / "nowhere")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder(tmp_path):
    tmp_path.chmod(0)
    with pytest.raises(ConfigError, match="may not be read"):
        discover_cases(tmp_path)
    tmp_path.chmod(0o700)


def test_folder_that_the_system_forbids(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match="may not be read by this user"):
        discover_cases(tmp_path)


def test_case_without_label(decathlon, make_run):
    folder = decathlon()
    raw = json.loads((folder / "dataset.json").read_text())
    del raw["training"][2]["label"]
    (folder / "dataset.json").write_text(json.dumps(raw))
    run = make_run({"directory": str(folder), "declared": "public"})
    with pytest.raises(LabelError, match="case 3 of 4 has no label"):
        open_hospital_data(run, ("hospital-1",))


def test_class_where_a_mask_is_needed(tmp_path, make_run):
    manifest(tmp_path, "patient_id,image,label\np,a.png,1\nq,b.png,0\n")
    run = make_run({"directory": str(tmp_path), "declared": "public"})
    with pytest.raises(LabelError, match=r"case 1 of 2 has a class as its label, but data\.task is 'segmentation'"):
        open_hospital_data(run, ("hospital-1",))


def test_class_outside_the_names(tmp_path, make_run):
    for name in "ab":
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{name}.png")
    manifest(tmp_path, "patient_id,image,label\np,a.png,4\nq,b.png,0\n")
    data = {
        "directory": str(tmp_path),
        "declared": "public",
        "task": "classification",
        "labels": {1: "ill"},
        "spatial_dims": 2,
    }
    with pytest.raises(LabelError, match=r"class 4 is outside 0\.\.1"):
        open_hospital_data(
            make_run(data, model={"type": "densenet"}, training={"patch_size_voxels": 8}), ("hospital-1",)
        )


def test_labels_that_nobody_names(tmp_path, make_run, write_nifti):
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii", image())
        write_nifti(tmp_path / f"{name}-label.nii", label())
    manifest(tmp_path, "patient_id,image,label\np,a.nii,a-label.nii\nq,b.nii,b-label.nii\n")
    with pytest.raises(ConfigError, match=r"set data\.labels"):
        open_hospital_data(make_run({"directory": str(tmp_path), "declared": "public"}), ("hospital-1",))


def test_a_hospital_with_one_patient(decathlon, make_run):
    run = make_run({"directory": str(decathlon("ab", patient_id=["p", "p"])), "declared": "public"})
    with pytest.raises(LayoutError, match=r"1 patient\(s\) found; expected at least 2"):
        list_hospitals(run)


def test_channels_that_do_not_lie_on_each_other(tmp_path, make_run, write_nifti):
    for name in "ab":
        write_nifti(tmp_path / f"{name}1.nii", image())
        write_nifti(tmp_path / f"{name}2.nii", image(), shifted(9))
        write_nifti(tmp_path / f"{name}-label.nii", label())
    rows = "".join(f"{name},{name}1.nii,{name}2.nii,{name}-label.nii\n" for name in "ab")
    manifest(tmp_path, f"patient_id,image_T1,image_T2,label\n{rows}")
    run = make_run({"directory": str(tmp_path), "declared": "public", "labels": {1: "x"}})
    with pytest.raises(GeometryError, match=r"channel 2 has shape .* or lies elsewhere"):
        open_hospital_data(run, ("hospital-1",)).decode(1)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.nrrd"])
@pytest.mark.parametrize("spoil", ["text", "cut"])
def test_broken_pictures_and_nrrd(tmp_path, name, spoil):
    import nrrd

    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    if spoil == "text":
        path.write_text("this is not an image")
    else:
        nrrd.write(str(path), noise) if name.endswith("nrrd") else Image.fromarray(noise).save(path)
        cut(path, 0.4)
    with pytest.raises(UnreadableFile, match="not a complete"):
        read_volume(path)


def test_picture_too_large_to_be_one(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableFile, match="more pixels than a medical image"):
        read_volume(tmp_path / "a.png")


def test_nrrd_in_an_unknown_space(tmp_path):
    import nrrd

    header = {"space": "scanner-xyz", "space directions": np.eye(3), "space origin": np.zeros(3)}
    nrrd.write(str(tmp_path / "a.nrrd"), image(), header)
    with pytest.raises(GeometryError, match="NRRD space is 'scanner-xyz'"):
        read_volume(tmp_path / "a.nrrd")


def test_truncated_dicom_slice(tmp_path, dicom):
    folder = dicom().save(tmp_path / "series")
    cut(sorted(folder.iterdir())[2], 0.8)
    with pytest.raises(UnreadableFile, match="truncated"):
        read_volume(folder)


def test_dicom_cut_in_its_header(tmp_path, dicom):
    folder = dicom().save(tmp_path / "series")
    cut(sorted(folder.iterdir())[2], 0.2)
    with pytest.raises(DataError):
        read_volume(folder)


def test_something_else_called_dcm(tmp_path, dicom):
    folder = dicom().save(tmp_path / "series")
    (folder / "IM999.dcm").write_text("not dicom")
    with pytest.raises(UnreadableFile, match=r"a file of 9 bytes is called \.dcm but is not DICOM"):
        read_volume(folder)


def test_dicom_folder_without_labels(tmp_path, dicom):
    dicom().save(tmp_path / "p")
    with pytest.raises(LayoutError, match="no SEG or RTSTRUCT label"):
        discover_cases(tmp_path)


def test_dicom_label_without_its_images(tmp_path, dicom):
    dicom("P1").save(tmp_path / "p1")
    other = dicom("P1")
    other.seg(tmp_path / "p1" / "seg.dcm")
    with pytest.raises(LayoutError, match="refers to 0 of its patient's 1 image series"):
        discover_cases(tmp_path)


def test_contour_with_two_points(tmp_path, dicom):
    ct = dicom()
    volume = read_volume(ct.save(tmp_path / "series"))
    from medfl_ray.data.formats.readers import read_label

    with pytest.raises(LabelError, match="a contour has 6 numbers"):
        read_label(ct.rtstruct(tmp_path / "rt.dcm", {"x": [ct.outline(1)[:6]]}), volume)
    with pytest.raises(LabelError, match="no closed contour"):
        read_label(ct.rtstruct(tmp_path / "rt.dcm", {"x": []}), volume)
