"""Broken data, damaged runs, spent budgets, full disks and Ctrl-C: one clear sentence, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_runs import (
    DP,
    EDGE,
    PATIENTS,
    assert_one_clear_error,
    configuration,
    hospital_data,
    rows_of,
    run_folders,
    write_config,
    write_nifti,
    write_patients,
    write_rows,
)

from medfl_ray.cli.main import main
from medfl_ray.store.run.folder import RunFolder


def box(shape=(EDGE,) * 3, value=1):
    array = np.zeros(shape, np.uint8)
    array[2:6, 2:6, 2:6] = value
    return array


def shifted():
    affine = np.eye(4)
    affine[0, 3] = 40
    return affine


def image_with(value):
    array = np.random.default_rng(1).normal(size=(EDGE,) * 3).astype(np.float32)
    array[3, 3, 3] = value
    return array


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def change_row(folder: Path, number: int, **values: str) -> None:
    rows = rows_of(folder)
    rows[number] |= values
    write_rows(folder, rows)


def put_on_two_sides(folder: Path) -> None:
    rows = [row | {"split": side} for row, side in zip(rows_of(folder), ("train", "holdout") * 2, strict=True)]
    rows[1]["patient_id"] = rows[0]["patient_id"]
    write_rows(folder, rows)


def rename_column(folder: Path, old: str, new: str) -> None:
    write_rows(folder, [{new if key == old else key: value for key, value in row.items()} for row in rows_of(folder)])


EVERY = ("0", "1", "2", "3")
BROKEN_DATA = {
    "a case without label": (lambda d: change_row(d, 1, label=""), "case 2 of 4 has no label"),
    "a label file that is missing": (lambda d: (d / "1-mask.nii.gz").unlink(), "case 2 of 4: its label file does not"),
    "an image file that is missing": (lambda d: (d / "1.nii.gz").unlink(), "case 2 of 4: its image file does not"),
    "labels outside the range": (
        lambda d: [write_nifti(d / f"{n}-mask.nii.gz", box(value=7)) for n in EVERY], r"label.* 7",
    ),
    "labels of another shape": (
        lambda d: [write_nifti(d / f"{n}-mask.nii.gz", box((12, 12, 12))) for n in EVERY], "shape .*12, 12, 12",
    ),
    "labels that lie elsewhere": (
        lambda d: [write_nifti(d / f"{n}-mask.nii.gz", box(), shifted()) for n in EVERY], "label.*(elsewhere|grid|mm)",
    ),
    "compressed files that are cut": (
        lambda d: [cut(d / f"{n}.nii.gz") for n in EVERY], "not a complete NIfTI file.*copy it again",
    ),
    "garbage called .nii.gz": (
        lambda d: [(d / f"{n}.nii.gz").write_bytes(b"not an image") for n in EVERY], "not a complete NIfTI file",
    ),
    "NaN voxels": (
        lambda d: [write_nifti(d / f"{n}.nii.gz", image_with(np.nan)) for n in EVERY], "1 of 4096 voxels are NaN",
    ),
    "one patient on two sides": (put_on_two_sides, "cases 1 and 2 of 4 are of one patient but on two sides"),
    "one patient only": (lambda d: write_rows(d, rows_of(d)[:1]), r"1 patient\(s\) found; expected at least 2"),
    "no rows": (lambda d: (d / "manifest.csv").write_text("patient_id,image,label\n"), "lists no case"),
    "a column of another name": (lambda d: rename_column(d, "patient_id", "patient"), "case 1 of 4.* no patient_id"),
    "a split of another name": (
        lambda d: write_rows(d, [row | {"split": "later"} for row in rows_of(d)]), "split 'later'; expected train",
    ),
    "an empty folder": (lambda d: [path.unlink() for path in d.iterdir()], "is empty; expected"),
    "no folder": (lambda d: shutil.rmtree(d), "'patients' does not exist"),
    "a file of another kind": (
        lambda d: [shutil.rmtree(d), d.write_bytes(b"\0" * 50)], "'?patients'?.*(JSON|manifest|CSV)",
    ),
    "an image in the place of a manifest": (
        lambda d: (d / "manifest.csv").write_bytes(bytes(range(256))), "manifest.csv is not a UTF-8 CSV file",
    ),
    "a folder in the place of an image": (
        lambda d: [((d / f"{n}.nii.gz").unlink(), (d / f"{n}.nii.gz").mkdir()) for n in EVERY], "hospital|case",
    ),
}  # fmt: skip


CONFIGURATION_AT_FAULT = {"no folder"}


# Of private data these leave somebody to train on, and so are a note in the hospital's own log.
SOMEBODY_IS_LEFT = {
    "a case without label": "case 2 of 4 is not used: .*has no label",
    "a label file that is missing": "case 2 of 4 is not used: .*its label file does not exist",
    "an image file that is missing": "case 2 of 4 is not used: .*its image file does not exist",
    "one patient on two sides": "is not used: its patient is on two sides",
    "one patient only": "",
}


def run_with_broken_data(name, medfl, tmp_path, **changes):
    spoil, words = BROKEN_DATA[name]
    folder = write_patients(tmp_path / "patients")
    spoil(folder)
    raw = configuration(data=hospital_data(folder, **changes), federation={"max_failed_rounds": 0})
    return medfl("run", write_config(tmp_path / "c.yaml", raw)), words


@pytest.mark.parametrize("name", BROKEN_DATA)
def test_public_data_that_cannot_be_trained_on(name, medfl, tmp_path):
    answer, words = run_with_broken_data(name, medfl, tmp_path, declared="public")
    code = 2 if name in CONFIGURATION_AT_FAULT else 1
    assert_one_clear_error(answer, code, "north")
    assert re.search(words, answer.err), answer.err


@pytest.mark.parametrize("name", [name for name in BROKEN_DATA if name not in SOMEBODY_IS_LEFT])
def test_private_data_that_cannot_be_trained_on(name, medfl, tmp_path):
    answer, words = run_with_broken_data(name, medfl, tmp_path)
    code = 2 if name in CONFIGURATION_AT_FAULT else 1
    assert_one_clear_error(answer, code, "north", secrets=(".nii", *PATIENTS))
    if name in CONFIGURATION_AT_FAULT:
        assert re.search(words, answer.err), answer.err
    else:
        assert "medfl-ray data inspect" in answer.err
        assert not re.search(r"case \d|label|voxel|NaN|NIfTI|shape", answer.err), answer.err


@pytest.mark.parametrize("name", SOMEBODY_IS_LEFT)
def test_private_data_of_which_one_case_cannot_be_used_train_without_it(name, medfl, tmp_path):
    answer, _ = run_with_broken_data(name, medfl, tmp_path)
    assert answer.code == 0, answer.err
    assert re.search(SOMEBODY_IS_LEFT[name], answer.out), answer.out
    assert not any(secret in answer.out + answer.err for secret in (".nii", *PATIENTS))
    (folder,) = run_folders()
    written = "".join(path.read_text() for path in folder.rglob("*.json*"))
    assert "is not used" not in written


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two rounds on a public folder, and the folder."""
    place = tmp_path_factory.mktemp("finished")
    folder = write_patients(place / "patients")
    data = hospital_data(folder, declared="public")
    config = configuration(data=data, federation={"rounds": 2}, output={"directory": str(place / "runs")})
    write_config(place / "c.yaml", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medfl-ray", "run", str(place / "c.yaml")])
        with pytest.raises(SystemExit, match="0"):
            main()
    return run_folders(place / "runs")[0], folder


def quiet_environment(place: Path) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "MEDFL_STATE_DIR": str(place / "state")}


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def replace_weights(run: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"other": np.zeros(3, np.float32)}, run / "model.safetensors")


