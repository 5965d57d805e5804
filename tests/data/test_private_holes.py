"""Holes at the edge of private data that were open once: how one patient moved another, and what was left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from neighbours import DICOM_ODDITIES, Person, dicom_patient, opened, run_of, write

from medfl_ray.data.cache_folders import sweep_caches
from medfl_ray.data.layouts import discover_cases
from medfl_ray.data.partitions import split_holdout
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
from medfl_ray.data.cache import PreparedCases
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
    from medfl_ray.data.cache_folders import locked_folder

    folder, release = locked_folder(tmp_path)
    child = os.fork()
    if child == 0:
        release()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.exists()
    release()
    assert not folder.exists()
