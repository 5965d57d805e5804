"""medfl-ray doctor on machines with something wrong."""

import json
import os
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from medfl_ray.cli import machine_checks as machine
from medfl_ray.cli.doctor import doctor
from medfl_ray.errors import ClusterError


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(doctor)
    return app


def answer(monkeypatch, stdout="", returncode=0):
    result = SimpleNamespace(stdout=stdout, returncode=returncode)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: result)


def test_a_sound_machine_is_ready(app, monkeypatch, tmp_path):
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["--no-ray", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["ready"]
    assert {check["name"] for check in report["checks"]} >= {"python", "packages", "gpu", "disk", "state", "ports"}
    assert str(tmp_path) not in result.stdout


def test_a_failed_check_names_itself_and_ends_with_exit_code_1(app, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    result = CliRunner().invoke(app, ["--no-ray"])
    assert result.exit_code == 1
    assert "fail processor" in result.stdout
    assert "OMP_NUM_THREADS is 'many'" in result.stdout
    assert "something above would stop a run" in result.stdout


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert machine.check_processor().status == "warn"


def test_packages_outside_their_bounds_are_named(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=999", "no-such-package>1", "rich; extra == 'dev'"])
    check = machine.check_packages()
    assert check.status == "fail"
    assert f"numpy {metadata.version('numpy')} is not >=999" in check.found
    assert "no-such-package is missing" in check.found
    assert "rich" not in check.found


def test_a_foreign_package_of_our_name_fails(monkeypatch):
    def taken():
        raise ClusterError("the package 'serve' belongs to the distribution 'other'")

    monkeypatch.setattr("actors.cluster.check_packages", taken)
    check = machine.check_names()
    assert check.status == "fail"
    assert "'other'" in check.found


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(machine, "PORTS", {port: "some service"})
        check = machine.check_ports()
    assert check.status == "warn"
    assert f"{port} (some service)" in check.found


@pytest.mark.parametrize(("free_gib", "status"), [(0.5, "fail"), (3, "warn"), (50, "ok")])
def test_disk_space(monkeypatch, tmp_path, free_gib, status):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free_gib * machine.GIB))
    assert machine.check_disk().status == status


def test_a_driver_that_torch_cannot_use_is_a_warning(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: "nvidia-smi")
    check = machine.check_gpu()
    assert check.status == "warn"
    assert "CUDA build" in check.advice


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    card = SimpleNamespace(name="Card", total_memory=80 * machine.GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: card)
    assert machine.check_gpu().found == "Card (80 GiB)"


def test_a_ledger_folder_that_others_can_change_is_a_warning(tmp_path):
    folder = tmp_path / "ledgers"
    folder.mkdir()
    folder.chmod(0o777)
    assert machine.check_state(folder).status == "warn"
    folder.chmod(0o700)
    assert machine.check_state(folder).status == "ok"


def test_a_ledger_folder_below_a_file_fails(tmp_path):
    (tmp_path / "file").write_text("")
    assert machine.check_state(tmp_path / "file" / "ledgers").status == "fail"


@pytest.mark.parametrize(
    ("stdout", "status", "found"),
    [
        ('noise\n{"started": true, "cpus": 2.0, "gpus": 0.0}\n', "ok", "starts here with 2 CPUs"),
        ('{"started": false, "cpus": 8.0, "gpus": 1.0}', "ok", "answers at RAY_ADDRESS"),
        ('{"error": "could not start"}', "fail", "could not start"),
        ("", "fail", "exit code 0 while starting"),
        ("Segmentation fault", "fail", "while starting"),
    ],
)
def test_what_ray_says_is_told(monkeypatch, stdout, status, found):
    answer(monkeypatch, stdout)
    check = machine.check_ray()
    assert check.status == status
    assert found in check.found


def test_ray_that_never_answers_fails(monkeypatch):
    def hang(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "did not answer" in machine.check_ray().found


def test_an_error_of_the_cluster_is_reported_as_json(monkeypatch, capsys):
    def refuse():
        raise ClusterError("no address")

    monkeypatch.setattr("actors.cluster.connect", refuse)
    machine.start_ray()
    assert json.loads(capsys.readouterr().out) == {"error": "no address"}


def test_a_manifest_is_counted_by_patients(tmp_path):
    rows = ["patient_id,image,label"]
    for case, patient in (("a", "p1"), ("b", "p1"), ("c", "p2")):
        (tmp_path / f"{case}.nii.gz").write_bytes(b"")
        (tmp_path / f"{case}_label.nii.gz").write_bytes(b"")
        rows.append(f"{patient},{case}.nii.gz,{case}_label.nii.gz")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    check = machine.check_data(tmp_path)
    assert check.found.startswith("3 cases of 2 patients")


def test_a_folder_without_a_layout_fails_without_its_path(tmp_path):
    check = machine.check_data(tmp_path / "nowhere")
    assert check.status == "fail"
    assert os.sep + tmp_path.parts[1] not in check.found
    assert Path(check.advice.split()[0]).suffix == ".md"


@pytest.mark.ci
def test_ray_really_starts():
    check = machine.check_ray()
    assert check.status == "ok"
    assert "starts here" in check.found
