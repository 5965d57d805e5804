"""Lists of private data: whatever one line, entry, file name or header says, it spoils its own patient alone."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_builder import DicomBuilder
from neighbours import opened, run_of
from pydicom import dcmread
from pydicom.dataelem import DataElement

from medfl_ray.data.formats.dicom_files import is_dicom
from medfl_ray.data.inspection import inspect_folder
from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.sources import open_hospital_data
from medfl_ray.errors import LayoutError

NAMES = [f"p{i}" for i in range(10)]
NAMED = {"labels": {1: "lesion"}, "channels": ("x",)}
LONG = "a" * 300


def put(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.zeros((7, 8, 6), np.uint8)
    label[2:5, 2:6] = 1
    image = np.random.default_rng(seed).integers(0, 90, label.shape).astype(np.int16)
    nib.save(nib.Nifti1Image(label if "label" in path.name else image, np.eye(4)), path)


def volumes(folder: Path) -> None:
    for number, name in enumerate([*NAMES, "x"]):
        put(folder / f"{name}.nii", number)
        put(folder / f"{name}-label.nii")


def seen_in(folder: Path, layout: str = "csv", without: str = "x", **data):
    """Return everything that opening a folder shows, one patient apart."""
    run = run_of(folder, layout)
    data = {"format": "auto", **NAMED, **data}
    shown = opened(run.model_copy(update={"data": run.data.model_copy(update=data)}))
    shown.pop(f"patient {without}", None)
    return shown


def check(before, after, num_patients: int = len(NAMES)) -> None:
    assert before == after
    assert sum(name.startswith("patient") for name in before) == num_patients


LINES = {
    "a quote that nothing closes": b'x,"x.nii,x-label.nii,,',
    "a quote inside a value": b'x,x.nii,x-label.nii,,he said "no',
    "a byte that is no UTF-8": b"x,x.nii,x-label.nii,,M\xfcller",
    "a value that is too large to parse": b"x,x.nii,x-label.nii,," + b"a" * 200_000,
    "a zero byte": b"x,x\0.nii,x-label.nii,,",
    "an image name that is too long": b"x," + LONG.encode() + b".nii,x-label.nii,,",
    "a label name that is too long": b"x,x.nii," + LONG.encode() + b".nii,,",
    "a class of 5000 digits": b"x,x.nii," + b"9" * 5000 + b",,",
    "too many values": b"x,x.nii,x-label.nii,,,,,",
    "too few values": b"x",
    "two sides": b"x,x.nii,x-label.nii,holdout,\nx,x.nii,x-label.nii,train,",
    "an unknown split": b"x,x.nii,x-label.nii,on leave,",
    "another number of images": b"x,x.nii;x.nii,x-label.nii,,",
    "somebody else's image": b"x,p3.nii,p3-label.nii,,",
    "a mark of the holdout": b"x,x.nii,x-label.nii,holdout,",
    "a folder as image": b"x,.,x-label.nii,,",
    "no patient": b",x.nii,x-label.nii,,",
}


@pytest.mark.parametrize("place", [1, 5, 11])
@pytest.mark.parametrize("line", LINES)
def test_hole_no_line_of_a_csv_hides_or_stops_the_others(tmp_path, line, place):
    volumes(tmp_path)
    rows = [b"patient_id,image,label,split,remark", *[f"{n},{n}.nii,{n}-label.nii,,".encode() for n in NAMES]]
    (tmp_path / "manifest.csv").write_bytes(b"\n".join(rows) + b"\n")
    before = seen_in(tmp_path)
    (tmp_path / "manifest.csv").write_bytes(b"\n".join([*rows[:place], LINES[line], *rows[place:]]) + b"\n")
    check(before, seen_in(tmp_path))


ROW = {"patient_id": "x", "image": "x.nii", "label": "x-label.nii"}
ENTRIES = {
    "text": "x.nii", "nothing": None, "a list": [1, 2], "a number": 3,
    "other columns": {"patient_id": "x", "image_q": "x.nii", "image_z": "x.nii", "label": "x-label.nii"},
    "an image that is a number": {**ROW, "image": 7}, "images that are nothing": {**ROW, "images": [None]},
    "a patient that is a list": {**ROW, "patient_id": ["x"]}, "no Unicode": {**ROW, "patient_id": "\ud800"},
    "a name that is too long": {**ROW, "image": LONG}, "a path that is no text": {**ROW, "image": "\ud800.nii"},
    "four images": {"patient_id": "x", "images": ["x.nii"] * 4, "label": "x-label.nii"},
    "a label that is true": {**ROW, "label": True}, "a label that is a list": {**ROW, "label": [1]},
}  # fmt: skip


TOPS = {"a list": None, "nothing named": {}, "named": {"channels": ["x"], "labels": {"1": "lesion"}}}


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_hole_no_entry_of_a_json_manifest_hides_or_stops_the_others(tmp_path, entry, top):
    volumes(tmp_path)
    rows = [{"patient_id": n, "image": f"{n}.nii", "label": f"{n}-label.nii"} for n in NAMES]
    names = {"channels": (), "labels": {}} if top == "named" else {}

    def written(listed):
        document = listed if TOPS[top] is None else {**TOPS[top], "cases": listed}
        (tmp_path / "manifest.json").write_text(json.dumps(document))
        return seen_in(tmp_path, **names)

    check(written(rows), written([ENTRIES[entry], *rows]))


def test_keys_of_a_json_manifest_are_channels_by_name_whatever_their_order(tmp_path):
    volumes(tmp_path)
    rows = [{"patient_id": n, "image_t1": f"{n}.nii", "image_t2": "x.nii", "label": f"{n}-label.nii"} for n in NAMES]
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(rows))
    before = seen_in(tmp_path, channels=("T2", "t1"))
    file.write_text(json.dumps([dict(reversed(row.items())) for row in rows]))
    check(before, seen_in(tmp_path, channels=("T2", "t1")))


DECATHLON = {
    "text": "x", "nothing": None, "no image": {"label": "x"},
    "images that are nothing": {"image": [None], "label": "x"},
    "a name that is too long": {"image": LONG, "label": LONG}, "no Unicode": {"image": "\ud800.nii", "label": "x"},
    "a patient that is nothing": {"image": "x.nii", "label": "x-label.nii", "patient_id": None},
    "an image as nnU-Net names it": {"image": "q.nii", "label": "q.nii"},
    "somebody else's image": {"image": "p3.nii", "label": "p3-label.nii", "patient_id": "x"},
}  # fmt: skip


@pytest.mark.parametrize("key", ["training", "validation"])
@pytest.mark.parametrize("entry", DECATHLON)
def test_hole_no_entry_of_a_dataset_json_hides_or_stops_the_others(tmp_path, entry, key):
    volumes(tmp_path)
    rows = [{"image": f"{n}.nii", "label": f"{n}-label.nii"} for n in NAMES]
    document = {"modality": {"0": "x"}, "labels": {"0": "background", "1": "lesion"}, "training": rows}
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(document))
    before = seen_in(tmp_path, channels=(), labels={})
    document.setdefault(key, []).insert(0, DECATHLON[entry])
    file.write_text(json.dumps(document))
    check(before, seen_in(tmp_path, channels=(), labels={}))


@pytest.mark.parametrize("channels", [(0,), (0, 1, 2), (0, 5), ()])
@pytest.mark.parametrize("name", ["x", b"\xff".decode("utf-8", "surrogateescape")], ids=["text", "no text"])
def test_hole_no_case_of_nnunet_stops_the_others(tmp_path, name, channels):
    for number, patient in enumerate(NAMES):
        for channel in (0, 1):
            put(tmp_path / "imagesTr" / f"{patient}_{channel:04d}.nii.gz", number + channel)
        put(tmp_path / "labelsTr" / f"{patient}-label.nii.gz")
        (tmp_path / "labelsTr" / f"{patient}-label.nii.gz").rename(tmp_path / "labelsTr" / f"{patient}.nii.gz")
    header = {"channel_names": {"0": "t1", "1": "t2"}, "labels": {"background": 0, "lesion": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    before = seen_in(tmp_path, "nnunet", channels=("t2", "t1"))
    for channel in channels or (0, 1):  # without channels: a whole case that has no label
        put(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
    check(before, seen_in(tmp_path, "nnunet", without=name, channels=("t2", "t1")))


DEEP = 300
RAW = {
    "a byte that is no UTF-8": b'{"patient_id": "x", "image": "x.nii", "label": "x-label.nii", "remark": "M\xfcller"}',
    "a byte in the patient": b'{"patient_id": "\xfcx", "image": "x.nii", "label": "x-label.nii"}',
    "a class of 5000 digits": b'{"patient_id": "x", "image": "x.nii", "label": ' + b"9" * 5000 + b"}",
    "a patient of 5000 digits": b'{"patient_id": ' + b"9" * 5000 + b', "image": "x.nii", "label": "x-label.nii"}',
    "a fraction of 5000 digits": b'{"patient_id": "x", "image": "x.nii", "label": 0.' + b"9" * 5000 + b"}",
    "lists within lists": b'{"patient_id": "x", "image": "x.nii", "label": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a remark of lists": b'{"patient_id": "x", "image": "q.nii", "label": 1, "r": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a patient that is a list": b'{"patient_id": ["x"], "image": "x.nii", "label": "x-label.nii"}',
}


def json_list(name: str, listed: list[bytes]) -> bytes:
    """Return a list of cases as one of the two JSON layouts has it, before anybody has checked its bytes."""
    if name == "manifest.json":
        return b"[" + b",\n".join(listed) + b"]"
    header = b'{"modality": {"0": "x"}, "labels": {"0": "background", "1": "lesion"}, "training": ['
    return header + b",\n".join(listed) + b"]}"


@pytest.mark.parametrize("name", ["manifest.json", "dataset.json"])
@pytest.mark.parametrize("entry", RAW)
def test_hole_no_bytes_of_one_json_entry_stop_the_others(tmp_path, name, entry):
    volumes(tmp_path)
    rows = [
        json.dumps({"patient_id": n, "image": f"{n}.nii", "label": f"{n}-label.nii", "remark": "Müller"}).encode()
        for n in NAMES
    ]
    (tmp_path / name).write_bytes(json_list(name, rows))
    before = seen_in(tmp_path)
    (tmp_path / name).write_bytes(json_list(name, [*rows[:3], RAW[entry], *rows[3:]]))
    check(before, seen_in(tmp_path))


def test_hole_cases_of_a_patient_whose_name_cannot_be_read_are_not_patients_of_their_own(tmp_path):
    volumes(tmp_path)
    rows = [{"image": f"{n}.nii", "label": f"{n}-label.nii"} for n in NAMES]
    odd = [{**rows[0], "patient_id": name} for name in (["Ann"], {"a": 1}, True)]
    document = {"modality": {"0": "x"}, "labels": {"1": "lesion"}, "training": [*rows[1:], *odd]}
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    index = discover_cases(tmp_path, named=())
    assert sorted(case.patient_id for case in index.cases if case.problem is None) == sorted(NAMES[1:])


@pytest.mark.parametrize("name", ["manifest.json", "dataset.json"])
@pytest.mark.parametrize("spoil", [b"[" * 1500 + b"]" * 1500, b"[" * 100_000, b"}", b'"\x00"'])
def test_hole_the_syntax_of_private_json_is_refused_in_one_sentence_that_counts_nobody(tmp_path, name, spoil):
    volumes(tmp_path)
    rows = [json.dumps({"patient_id": n, "image": f"{n}.nii", "label": f"{n}-label.nii"}).encode() for n in NAMES]
    for listed in ([spoil], [*rows, spoil]):
        (tmp_path / name).write_bytes(json_list(name, listed))
        assert seen_in(tmp_path) == {"error": f"LayoutError: {name} is not valid JSON; correct it"}


@pytest.mark.parametrize("name", ["manifest.json", "dataset.json"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (b"9" * 5000, "a number of too many digits"),
        (b"[" * 100_000, "too deep"),
        (b"\xff", "not valid JSON"),
        (b"}", "not valid JSON at line 1"),
    ],
    ids=["digits", "depth", "a byte", "syntax"],
)
def test_public_json_is_refused_in_plain_words(tmp_path, name, spoil, words):
    (tmp_path / name).write_bytes(json_list(name, [spoil]))
    with pytest.raises(LayoutError, match=words):
        discover_cases(tmp_path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"channel_names": {"9" * 5000: "x"}}, "channels"),
        ({"channel_names": {"\u00b2": "x"}}, "channels"),
        ({"labels": {"9" * 5000: "x"}}, "label '9999"),
        ({"training": 5}, "is no list"),
        ({"training": [{"image": "x.nii"}], "validation": 5}, "is no list"),
    ],
)
def test_a_header_of_odd_values_is_refused_in_plain_words(tmp_path, header, words):
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": "x.nii"}], **header}))
    for named in (None, ()):
        with pytest.raises(LayoutError, match=words):
            discover_cases(tmp_path, "decathlon", named)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Ten patients as an archive exports them, all in one folder."""
    folder = tmp_path_factory.mktemp("archive")
    for number, name in enumerate(NAMES):
        export(folder, name, number)
    return folder


