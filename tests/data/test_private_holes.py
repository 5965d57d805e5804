"""Holes at the edge of private data that were open once: how one patient moved another, and what was left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from neighbours import DICOM_ODDITIES, Person, dicom_patient, opened, run_of, write

from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.layouts.partitions import split_holdout
from medfl_ray.data.prepare import loading
from medfl_ray.data.prepare.cache_folders import sweep_caches
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ConfigError

PEOPLE = [Person(f"P{i:02d}", i) for i in range(10, 20)]


def changed(folder: Path, layout: str, other: Person, **names):
    """Return what a folder shows without and with one patient more, that patient apart."""
    found = []
    for name, people in (("without", PEOPLE), ("with", [*PEOPLE, other])):
        write(folder / name, layout, people, dicom_patient)
        run = run_of(folder / name, layout)
        found.append(opened(run.model_copy(update={"data": run.data.model_copy(update=names)})))
    found[1].pop(f"patient {other.name}", None)
    return found


@pytest.mark.parametrize("layout", ["dicom seg", "dicom rtstruct"])
@pytest.mark.parametrize("oddity", DICOM_ODDITIES)
def test_hole_a_dicom_patient_with_other_series_or_segments_moves_nobody(tmp_path, layout, oddity):
    without, with_one_more = changed(tmp_path, layout, Person("X99", 41, oddity))
    assert without == with_one_more
    assert without["channels"] == ("t1",)
    assert sum(name.startswith("patient") for name in without) == len(PEOPLE)


@pytest.mark.parametrize("names", [{"channels": ()}, {"labels": {}}, {"channels": (), "labels": {}}])
def test_hole_private_dicom_without_names_is_refused_in_the_same_words_whoever_is_in_it(tmp_path, names):
    without, with_one_more = changed(tmp_path, "dicom seg", Person("X99", 41, "text"), **names)
    assert without == with_one_more
    assert "name" in without["error"]
    assert "4711" not in without["error"]


def test_hole_a_channel_that_nobody_has_is_answered_without_words_of_private_headers(tmp_path):
    people = [Person(person.name, person.seed, "text") for person in PEOPLE]
    write(tmp_path / "d", "dicom seg", people, dicom_patient)
    run = run_of(tmp_path / "d", "dicom seg")
    answer = opened(run.model_copy(update={"data": run.data.model_copy(update={"channels": ("t1", "t2")})}))
    assert answer == {"error": "LayoutError: not one patient of the hospital's private data can be used"}


def test_hole_the_first_row_of_a_json_manifest_names_no_channels(tmp_path):
    rows = [{"patient_id": f"p{i}", "image": f"{i}.png", "label": 1} for i in range(10)]
    odd = {"patient_id": "x", "image_pet": "x.png", "label": 1}
    for name, listed in (("one", rows), ("two", [odd, *rows])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(listed))
    assert discover_cases(tmp_path / "one", named=("t1",)).channels == ()
    assert discover_cases(tmp_path / "two", named=("t1",)).channels == ()


def test_hole_channels_are_not_counted_in_the_first_image(tmp_path):
    write(tmp_path / "d", "csv png", PEOPLE, dicom_patient)
    run = run_of(tmp_path / "d", "csv png")
    unnamed = run.model_copy(update={"data": run.data.model_copy(update={"channels": ()})})
    with pytest.raises(ConfigError, match=r"name them in data\.channels"):
        open_hospital_data(unnamed, ("a",))


def test_hole_the_highest_class_of_private_patients_names_no_classes(tmp_path):
    write(tmp_path / "d", "classes png", [*PEOPLE, Person("X", 3, "unknown label")], dicom_patient)
    run = run_of(tmp_path / "d", "classes png")
    unnamed = run.model_copy(update={"data": run.data.model_copy(update={"labels": {}})})
    with pytest.raises(ConfigError, match=r"name every class in data\.labels"):
        open_hospital_data(unnamed, ("a",))
    seen = opened(run)
    assert "patient X" not in seen
    assert seen["labels"] == {1: "lesion"}


def test_hole_the_first_entry_does_not_decide_between_decathlon_and_nnunet(tmp_path):
    write(tmp_path / "d", "decathlon", PEOPLE, dicom_patient)
    before = opened(run_of(tmp_path / "d", "decathlon"))
    document = json.loads((tmp_path / "d" / "dataset.json").read_text())
    document["training"].insert(0, {"image": "imagesTr/X.nii.gz", "label": "labelsTr/X.nii.gz"})
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(document))
    (tmp_path / "d" / "imagesTr" / "X_0000.nii.gz").write_bytes(b"")
    assert opened(run_of(tmp_path / "d", "decathlon")) == before


def test_hole_one_mark_of_a_holdout_moves_no_unmarked_patient(tmp_path):
    write(tmp_path / "d", "csv png", PEOPLE, dicom_patient)
    cases = discover_cases(tmp_path / "d", named=("t1",)).cases
    _, before = split_holdout(cases, 0.3, 0, independently=True)
    marked = Person("X99", 41, "holdout")
    write(tmp_path / "e", "csv png", [*PEOPLE, marked], dicom_patient)
    _, after = split_holdout(discover_cases(tmp_path / "e", named=("t1",)).cases, 0.3, 0, independently=True)
    assert {case.patient_id for case in before} == {case.patient_id for case in after} - {"X99"}
    assert "X99" in {case.patient_id for case in after}


def test_private_sides_may_be_empty(tmp_path):
    write(tmp_path / "d", "csv png", PEOPLE, dicom_patient)
    cases = discover_cases(tmp_path / "d", named=("t1",)).cases
    assert split_holdout(cases[:1], 1e-9, 0, independently=True) == (cases[:1], ())


@pytest.mark.parametrize("second", ["images", "images/inner", "link", "images/../images"])
def test_hole_one_folder_is_not_two_hospitals(tmp_path, make_run, second):
    (tmp_path / "images" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    hospitals = [
        {"id": name, "directory": str(tmp_path / place), "num_patients": 10}
        for name, place in (("a", "images"), ("b", second))
    ]
    with pytest.raises(ConfigError, match="name one folder"):
        list_hospitals(make_run({"hospitals": hospitals}))


def test_hole_a_case_that_turns_unreadable_while_training_is_a_gradient_of_zero(tmp_path):
    write(tmp_path / "d", "csv png", PEOPLE, dicom_patient)
    run = run_of(tmp_path / "d", "csv png")
    data = open_hospital_data(run.model_copy(update={"data": run.data.model_copy(update={"cache": "none"})}), ("a",))
    data.check_cases()
    for file in (tmp_path / "d").glob("*.png"):
        file.unlink()
    images, targets = data.train_patches(0, 2, np.random.default_rng(0))
    assert images.shape == (2, 1, 8, 8)
    assert bool(images.isnan().all())
    assert targets.shape == (2, 8, 8)


KILLED = """
import sys, os, signal
from pathlib import Path
from medfl_ray.data.prepare.cache import PreparedCases
from medfl_ray.data.cases import PreparedCase
import numpy as np
case = PreparedCase("p", "c", np.ones((1, 4, 4), np.float32), None, np.eye(4))
cases = PreparedCases([lambda: case], "disk", root=Path(sys.argv[1]))
cases[0]
print(len(list(Path(sys.argv[1]).iterdir())), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_hole_prepared_volumes_of_a_killed_process_go_when_the_next_one_starts(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cache")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ended.stdout.strip() == "1"
    assert list((tmp_path / "cache").rglob("*.npy")), "the kill leaves what the next start sweeps"
    write(tmp_path / "d", "csv png", PEOPLE, dicom_patient)
    run = run_of(tmp_path / "d", "csv png")
    on_disk = run.model_copy(update={"data": run.data.model_copy(update={"cache": "disk"})})
    data = open_hospital_data(on_disk, ("a",), cache_root=tmp_path / "cache")
    data.check_cases()
    assert sweep_caches(tmp_path / "cache") == 0, "what is in use stays"
    modes = {path.stat().st_mode & 0o077 for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]}
    assert modes == {0}
    data.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_fork_inherits_it_does_not_remove(tmp_path):
    from medfl_ray.data.prepare.cache_folders import locked_folder

    folder, release = locked_folder(tmp_path)
    child = os.fork()
    if child == 0:
        release()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.exists()
    release()
    assert not folder.exists()


def volumes(folder: Path, paths, edge: int = 8) -> None:
    """Write an image per path and beside each a label, each of its own voxels."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        label = np.zeros((edge, edge, edge), np.uint8)
        label[2:5, 2:6, 2:5] = 1
        image = np.random.default_rng(list(path.encode())).integers(0, 90, label.shape).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / path)
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{path.removesuffix('.nii')}-label.nii")


def two_channels(folder: Path, names) -> dict:
    lines = [f"{name},{name}-0.nii,{name}-1.nii,{name}-0-label.nii" for name in names]
    (folder / "manifest.csv").write_text("\n".join(["patient_id,image_flair,image_t1,label", *lines]))
    return opened(run_of(folder, "csv nifti"))


def test_hole_a_case_that_is_too_large_is_left_out_before_its_channels_are_stacked(tmp_path, monkeypatch):
    names = [f"p{i}" for i in range(10)]
    volumes(tmp_path, [f"{name}-{channel}.nii" for name in names for channel in (0, 1)])
    volumes(tmp_path, ["x-0.nii", "x-1.nii"], edge=20)
    monkeypatch.setattr(loading, "MAX_PRIVATE_VOXELS", 2 * 8**3)
    real = np.concatenate

    def little_memory(arrays, *args, **options):
        if sum(array.size for array in arrays) > 2 * 8**3:
            raise MemoryError
        return real(arrays, *args, **options)

    before = two_channels(tmp_path, names)
    monkeypatch.setattr(np, "concatenate", little_memory)
    assert two_channels(tmp_path, [*names[:3], "x", *names[3:]]) == before
    assert sum(name.startswith("patient") for name in before) == 10


def test_hole_a_case_that_is_too_large_at_the_models_spacing_is_left_out_with_numbers(tmp_path, monkeypatch):
    volumes(tmp_path, [f"p{i}-{channel}.nii" for i in range(10) for channel in (0, 1)])
    for name in ("p3-0", "p3-1", "p3-0-label"):
        image = nib.load(tmp_path / f"{name}.nii")
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([4, 4, 4, 1])), tmp_path / f"{name}.nii")
    monkeypatch.setattr(loading, "MAX_PRIVATE_VOXELS", 2 * 8**3)
    two_channels(tmp_path, [f"p{i}" for i in range(10)])
    run = run_of(tmp_path, "csv nifti")
    spaced = run.model_copy(update={"data": run.data.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})})
    data = open_hospital_data(spaced, ("a",))
    data.check_cases()
    (note,) = data.notes
    assert "case 4 of 10" in note
    assert "at most 1024 in all are prepared" in note
    assert len(data.train) + len(data.holdout) == 9


def test_data_that_are_not_private_have_no_such_bound(tmp_path, monkeypatch):
    volumes(tmp_path, [f"p{i}-{channel}.nii" for i in range(4) for channel in (0, 1)])
    two_channels(tmp_path, [f"p{i}" for i in range(4)])
    monkeypatch.setattr(loading, "MAX_PRIVATE_VOXELS", 1)
    run = run_of(tmp_path, "csv nifti")
    hospitals = [run.data.hospitals[0].model_copy(update={"declared": "public"})]
    data = open_hospital_data(
        run.model_copy(update={"data": run.data.model_copy(update={"hospitals": hospitals})}), ("a",)
    )
    data.check_cases()
    assert len(data.train) + len(data.holdout) == 4
    monkeypatch.undo()
    assert loading.MAX_PRIVATE_VOXELS == 2**29


def dataset_json(folder: Path, entries) -> tuple:
    folder.mkdir(exist_ok=True)
    listed = [{"label": "x.nii", **entry} for entry in entries]
    document = {"modality": {"0": "t1"}, "labels": {"1": "lesion"}, "training": listed}
    (folder / "dataset.json").write_text(json.dumps(document))
    return discover_cases(folder, "decathlon", named=()).cases


def test_hole_equal_file_names_in_folders_of_their_own_are_not_one_patient(tmp_path):
    paths = [f"person-{i}/t1.nii" for i in range(10)]
    volumes(tmp_path, paths)

    def shown(listed):
        dataset_json(tmp_path, [{"image": path, "label": path.replace(".nii", "-label.nii")} for path in listed])
        return opened(run_of(tmp_path, "decathlon"))

    before, after = shown(paths[:-1]), shown(paths)
    assert after.pop("patient ./person-9/t1")
    assert before == after
    assert sum(name.startswith("patient") for name in before) == 9


@pytest.mark.parametrize(
    ("entry", "patient"),
    [
        ({"image": "a.nii.gz"}, "a"),
        ({"image": "./imagesTr/a.nii.gz"}, "a"),
        ({"image": "imagesTr//a.NII.gz"}, "a"),
        ({"image": "imagesTr/p/t1.png"}, "./imagesTr/p/t1"),
        ({"image": "./p/t1.png"}, "./p/t1"),
        ({"image": ["p/t1.nii", "p/t2.nii"]}, "./p/t1"),
        ({"image": "/p/t1.png"}, ".//p/t1"),
        ({"image": "1.2.840.113"}, "1.2.840.113"),
        ({"image": "p/1.2.840.113", "series_0": "7"}, "./p/1.2.840.113/./7"),
        ({"image": "all", "series_0": "7"}, "./all/./7"),
        ({"image": "."}, "./."),
        ({"image": "p/t1.png", "patient_id": "p/t1"}, "p/t1"),
        ({"image": "p/t1.png", "patient_id": "./p/t1"}, "././p/t1"),
        ({"image": "p/t1.png", "patient_id": "././p/t1"}, "./././p/t1"),
    ],
)
def test_hole_an_entry_alone_decides_its_patient_and_no_path_equals_a_given_name(tmp_path, entry, patient):
    others = [{"image": "q/t1.png"}, {"image": "r/t1.png", "patient_id": "p/t1"}, {"image": "imagesTr/s.nii"}]
    names = [
        [case.patient_id for case in dataset_json(tmp_path, listed) if case.images[0] == tmp_path / first]
        for first in [entry["image"] if isinstance(entry["image"], str) else entry["image"][0]]
        for listed in ([entry], [*others, entry], [entry, *others])
    ]
    assert names == [[patient]] * 3


def test_hole_nnunet_cases_without_a_patient_are_patients_of_their_own(tmp_path):
    (tmp_path / "labelsTr").mkdir()
    volumes(tmp_path, [f"imagesTr/{name}_0000.nii" for name in ("a", "b", "c", "d")])
    document = {"channel_names": {"0": "t1"}, "labels": {"lesion": 1}, "file_ending": ".nii"}
    found = []
    for patients in ({}, {"b": "a", "c": "./d"}, {"b": "a", "c": "./d", "d": ""}):
        (tmp_path / "dataset.json").write_text(json.dumps({**document, "patient_ids": patients}))
        found.append([case.patient_id for case in discover_cases(tmp_path, named=()).cases])
    # A case given to the name of another is of that patient, as a later examination is.
    assert found == [["a", "b", "c", "d"], ["a", "a", "././d", "d"], ["a", "a", "././d", "d"]]
