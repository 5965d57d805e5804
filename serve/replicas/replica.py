"""One process that runs models: a few versions in memory, one onnxruntime call at a time on all of its threads.

A plain class; serve/replicas/deployments.py makes it a Serve deployment and puts Serve's cache and batching in
place of `load` and `run_windows`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from medfl_ray.data.volume import Volume
from medfl_ray.errors import InferenceError
from medfl_ray.export.description import PackageDescription
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.predictor import Predictor, Segmentation, SegmentationSteps
from medfl_ray.export.sliding_window import batches
from serve.replicas.drift import shift_of
from serve.replicas.model_loader import ModelKey, ModelSource
from serve.settings import ServeSettings

Array = npt.NDArray[np.float32]
T = TypeVar("T")
Together = tuple[Array, int]  # logits, and how many windows ran together


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A version in memory; its users hold a reference, so that the cache may drop it at any time."""

    key: ModelKey
    predictor: Predictor

    @property
    def description(self) -> PackageDescription:
        """What the package says of itself."""
        return self.predictor.description


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """Windows [N, C, *P] of one request that wait for onnxruntime."""

    model: LoadedModel
    windows: Array

    @property
    def num_voxels(self) -> int:
        """Voxels of all windows, of one channel."""
        return math.prod((len(self.windows), *self.windows.shape[2:]))


class OneShotVolume:
    """A volume on its way to a replica, which takes it out, so that the caller does not keep it in memory."""

    def __init__(self, volume: Volume) -> None:
        """Pack a volume."""
        self._volume: Volume | None = volume

    def take(self) -> Volume:
        """Return the volume, once.

        Raises:
          InferenceError: it was taken before.
        """
        volume, self._volume = self._volume, None
        if volume is None:
            raise InferenceError("a volume was sent to a replica and taken twice; send the request again")
        return volume


@dataclass(frozen=True)
class WorkReport:
    """What a request took: seconds in the replica, windows in each onnxruntime call, shift of its intensities."""

    busy_s: float
    batch_windows: tuple[int, ...] = ()
    shifts: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class SegmentAnswer:
    """A mask, the version that made all of it, and what that took."""

    key: ModelKey
    segmentation: Segmentation
    report: WorkReport


@dataclass(frozen=True, eq=False)
class TensorAnswer:
    """Logits [N, L, *S], or [N, L] of a classifier, of one version."""

    key: ModelKey
    logits: Array = field(repr=False)
    report: WorkReport


