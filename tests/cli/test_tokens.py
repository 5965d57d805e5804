"""medfl-ray tokens, and what medfl-ray deploy refuses before it starts anything."""

import pytest
from tiny_models import write_model
from typer.testing import CliRunner

from medfl_ray.cli.deploy import _settings
from medfl_ray.cli.main import app
from medfl_ray.errors import ConfigError
from serve.auth import TokenBook


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.json"


def call(*words):
    result = CliRunner().invoke(app, ["tokens", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_token_is_made_listed_and_revoked(file):
    secret = call("add", "slicer", "--file", file).strip()
    assert TokenBook(file).identify(f"Bearer {secret}").name == "slicer"
    call("add", "prometheus", "--metrics-only", "--file", file)
    call("add", "workstation", "--store", "--file", file)
    listed = call("list", "--file", file)
    assert [line.split(maxsplit=1) for line in listed.splitlines()] == [
        ["slicer", "infer, observe"],
        ["prometheus", "observe"],
        ["workstation", "infer, observe, store"],
    ]
    assert secret not in listed
    call("revoke", "slicer", "--file", file)
    assert "slicer" not in call("list", "--file", file)


def test_a_token_for_metrics_alone_cannot_store(file):
    result = CliRunner().invoke(app, ["tokens", "add", "both", "--metrics-only", "--store", "--file", str(file)])
    assert isinstance(result.exception, ConfigError) or "exclude each other" in result.output
    assert not file.exists()


def test_deploy_takes_a_folder_or_a_registered_model(tmp_path):
    write_model(tmp_path / "run", mark=1)
    settings = _settings(str(tmp_path / "run"), None, {"variant": "int8"})
    assert (settings.models, settings.only, settings.variant) == (tmp_path / "run", None, "int8")
    with pytest.raises(ConfigError, match="no folder and no registered model 'brain'"):
        _settings("brain", str(tmp_path / "registry"), {})
