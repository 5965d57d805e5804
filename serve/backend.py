"""What the routes ask: models and their answers. Fixes the version, bounds the time, sends again what was lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import structlog

from medfl_ray.data.volume import Volume
from medfl_ray.errors import MedflError
from medfl_ray.export.description import PackageDescription
from medfl_ray.export.predictor import Segmentation
from serve.refusals import TimedOut, Unavailable
from serve.replicas.model_loader import Catalogue, ModelKey
from serve.replicas.replica import OneShotVolume, SegmentAnswer, TensorAnswer, WorkReport
from serve.serving_metrics import ServingMetrics

ATTEMPTS = 2
RETRY_WAIT_S = 0.5
Progress = Callable[[float], None]
T = TypeVar("T")
log = structlog.get_logger("medfl_ray.serve")


class ReplicaLost(MedflError):
    """The process that worked on a request ended; the work has no side effects and may be sent again."""


class Replicas(Protocol):
    """The model replicas, here or in other processes; each call goes to one that has the version, if one has."""

    async def describe(self, key: ModelKey) -> PackageDescription: ...

    async def infer(self, key: ModelKey, tensor: npt.NDArray[np.float32]) -> TensorAnswer: ...

    def segment(self, key: ModelKey, volume: Volume) -> AsyncIterator[float | SegmentAnswer]: ...


@dataclass(frozen=True)
class ModelSummary:
    """One model as lists of models show it."""

    name: str
    version: str
    versions: tuple[str, ...]
    description: PackageDescription


class Backend:
    """Answers requests about models. Each gets one version, when it comes in, and keeps it until its answer."""

    def __init__(self, replicas: Replicas, catalogue: Catalogue, metrics: ServingMetrics, timeout_s: float) -> None:
        """Take the replicas, the catalogue that follows their source, and the longest time of one request."""
        self._replicas, self.catalogue, self._metrics, self._timeout_s = replicas, catalogue, metrics, timeout_s

    async def models(self) -> list[ModelSummary]:
        """Return every model that has a served version."""
        return [await self.summary(name) for name in self.catalogue.names()]

    async def summary(self, model: str, version: str | None = None) -> ModelSummary:
        """Return what is known of one model.

        Raises:
          NotServed, Unavailable: see `Catalogue.resolve`.
        """
        key = self.catalogue.resolve(model, version)
        description = await self._in_time(self._sent_again(key, lambda: self.catalogue.description(key)))
        return ModelSummary(key.name, key.version, self.catalogue.versions(model), description)

    async def infer(self, key: ModelKey, tensor: npt.NDArray[np.float32]) -> TensorAnswer:
        """Return the logits of preprocessed images [N, C, *S].

        Raises:
          TimedOut, Unavailable: no replica answered.
        """
        return await self._counted(key, lambda: self._replicas.infer(key, tensor), lambda answer: answer.report)

    async def segment(
        self, model: str, version: str | None, volume: Volume, progress: Progress | None = None
    ) -> Segmentation:
        """Return the mask of a volume; it names the one version that made it.

        Args:
          progress: called with the fraction that is done; it starts again where a replica was lost.

        Raises:
          NotServed, TimedOut, Unavailable: the version does not exist, or no replica answered.
        """
        key = self.catalogue.resolve(model, version)

        async def work() -> SegmentAnswer:
            async for word in self._replicas.segment(key, volume):
                if isinstance(word, SegmentAnswer):
                    return word
                if progress is not None:
                    progress(word)
            raise ReplicaLost("the replica ended without an answer")

        answer = await self._counted(key, work, lambda answer: answer.report)
        return answer.segmentation

    async def _counted(
        self, key: ModelKey, work: Callable[[], Awaitable[T]], report_of: Callable[[T], WorkReport]
    ) -> T:
        started = time.perf_counter()
        answer = await self._in_time(self._sent_again(key, work))
        if self._metrics.worked(key, report_of(answer), time.perf_counter() - started):
            log.warning("input_drift", model=key.name, version=key.version)
        return answer

    async def _sent_again(self, key: ModelKey, work: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return await work()
            except ReplicaLost:
                log.warning("replica_lost", model=key.name, version=key.version, attempt=attempt + 1)
                if attempt + 1 < ATTEMPTS:
                    self._metrics.retried(key)
                    await asyncio.sleep(RETRY_WAIT_S * 2**attempt)
        raise Unavailable(f"{ATTEMPTS} replicas were lost while they worked on this request; send it again later")

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, self._timeout_s)
        except TimeoutError:
            raise TimedOut(
                f"the model did not answer within {self._timeout_s:g} s, waiting included; send the request later"
            ) from None


class LocalReplicas:
    """One replica in this process, for tests and for use without Serve."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    async def describe(self, key: ModelKey) -> PackageDescription:
        """Load a version."""
        description: PackageDescription = await self._replica.describe(key.text)
        return description

    async def infer(self, key: ModelKey, tensor: npt.NDArray[np.float32]) -> TensorAnswer:
        """Run preprocessed images."""
        answer: TensorAnswer = await self._replica.infer(key.text, tensor)
        return answer

    async def segment(self, key: ModelKey, volume: Volume) -> AsyncIterator[float | SegmentAnswer]:
        """Segment a volume."""
        async for word in self._replica.segment(key.text, OneShotVolume(volume)):
            yield word