DAMAGED_RUNS = {
    "no weights": (lambda r: (r / "model.safetensors").unlink(), 1, "model.safetensors|has not ended"),
    "cut weights": (lambda r: cut(r / "model.safetensors"), 1, "model.safetensors"),
    "weights of another network": (replace_weights, 1, "model.safetensors|tensor"),
    "no hospitals.json": (lambda r: (r / "hospitals.json").unlink(), 1, "has not ended|hospitals.json"),
    "cut hospitals.json": (lambda r: cut(r / "hospitals.json"), 1, "hospitals.json"),
    "damaged config.yaml": (lambda r: (r / "config.yaml").write_text("name: x\nrounds: 3\n"), 2, "'rounds'"),
    "no config.yaml": (lambda r: (r / "config.yaml").unlink(), 2, "no config.yaml"),
}


@pytest.mark.parametrize("name", DAMAGED_RUNS)
def test_damaged_run(name, medfl, run, finished):
    damage, code, words = DAMAGED_RUNS[name]
    damage(run)
    (run / "model.onnx").unlink(missing_ok=True)
    for arguments in (("export", "run"), ("evaluate", "run", "--data", finished[1])):
        answer = medfl(*arguments)
        assert_one_clear_error(answer, code)
        assert re.search(words, answer.err), answer.err
    assert not (run / "model.onnx").exists()


