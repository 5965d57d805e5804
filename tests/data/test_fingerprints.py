"""Fingerprints of data sets: of public files their contents, of private ones nothing that a patient could change."""

from pathlib import Path

import pytest
from cli_runs import configuration, hospital_data, write_patients

from medfl_ray.config.files import parse_run_config
from medfl_ray.data import fingerprints
from medfl_ray.data.fingerprints import data_fingerprint
from medfl_ray.data.sources import list_hospitals


def fingerprint(folder: Path, **changes: object) -> tuple[str, str]:
    run = parse_run_config(configuration(data=hospital_data(folder, **changes)))
    return data_fingerprint(run, list_hospitals(run)[0])


def test_public_contents_wherever_they_lie(tmp_path: Path) -> None:
    one, two = write_patients(tmp_path / "one"), write_patients(tmp_path / "two")
    assert fingerprint(one, declared="public") == fingerprint(two, declared="public")
    assert fingerprint(one, declared="public")[1] == "contents"
    image = bytearray((two / "1.nii.gz").read_bytes())
    image[-1] ^= 1
    (two / "1.nii.gz").write_bytes(image)
    assert fingerprint(one, declared="public") != fingerprint(two, declared="public")


def test_of_private_data_only_the_declaration(tmp_path: Path) -> None:
    folder = write_patients(tmp_path / "one")
    before = fingerprint(folder)
    assert before[1] == "declaration"
    (folder / "0.nii.gz").write_bytes(b"another patient")
    assert fingerprint(folder) == before
    assert fingerprint(folder, num_patients=30) != before


def test_many_files_count_by_name_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_patients(tmp_path / "one")
    monkeypatch.setattr(fingerprints, "MAX_BYTES", 100)
    before = fingerprint(folder, declared="public")
    assert before[1] == "names and sizes"
    (folder / "1.nii.gz").write_bytes((folder / "1.nii.gz").read_bytes() + b"more")
    assert fingerprint(folder, declared="public") != before


def test_files_on_another_machine_leave_the_declaration(tmp_path: Path) -> None:
    folder = write_patients(tmp_path / "one")
    run = parse_run_config(configuration(data=hospital_data(folder, declared="public")))
    policy = list_hospitals(run)[0]
    folder.rename(tmp_path / "elsewhere")
    assert data_fingerprint(run, policy).of == "declaration"


def test_phantoms_by_their_recipe() -> None:
    def recipe(seed: int) -> list[tuple[str, str]]:
        data = {"phantom": {"num_hospitals": 2, "patients_per_hospital": 3, "size_voxels": 16, "seed": seed}}
        run = parse_run_config(configuration(data=data))
        return [data_fingerprint(run, policy) for policy in list_hospitals(run)]

    first = recipe(3)
    assert first == recipe(3)
    assert len({*first, *recipe(4)}) == 4
    assert {found[1] for found in first} == {"recipe"}