class ModelReplica:
    """Runs any version of the source's models; a request names the version that it was given at the ingress."""

    def __init__(self, source: Callable[[], ModelSource], settings: ServeSettings) -> None:
        """Start without a model; the first request of a version loads it.

        Args:
          source: opens the models' source, in this process.
        """
        self._source, self._settings = source(), settings
        # One call at a time: it has all threads of the replica. The next volume is prepared meanwhile.
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        self._volumes = asyncio.Semaphore(settings.scaling.volumes_at_once)
        self._running_since: float | None = None

    async def load(self, model_id: str) -> LoadedModel:
        """Fetch, check and open a version.

        Raises:
          NotServed, ExportError: there is no such version, or its package is not what it says.
        """
        return await asyncio.to_thread(self._open, ModelKey.parse(model_id))

    async def run_windows(self, batch: WindowBatch) -> tuple[Array, int]:
        """Return the logits of windows, and how many windows ran together."""
        return own_answer((await self.run_together([batch]))[0])

    async def run_together(self, asked: list[WindowBatch]) -> list[Together | Exception]:
        """Run windows of several requests for one version in one onnxruntime call per shape of window.

        Where a call fails, each request of it is run again by itself, so that it fails by its own fault alone.
        """
        answers: dict[int, Together | Exception] = {}
        groups: dict[tuple[object, ...], list[int]] = {}
        for place, batch in enumerate(asked):
            groups.setdefault((batch.model.key, batch.windows.shape[1:]), []).append(place)
        for places in groups.values():
            answers |= zip(places, await self._run_group([asked[place] for place in places]), strict=True)
        return [answers[place] for place in range(len(asked))]

    async def _run_group(self, asked: list[WindowBatch]) -> list[Together | Exception]:
        try:
            return [*await self._run_joined(asked)]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer of one request and no more
            if len(asked) == 1:
                return [error]
        return [answer for batch in asked for answer in await self._run_group([batch])]

    async def _run_joined(self, asked: list[WindowBatch]) -> list[Together]:
        model, windows = asked[0].model.predictor.model, [batch.windows for batch in asked]
        joined = windows[0] if len(windows) == 1 else np.concatenate(windows)
        logits = await self._on_compute_thread(lambda: model.run(joined))
        ends = np.cumsum([len(part) for part in windows])
        return [(logits[end - len(part) : end], len(joined)) for part, end in zip(windows, ends, strict=True)]

    async def describe(self, model_id: str) -> PackageDescription:
        """Load a version, take an empty image through it, and return what its package says of itself.

        Otherwise the first image through a new process would wait for imports.
        """
        model = await self.load(model_id)
        description = model.description
        empty = np.zeros((description.num_channels, *description.patch_size), dtype=np.float32)
        if description.task == "segmentation":
            async for _ in self.segment(model_id, OneShotVolume(Volume(empty, np.eye(4)))):
                continue
        else:
            await self.run_windows(WindowBatch(model, empty[None]))
        return description

    async def infer(self, model_id: str, tensor: Array) -> TensorAnswer:
        """Return the logits of preprocessed images [N, C, *S]."""
        started = time.perf_counter()
        model = await self.load(model_id)
        size = self._windows_at_once(tensor.shape[2:])
        parts, sizes = [], []
        for first in range(0, len(tensor), size):
            logits, together = await self.run_windows(WindowBatch(model, tensor[first : first + size]))
            parts.append(logits)
            sizes.append(together)
        report = WorkReport(time.perf_counter() - started, tuple(sizes))
        return TensorAnswer(model.key, parts[0] if len(parts) == 1 else np.concatenate(parts), report)

    async def segment(self, model_id: str, parcel: OneShotVolume) -> AsyncIterator[float | SegmentAnswer]:
        """Yield the fraction that is done, again and again, and at the end the mask."""
        async with self._volumes:
            started = time.perf_counter()
            model = await self.load(model_id)
            yield 0.0
            steps, shifts = await asyncio.to_thread(_begun, model, parcel)
            sizes: list[int] = []
            told = 0.0
            async for together in self._blended(model, steps):
                sizes.append(together)
                if steps.fraction_done - told >= 0.05:  # each word costs a message between processes
                    told = steps.fraction_done
                    yield told
            yield steps.fraction_done
            segmentation = replace(await asyncio.to_thread(steps.finish), model=model.key.name)
            yield SegmentAnswer(
                model.key, segmentation, WorkReport(time.perf_counter() - started, tuple(sizes), shifts)
            )

    async def check_health(self) -> None:
        """Tell Serve to replace this replica if onnxruntime has not come back.

        Raises:
          InferenceError: one call has taken longer than a whole request may.
        """
        since = self._running_since
        if since is not None and time.monotonic() - since > self._settings.limits.inference_timeout_s:
            raise InferenceError("onnxruntime has not come back for longer than a request may take")

    async def _blended(self, model: LoadedModel, steps: SegmentationSteps) -> AsyncIterator[int]:
        """Run all windows; yield how many ran together.

        While one batch runs, the one before it is blended, and the one after it is cut and waits behind it.
        """
        parts = batches(len(steps.plan), self._windows_at_once(model.description.patch_size))
        sent: deque[asyncio.Future[Together]] = deque()

        def send(windows: Array) -> None:
            sent.append(asyncio.ensure_future(self.run_windows(WindowBatch(model, windows))))

        try:
            send(await asyncio.to_thread(steps.windows, parts[0]))
            ready: tuple[Sequence[int], Array] | None = None
            for numbers, following in itertools.zip_longest(parts, parts[1:], fillvalue=range(0)):
                windows = await asyncio.to_thread(_meanwhile, steps, ready, following)
                if following:
                    send(windows)
                logits, together = await sent[0]
                sent.popleft()
                ready = (numbers, logits)
                yield together
        finally:
            for batch in sent:  # of a request that is gone
                batch.cancel()
        await asyncio.to_thread(_meanwhile, steps, ready, range(0))

    def _windows_at_once(self, shape: Sequence[int]) -> int:
        return max(1, self._settings.voxels_per_batch // max(1, math.prod(shape)))

    def _open(self, key: ModelKey) -> LoadedModel:
        scaling = self._settings.scaling
        with TemporaryDirectory(prefix="medfl-model-") as folder:
            package = self._source.package(key, Path(folder) / "package")
            model = OnnxModel.open(package, self._settings.variant, num_threads=scaling.num_cpus)
        return LoadedModel(key, Predictor(model, key.version, max_voxels=self._settings.limits.max_voxels))

    async def _on_compute_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute, self._timed, work)

    def _timed(self, work: Callable[[], T]) -> T:
        self._running_since = time.monotonic()
        try:
            return work()
        finally:
            self._running_since = None


def own_answer(answer: Together | Exception) -> Together:
    """Return one request's part of a shared batch, or raise what it failed by."""
    if isinstance(answer, Exception):
        raise answer
    return answer


def _meanwhile(steps: SegmentationSteps, ready: tuple[Sequence[int], Array] | None, following: range) -> Array:
    """Blend the logits that are ready, and cut the windows that follow."""
    if ready is not None:
        for number, part in zip(*ready, strict=True):
            steps.add(number, part)
    return steps.windows(following)


def _begun(model: LoadedModel, parcel: OneShotVolume) -> tuple[SegmentationSteps, tuple[float, ...]]:
    """Prepare a volume and compare its intensities with the training's; nothing keeps its voxels as they came."""
    volume = parcel.take()
    fingerprint = model.description.fingerprint
    shifts = shift_of(volume, fingerprint) if fingerprint is not None else ()
    return model.predictor.start(volume), shifts