def unlabelled(folder: Path) -> None:
    write_rows(folder, [row | {"label": ""} for row in rows_of(folder)])


def two_channels(folder: Path) -> None:
    both = np.zeros((EDGE, EDGE, EDGE, 2), np.float32) + image_with(1.0)[..., None]
    for number in EVERY:
        write_nifti(folder / f"{number}.nii.gz", both)


BROKEN_TESTS = {
    "no case has a label": (unlabelled, "none of the 4 cases in 'test' has a label"),
    "two channels for one": (two_channels, "channel"),
    "labels the model does not know": (
        lambda d: [write_nifti(d / f"{n}-mask.nii.gz", box(value=9)) for n in EVERY],
        "case . of 4.*label.* 9",
    ),
    "a class for a mask": (lambda d: change_row(d, 0, label="1"), "case 1 of 4 has a class as its label"),
    "empty folder": (lambda d: [path.unlink() for path in d.iterdir()], "'test' is empty"),
}


@pytest.mark.parametrize("name", BROKEN_TESTS)
def test_evaluate_on_what_does_not_fit(name, medfl, run, tmp_path):
    spoil, words = BROKEN_TESTS[name]
    spoil(write_patients(tmp_path / "test"))
    answer = medfl("evaluate", "run", "--data", tmp_path / "test")
    assert_one_clear_error(answer, 2)
    assert re.search(words, answer.err), answer.err


def test_figures_into_a_folder_that_is_not_there(medfl, run, finished):
    answer = medfl("evaluate", "run", "--data", finished[1], "--json", "gone/figures.json")
    assert_one_clear_error(answer, 2, "'figures.json'", "--json")


def test_inspect_names_the_cases_it_cannot_use(medfl, tmp_path):
    cut(write_patients(tmp_path / "patients") / "2.nii.gz")
    answer = medfl("data", "inspect", tmp_path / "patients")
    assert answer.code == 2
    assert answer.err.count("error:") == 1
    assert "1 of 4 cases cannot be used" in answer.err
    assert "not a complete NIfTI file" in answer.out


def test_resume_falls_back_to_the_checkpoint_before(medfl, run):
    cut(run / "checkpoints/round-00002/weights.safetensors")
    answer = medfl("run", "--resume", "run")
    assert answer.code == 0, answer.err
    assert "note: checkpoint 'round-00002': weights.safetensors does not match its checksum" in answer.out
    assert "the checkpoint before it is used" in answer.out
    assert json.loads((run / "checkpoints/round-00002/state.json").read_text())["round"] == 2


def test_resume_without_any_whole_checkpoint(medfl, run):
    for path in run.glob("checkpoints/round-*/state.json"):
        cut(path)
    before = (run / "metrics.jsonl").read_bytes()
    answer = medfl("run", "--resume", "run")
    assert_one_clear_error(answer, 1, "none of the 2 checkpoints of 'run' can be read", "backup")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resume_with_another_configuration(medfl, run):
    path = run / "config.yaml"
    path.write_text(re.sub(r"max_grad_norm: .*", "max_grad_norm: 0.5", path.read_text(), count=1))
    before = (run / "metrics.jsonl").read_bytes()
    assert_one_clear_error(medfl("run", "--resume", "run"), 2, "config.yaml of 'run'", "restore it")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resume_with_an_altered_receipt(medfl, run):
    path = run / "receipts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"attempt":1', '"attempt":7'), *lines[1:]]) + "\n")
    answer = medfl("receipts", "verify", "run")
    assert_one_clear_error(answer, 1, "round 1", "changed after it was signed")


