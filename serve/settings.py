"""What a serving application can be told: by a Serve config's `args`, by the environment, or by `medfl-ray deploy`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from medfl_ray.config.base import Fraction, Positive, PositiveFloat, Section
from medfl_ray.export.precision import VariantName
from serve.clinic.pacs_target import PacsTarget

ENVIRONMENT = {
    "MEDFL_MODELS": "models",
    "MEDFL_REGISTRY": "registry",
    "MEDFL_SERVE_TOKENS": "tokens",
    "MEDFL_SERVE_MODEL": "only",
}


class Limits(Section):
    """How much one request may take."""

    max_upload_bytes: Positive = Field(default=2 * 1024**3, description="Largest body of a request.")
    max_json_bytes: Positive = Field(
        default=16 * 1024**2, description="Largest JSON of a request or an answer; larger tensors travel in binary."
    )
    max_voxels: Positive = Field(
        default=2**28, description="Voxels of a volume, over all channels, as it comes and at the model's spacing."
    )
    max_tensor_voxels: Positive = Field(
        default=2**24, description="Voxels of one image of /infer, over all channels: it runs whole, not in windows."
    )
    stall_timeout_s: PositiveFloat = Field(default=4.0, description="Longest pause between two parts of a body.")
    upload_timeout_s: PositiveFloat = Field(default=900.0, description="Longest time that a whole body may take.")
    inference_timeout_s: PositiveFloat = Field(
        default=600.0, description="Longest time from the end of a body to its answer, queueing included."
    )
    requests_per_minute: PositiveFloat = Field(default=600.0, description="Requests of one token, on average.")
    burst: Positive = Field(default=120, description="Requests of one token that may come at once.")


class Scaling(Section):
    """Replicas of the model deployment and what each of them has."""

    min_replicas: Positive = Field(default=1, description="Replicas that are always there.")
    max_replicas: Positive = Field(default=1, description="Replicas under load.")
    target_ongoing_requests: PositiveFloat = Field(
        default=2.0, description="Requests per replica at which another replica is started."
    )
    max_ongoing_requests: Positive = Field(default=8, description="Requests that one replica has at a time.")
    volumes_at_once: Positive = Field(default=2, description="Volumes that one replica has in memory at a time.")
    max_queued_requests: Positive = Field(
        default=256, description="Requests that may wait per ingress replica; further ones are refused with 503."
    )
    num_cpus: Positive = Field(default=1, description="CPU cores, and onnxruntime threads, of one replica.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs of one replica.")
    ingress_replicas: Positive = Field(default=1, description="Replicas of the HTTP ingress.")


class ServeSettings(Section):
    """One serving application; a source of models is needed: `models` or `registry`, otherwise the default registry."""

    models: Path | None = Field(default=None, description="Folder of model packages, or one package.")
    registry: str | None = Field(default=None, description="Folder or URL of a model registry.")
    only: str | None = Field(default=None, description="Serve this model alone.")
    tokens: Path | None = Field(default=None, description="File of tokens; default: serve/tokens.json in the state.")
    variant: VariantName = Field(default="float32", description="Precision to serve.")
    poll_s: PositiveFloat = Field(default=2.0, description="Time between two looks for promoted versions.")
    models_per_replica: Positive = Field(default=3, description="Versions that one replica keeps in memory.")
    voxels_per_batch: Positive = Field(
        default=64**3, description="Voxels that onnxruntime gets at once, in whole windows; at least one window."
    )
    batch_wait_s: float = Field(
        default=0.002, ge=0, description="How long an unfilled batch waits for windows of other requests."
    )
    drift_threshold: PositiveFloat = Field(
        default=0.5, description="Mean shift of input intensities, in standard deviations, that raises the alert."
    )
    drift_smoothing: Fraction = Field(default=0.1, description="Weight of the newest volume in the mean shift.")
    slicer_sign_in: bool = Field(
        default=False, description="Let 3D Slicer's MONAI Label plug-in sign in with a token as its password."
    )
    pacs: tuple[PacsTarget, ...] = Field(default=(), description="PACS that results may be sent to.")
    limits: Limits = Limits()
    scaling: Scaling = Scaling()

    @classmethod
    def from_environment(cls) -> ServeSettings:
        """Take what the environment says; the rest is default."""
        values: dict[str, Any] = {
            field: os.environ[name] for name, field in ENVIRONMENT.items() if os.environ.get(name)
        }
        if "models" in values:
            values.pop("registry", None)  # set for the other commands, very likely
        # Another process, where a relative path would be another file, opens them.
        for field in {"models", "tokens"} & values.keys():
            values[field] = Path(values[field]).expanduser().absolute()
        return cls(**values)
