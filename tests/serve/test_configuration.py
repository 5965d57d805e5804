"""configs/serve.yaml is what Serve and the application take, and says what the settings say."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from serve.ingress import upload_limits
from serve.launcher import http_options
from serve.settings import Limits, Scaling, ServeSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config():
    return yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text(encoding="utf-8"))


def test_serve_takes_the_file(config):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "127.0.0.1"


def test_the_application_takes_its_arguments(config):
    (application,) = config["applications"]
    settings = ServeSettings.model_validate(application["args"])
    assert settings.limits == Limits()  # the file repeats the defaults that an operator is likely to change
    options = http_options(settings, "127.0.0.1", 8000)
    assert config["http_options"] == options


def test_an_operator_sets_the_most_voxels_of_an_upload():
    limits = Limits(max_upload_bytes=10, upload_timeout_s=7.0, max_voxels=1000)
    found = upload_limits(limits)
    assert (found.max_upload_bytes, found.upload_seconds, found.max_voxels) == (10, 7.0, 1000)


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValidationError):
        ServeSettings.model_validate({"modles": "x"})


def test_every_setting_is_documented():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for section in (ServeSettings, Limits, Scaling):
        for name, field in section.model_fields.items():
            assert f"`{name}`" in text, name
            assert field.description or name in ("limits", "scaling"), name