def export(folder: Path, name: str, seed: int = 99) -> None:
    builder = DicomBuilder(name)
    for number, slice_ in enumerate(builder.slices):
        slice_.SeriesDescription = "t1"
        stored = np.frombuffer(slice_.PixelData, "<u2")
        noise = np.random.default_rng([seed, number]).integers(0, 200, stored.size)
        slice_.PixelData = (stored + noise).astype("<u2").tobytes()
        slice_.save_as(folder / f"{name}-{number}.dcm", enforce_file_format=True)
    builder.seg(folder / f"{name}-label.dcm")


def rewrite(path: Path, change) -> None:
    dataset = dcmread(path)
    change(dataset)
    dataset.save_as(path)


def same_series_as_p3(folder):
    export(folder, "x")
    uid = dcmread(folder / "p3-0.dcm").SeriesInstanceUID
    for file in folder.glob("x-[0-9].dcm"):
        rewrite(file, lambda dataset: setattr(dataset, "SeriesInstanceUID", uid))


def series_without_uid(folder):
    export(folder, "x")
    for file in folder.glob("x-[0-9].dcm"):
        rewrite(file, lambda dataset: delattr(dataset, "SeriesInstanceUID"))


def references_that_are_text(folder):
    export(folder, "x")

    def change(dataset):
        del dataset.ReferencedSeriesSequence
        dataset.add(DataElement(0x00081115, "LO", "private 4711"))

    rewrite(folder / "x-label.dcm", change)


