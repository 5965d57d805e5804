"""Fixtures of the command line's tests."""

import pytest
from cli_runs import command_line


@pytest.fixture
def medfl(monkeypatch, capsys, tmp_path):
    """The command line, in a folder of its own, with the hospitals' state in `state`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path / "state"))
    return command_line(monkeypatch, capsys)
