"""medfl-ray export: variants, calibration under a declaration, and the bundle."""

from __future__ import annotations

import pytest
from cli_runs import command_line


@pytest.fixture
def medfl(monkeypatch, capsys, tmp_path):
    """The command line, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return command_line(monkeypatch, capsys)


@pytest.mark.ci
def test_everything_at_once(medfl, make_run, tmp_path):
    folder = make_run(
        model={"type": "unet2d", "features": [4, 8], "in_channels": 2, "out_channels": 2},
        training={"patch_size_voxels": 16, "device": "cpu"},
    )
    answer = medfl("export", folder, "--variants", "float16", "--bundle", tmp_path / "bundle")
    assert answer.code == 0, answer.err
    assert "model.float16.onnx: Dice lost 0.0" in answer.out
    assert "4 phantoms" in answer.out
    assert f"card      {folder / 'card.md'}" in answer.out
    assert "| float16 | `model.float16.onnx` |" in (folder / "card.md").read_text()
    assert (tmp_path / "bundle" / "models" / "model.pt").is_file()
    answer = medfl("export", folder)
    assert answer.code == 0, answer.err
    assert not (folder / "model.float16.onnx").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calibration", "images"], "--declared public"),
        (["--declared", "public"], "give both or neither"),
    ],
)
def test_calibration_needs_a_declaration(medfl, make_run, options, words):
    folder = make_run()
    answer = medfl("export", folder, "--variants", "int8", *options)
    assert answer.code != 0
    assert words in answer.err
    assert not (folder / "model.onnx").exists()


def test_private_is_no_declaration_for_calibration(medfl, make_run):
    answer = medfl("export", make_run(), "--calibration", "images", "--declared", "private")
    assert answer.code != 0
    assert "private" in answer.err