def header_cut(folder):
    (folder / "a.dcm").write_bytes((folder / "p3-0.dcm").read_bytes()[:250])


FILES = {
    "the series UID of another patient": same_series_as_p3,
    "no series UID": series_without_uid,
    "references that are no sequence": references_that_are_text,
    "a header that is cut": header_cut,
    "text called .dcm": lambda folder: (folder / "a.dcm").write_text("private 4711"),
    "an empty file": lambda folder: (folder / "a.dcm").write_bytes(b""),
    "a CSV of the patient's own": lambda folder: (folder / "private 4711.csv").write_text("a,b\n"),
    "a link to nowhere": lambda folder: (folder / "a.dcm").symlink_to(folder / "nowhere"),
}


@pytest.mark.parametrize("spoil", FILES)
def test_hole_no_file_of_a_dicom_folder_stops_or_changes_the_others(tmp_path, archive, spoil):
    import shutil

    shutil.copytree(archive, tmp_path / "images")
    FILES[spoil](tmp_path / "images")
    check(*(seen_in(folder, "dicom seg", channels=("t1",)) for folder in (archive, tmp_path / "images")))


def test_hole_a_file_that_may_not_be_opened_stops_no_other(archive, monkeypatch):
    before = seen_in(archive, "dicom seg", channels=("t1",))

    def refuse(path):
        if path.name == "p3-label.dcm":
            raise PermissionError(13, "Permission denied", str(path))
        return is_dicom(path)

    monkeypatch.setattr("medfl_ray.data.formats.dicom_files.is_dicom", refuse)
    monkeypatch.setattr("medfl_ray.data.layouts.dicom_folder.is_dicom", refuse)
    after = seen_in(archive, "dicom seg", channels=("t1",))
    assert before.pop("patient p3")
    check(before, after, len(NAMES) - 1)