def test_resume_with_a_damaged_attempt_number(medfl, run):
    (run / "attempt").write_text("")
    assert_one_clear_error(medfl("run", "--resume", "run"), 1, "'attempt'", "receipts.jsonl")


def test_a_second_run_beyond_the_budget(medfl, tmp_path):
    folder = write_patients(tmp_path / "patients")
    data = hospital_data(folder, max_epsilon=3)
    privacy = {**DP, "epsilon": 3}
    config = write_config(tmp_path / "c.yaml", configuration(data=data, privacy=privacy))
    assert medfl("run", config).code == 0
    answer = medfl("run", config)
    assert_one_clear_error(answer, 1, "north", "epsilon", "budget", "patient", "delta=")
    first, second = run_folders()
    assert (first / "model.safetensors").is_file()
    assert not (second / "model.safetensors").exists()


def test_a_full_disk_at_a_checkpoint(medfl, monkeypatch, tmp_path):
    """A file size limit fails the write as a full disk does; the rounds before stay whole and the run goes on."""
    config = configuration(federation={"rounds": 2}, model={"features": [4, 8]})
    write_config(tmp_path / "c.yaml", config)
    save, before = RunFolder.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(self, state, result):
        if state.round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        save(self, state, result)

    monkeypatch.setattr(RunFolder, "save_checkpoint", save_on_a_full_disk)
    try:
        answer = medfl("run", "c.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    assert_one_clear_error(answer, 1, "Free space", "--resume")
    (run,) = run_folders(tmp_path / "runs")
    assert [path.name for path in sorted((run / "checkpoints").glob("round-*"))] == ["round-00001"]
    answer = medfl("run", "--resume", run)
    assert answer.code == 0, answer.err
    assert (run / "model.safetensors").is_file()


@pytest.mark.ci
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_really_full(medfl, tmp_path):
    disk = tmp_path / "runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        config = write_config(
            tmp_path / "c.yaml", configuration(federation={"rounds": 9}, output={"keep_checkpoints": 9})
        )
        answer = medfl("run", config)
        assert_one_clear_error(answer, 1, "No space left", "Free space", "--resume")
        (run,) = run_folders()
        assert list(run.glob("checkpoints/round-*"))
        answer = medfl("run", "--resume", run)  # still full: the same sentence, and the checkpoints stay
        assert_one_clear_error(answer, 1, "No space left")
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert medfl("run", "--resume", run).code == 0
        assert (run / "model.safetensors").is_file()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.ci
def test_ctrl_c_then_resume(medfl, tmp_path):
    write_config(tmp_path / "c.yaml", configuration(federation={"rounds": 400}))
    process = subprocess.Popen(
        [sys.executable, "-m", "medfl_ray.cli.main", "run", "c.yaml"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet_environment(tmp_path),
    )  # fmt: skip
    ended_at = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoints/round-*/manifest.json")):
        assert time.monotonic() < ended_at
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    (run,) = run_folders(tmp_path / "runs")
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopped on request after round" in out
    assert f"medfl-ray run --resume runs/{run.name}" in out
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < 400
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("rounds: 400", f"rounds: {done + 1}"))
    assert medfl("run", "--resume", run).code == 0
    rounds = [json.loads(line)["round"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, done + 2))
    assert (run / "model.safetensors").is_file()


def test_a_run_that_loses_its_quorum_leaves_a_report_that_says_so(medfl, tmp_path):
    folder = write_patients(tmp_path / "patients")
    data = hospital_data(folder, max_epsilon=0.1)
    config = configuration(data=data, privacy={**DP, "epsilon": 3}, federation={"rounds": 4, "max_failed_rounds": 0})
    config["output"] = {**config.get("output", {}), "report": True}
    answer = medfl("run", write_config(tmp_path / "c.yaml", config))
    assert_one_clear_error(answer, 1, "was not published", "budget")
    (run,) = run_folders()
    page = (run / "report.html").read_text()
    assert "The run stopped early: 0 of 4 rounds were published." in page
    assert "published nothing: 0 of 1 hospitals delivered an update" in page
    assert not (run / "model.safetensors").exists()
    assert not (run / "checkpoints").exists()
