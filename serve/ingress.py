"""The ingress in its own process: HTTP in front, the model replicas behind."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from medfl_ray.data.uploads.limits import UploadLimits
from medfl_ray.errors import ConfigError
from serve.auth import TokenBook, tokens_path
from serve.backend import Backend
from serve.clinical_routes import clinical_routers
from serve.http_app import build_http_app
from serve.logs import configure_logs
from serve.replicas.model_loader import Catalogue
from serve.replicas.ray_replicas import RayReplicas
from serve.replicas.sources import open_source
from serve.serving_metrics import ServingMetrics
from serve.settings import Limits, ServeSettings


def ingress_app(settings: ServeSettings, models: DeploymentHandle[Any]) -> FastAPI:
    """Build the HTTP application over the handle of the model deployment.

    Raises:
      ConfigError: there are no tokens, so that nobody could use the service.
    """
    configure_logs()
    metrics = ServingMetrics(settings.drift_threshold, settings.drift_smoothing, ray_too=True)
    replicas = RayReplicas(models)
    catalogue = Catalogue(open_source(settings), replicas.describe, settings.only, metrics.served)
    backend = Backend(replicas, catalogue, metrics, settings.limits.inference_timeout_s)
    tokens = TokenBook(tokens_path(settings.tokens))
    if tokens.is_empty:
        raise ConfigError("there are no tokens, so nobody could use the service; make one: medfl-ray tokens add NAME")
    routers = clinical_routers(backend, upload_limits(settings.limits), settings.pacs)
    return build_http_app(backend, settings, tokens, metrics, routers, behind_proxy=True)


def upload_limits(limits: Limits) -> UploadLimits:
    """Return the limits of uploaded images that follow from those of requests."""
    return UploadLimits(
        max_upload_bytes=limits.max_upload_bytes,
        upload_seconds=limits.upload_timeout_s,
        max_voxels=limits.max_voxels,
    )