def test_hole_no_surprise_of_a_reader_stops_another_case(tmp_path, monkeypatch):
    volumes(tmp_path)
    lines = [f"{name},{name}.nii,{name}-label.nii" for name in NAMES]
    (tmp_path / "manifest.csv").write_text("\n".join(["patient_id,image,label", *lines]))
    before = seen_in(tmp_path)
    real = nib.load

    def fail(path, **options):
        if Path(path).name == "p3.nii":
            raise AssertionError("private words 4711")
        return real(path, **options)

    monkeypatch.setattr(nib, "load", fail)
    after = seen_in(tmp_path)
    assert before.pop("patient p3")
    check(before, after, len(NAMES) - 1)
    run = run_of(tmp_path, "csv")
    data = open_hospital_data(run, ("a",))
    data.check_cases()
    (note,) = data.notes
    assert "AssertionError" in note
    assert "4711" not in note


def test_a_csv_without_patients_in_its_header_is_refused_by_its_header_alone(tmp_path):
    run = run_of(tmp_path, "csv")
    for row in ("a,b", 'a,"b'):
        (tmp_path / "manifest.csv").write_text(f"image,label\n{row}\n")
        with pytest.raises(LayoutError, match=r"the first line of manifest\.csv has no column patient_id"):
            open_hospital_data(run, ("a",))


