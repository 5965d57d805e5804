from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from medfl_ray.data.fetch import fetch
from medfl_ray.data.inspection import inspect_folder, write_case_table
from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.layouts.partitions import partition_patients
from medfl_ray.data.layouts.write_manifest import deal, write_manifest
from medfl_ray.data.picture_sheet import write_picture_sheet
from medfl_ray.errors import ConfigError, UnreadableFile


def test_facts_of_a_folder(tmp_path, decathlon, write_nifti):
    folder = decathlon()
    write_nifti(folder / "labelsTr/c.nii.gz", np.full((10, 12, 8), 9, np.uint8))
    (folder / "labelsTr/d.nii.gz").unlink()
    found = inspect_folder(folder)
    assert found.cases[0].shape == (10, 12, 8)
    assert found.cases[0].label_ml == pytest.approx({1: 4 * 4 * 2 / 1000, 2: 2 * 4 * 3 / 1000})
    assert found.num_unusable == 2
    assert "value 9; expected 0 (background) or one of [1, 2]" in found.problems[1]
    assert "does not exist" in found.problems[2]
    write_case_table(found, tmp_path / "cases.csv")
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]


def test_empty_label_and_flat_channel_are_noted(decathlon, write_nifti):
    folder = decathlon()
    write_nifti(folder / "labelsTr/a.nii.gz", np.zeros((10, 12, 8), np.uint8))
    write_nifti(folder / "imagesTr/b.nii.gz", np.ones((10, 12, 8), np.float32))
    problems = inspect_folder(folder).problems
    assert "the label is empty (case 1)" in problems
    assert "channel 1 has one value everywhere (case 2)" in problems


def test_picture_sheet_shows_the_label_where_the_image_is_bright(tmp_path, decathlon):
    index = discover_cases(decathlon())
    assert write_picture_sheet(index.cases, index.labels, tmp_path / "sheet.png") == 4
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    red = (pixels[..., 0] - pixels[..., 1]) > 60
    assert 500 < red.sum() < pixels.shape[0] * pixels.shape[1] / 4


def test_manifest_of_a_partition_reads_back_the_same(tmp_path, decathlon):
    from medfl_ray.config.data import PartitionConfig

    index = discover_cases(decathlon("abcdefgh"))
    dealt = deal(partition_patients(index.cases, PartitionConfig(by="iid", num_hospitals=2), 0), 0.25, 0)
    for name in ("manifest.json", "split.csv"):
        write_manifest(dealt, index, tmp_path / "out" / name)
        back = discover_cases(tmp_path / "out" / name)
        assert {c.patient_id: (c.split, c.fields["hospital"]) for c in back.cases} == {
            c.patient_id: (side, part.hospital)
            for part in dealt
            for side, cases in (("train", part.train), ("holdout", part.holdout))
            for c in cases
        }
        assert all(path.is_file() for c in back.cases for path in (*c.images, c.label))
    assert discover_cases(tmp_path / "out" / "manifest.json").labels == index.labels


def test_fetch_from_a_local_archive(tmp_path, decathlon):
    import tarfile

    with tarfile.open(tmp_path / "local.tar", "w") as tar:
        tar.add(decathlon(), "Task04_Hippocampus")
    folder = fetch("hippocampus", tmp_path / "out", tmp_path / "local.tar")
    assert len(discover_cases(folder).cases) == 4
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Task04_Hippocampus"]


def test_fetch_command(tmp_path, decathlon):
    import tarfile

    from typer.testing import CliRunner

    from medfl_ray.cli.data import app

    with tarfile.open(tmp_path / "local.tar.gz", "w:gz") as tar:
        tar.add(decathlon(), "Task04_Hippocampus")
    options = ["fetch", "hippocampus", "--out", str(tmp_path / "data"), "--archive", str(tmp_path / "local.tar.gz")]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert "4 cases" in shown.output
    assert "medfl-ray data inspect" in shown.output


def test_fetch_refuses_what_is_not_the_data_set(tmp_path):
    (tmp_path / "bad.tar").write_bytes(b"not a tar file")
    with pytest.raises(UnreadableFile, match="cannot be unpacked"):
        fetch("hippocampus", tmp_path / "out", tmp_path / "bad.tar")
    with pytest.raises(ConfigError, match="known are hippocampus"):
        fetch("liver", tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        fetch("hippocampus", tmp_path, tmp_path / "nowhere.tar")


def test_command_line(tmp_path, decathlon, write_nifti):
    from typer.testing import CliRunner

    from medfl_ray.cli.data import app

    folder, out = decathlon("abcdefgh"), tmp_path / "out"
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(folder), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "8 cases of 8 patients" in shown.output
    assert (out / "pictures.png").stat().st_size > 10_000
    dealt = runner.invoke(app, ["split", str(folder), "--by", "iid", "--hospitals", "2", "--out", str(out / "m.json")])
    assert dealt.exit_code == 0, dealt.output
    assert len(json.loads((out / "m.json").read_text())["cases"]) == 8
    write_nifti(folder / "imagesTr/a.nii.gz", np.full((10, 12, 8), np.nan, np.float32))
    broken = runner.invoke(app, ["inspect", str(folder)])
    assert "1 of 8 cases cannot be used" in str(broken.exception)
    assert "NaN" in broken.output
