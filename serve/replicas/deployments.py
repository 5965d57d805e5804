"""Plain classes made into Serve deployments: the one place where Serve's decorators are applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from serve.replicas.lean_worker import environment
from serve.replicas.model_loader import ModelSource
from serve.replicas.replica import LoadedModel, ModelReplica, Together, WindowBatch, own_answer
from serve.replicas.sources import open_source
from serve.settings import ServeSettings

MODELS, INGRESS = "models", "ingress"
DRAIN_S = 120.0
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 30.0
INGRESS_REQUESTS = 512


def application(settings: ServeSettings) -> Application:
    """Return the application: an ingress that speaks HTTP, and model replicas that it sends work to."""
    bound: Application = _ingress(settings).bind(_models(settings).bind(_source_of(settings), settings))
    return bound


def _source_of(settings: ServeSettings) -> Callable[[], ModelSource]:
    def source() -> ModelSource:
        return open_source(settings)

    return source


def _models(settings: ServeSettings) -> Any:
    scaling = settings.scaling
    return ray_serve.deployment(
        _batching_replica(settings),
        name=MODELS,
        ray_actor_options={
            "num_cpus": scaling.num_cpus,
            "num_gpus": scaling.num_gpus,
            "runtime_env": {"env_vars": environment()},
        },
        max_ongoing_requests=scaling.max_ongoing_requests,
        max_queued_requests=scaling.max_queued_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            max_replicas=max(scaling.min_replicas, scaling.max_replicas),
            target_ongoing_requests=scaling.target_ongoing_requests,
        ),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )


def _batching_replica(settings: ServeSettings) -> type[ModelReplica]:
    """Return the replica with Serve's cache of versions and Serve's batches in place of its own simple ones."""
    most, capacity = settings.scaling.max_ongoing_requests, settings.voxels_per_batch

    def share(batches: list[WindowBatch]) -> int:
        """Return how full a batch is: `most` when it has the voxels it may have."""
        voxels = sum(min(batch.num_voxels, capacity) for batch in batches)
        return max(len(batches), math.ceil(most * voxels / capacity))

    class BatchingReplica(ModelReplica):
        @ray_serve.multiplexed(  # type: ignore[untyped-decorator]
            max_num_models_per_replica=settings.models_per_replica
        )
        async def load(self, model_id: str) -> LoadedModel:
            return await ModelReplica.load(self, model_id)

        @ray_serve.batch(max_batch_size=most, batch_wait_timeout_s=settings.batch_wait_s, batch_size_fn=share)
        async def run_batch(self, batches: list[WindowBatch]) -> list[Together | Exception]:
            return await self.run_together(batches)

        async def run_windows(self, batch: WindowBatch) -> Together:
            return own_answer(await self.run_batch(batch))

    BatchingReplica.__name__ = BatchingReplica.__qualname__ = ModelReplica.__name__
    return BatchingReplica


def _ingress(settings: ServeSettings) -> Any:
    def build() -> FastAPI:
        # Here, because what HTTP and files need is no load for the replicas.
        from serve.ingress import ingress_app

        return ingress_app(settings, ray_serve.get_deployment_handle(MODELS))

    return ray_serve.deployment(
        ray_serve.ingress(build)(),
        name=INGRESS,
        num_replicas=settings.scaling.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