def test_inspection_shows_every_case_that_private_training_leaves_out(tmp_path):
    volumes(tmp_path)
    rows = [b"patient_id,image,label,split,remark", *[f"{n},{n}.nii,{n}-label.nii,,".encode() for n in NAMES]]
    left_out = [LINES[line] for line in ("a quote that nothing closes", "too few values", "no patient", "two sides")]
    (tmp_path / "manifest.csv").write_bytes(b"\n".join([*rows, *left_out]))
    found = inspect_folder(tmp_path)
    assert found.num_unusable == 5
    assert [case.position + 1 for case in found.cases if case.error] == [11, 12, 13, 14, 15]
    text = "\n".join(found.problems)
    for reason in ("line 12 of manifest.csv is not CSV", "line 13 of manifest.csv has more or fewer", "no patient_id"):
        assert reason in text
    assert text.count("is on two sides of the split") == 2
    run = run_of(tmp_path, "csv")
    data = open_hospital_data(run, ("a",))
    assert len(data.notes) == 5


def test_inspection_with_names_reads_dicom_as_private_training_does(tmp_path, archive):
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(archive, folder)
    header_cut(folder)
    without_names = inspect_folder(folder)
    assert (without_names.num_unusable, len(without_names.cases)) == (1, 11)
    named = inspect_folder(folder, labels={1: "tumour"}, channels=("t1",))
    assert named.num_unusable == 11
    assert "expected one of ['tumour']" in named.problems[-1]
    assert "0 series described as 'flair'" in inspect_folder(folder, channels=("flair",)).problems[-1]


def test_what_a_killed_run_left_goes_even_if_the_next_one_keeps_nothing(tmp_path):
    left = tmp_path / "cache" / "prepared-left"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    (left / "0.image.npy").write_bytes(os.urandom(8))
    images = tmp_path / "images"
    volumes(images)
    lines = [f"{name},{name}.nii,{name}-label.nii" for name in NAMES]
    (images / "manifest.csv").write_text("\n".join(["patient_id,image,label", *lines]))
    open_hospital_data(run_of(images, "csv"), ("a",), cache_root=tmp_path / "cache").close()
    assert not left.exists()
