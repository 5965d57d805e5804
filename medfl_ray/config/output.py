"""The output section: what a run leaves behind, and where else it is told of."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from medfl_ray.config.base import Positive, Section

TRACKING_URI = re.compile(
    r"sqlite:///[^?#]+|https://[^/@?#]+[^@?#]*|http://(127\.0\.0\.1|localhost|\[::1\])(:\d+)?(/.*)?"
)


class MlflowConfig(Section):
    """Where MLflow keeps a copy of the run's parameters, figures and files; needs the extra `mlflow`."""

    tracking_uri: str = Field(
        description="sqlite:///FILE, or the http(s) address of a tracking server; http on loopback only, no password."
    )
    experiment: str | None = Field(None, description="MLflow's experiment; the run's name when absent.")

    @field_validator("tracking_uri")
    @classmethod
    def _is_safe(cls, value: str) -> str:
        if not TRACKING_URI.fullmatch(value):
            raise ValueError(
                "output.mlflow.tracking_uri is neither sqlite:///FILE, https://SERVER nor http on loopback, or holds a "
                "user name; a password belongs into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return value


class OutputConfig(Section):
    """What a run leaves behind."""

    directory: Path = Field(Path("runs"), description="Folder in which the run's own folder is made.")
    state_directory: Path | None = Field(
        None, description="Folder of the hospitals' ledgers; the user's state folder when absent."
    )
    report: bool = Field(True, description="Write report.html.")
    export: bool = Field(True, description="Write model.onnx with its parity figure.")
    register_model: bool = Field(
        True, description="Register the exported model of a completed run as a candidate, under the run's name."
    )
    keep_checkpoints: Positive = Field(3, description="Checkpoints kept besides the best one.")
    mlflow: MlflowConfig | None = Field(None, description="Tracking with MLflow; none when absent.")
