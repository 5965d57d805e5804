"""The model replicas behind a Serve handle: Ray's errors become ours, without tracebacks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from medfl_ray.data.volume import Volume
from medfl_ray.errors import InferenceError, MedflError
from medfl_ray.export.description import PackageDescription
from serve.backend import ReplicaLost
from serve.refusals import TimedOut, Unavailable
from serve.replicas.model_loader import ModelKey
from serve.replicas.replica import OneShotVolume, SegmentAnswer, TensorAnswer

LOAD_TIMEOUT_S = 120.0
T = TypeVar("T")
log = structlog.get_logger("medfl_ray.serve")


class RayReplicas:
    """Sends each request to a replica that has its version in memory, if there is one."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        """Take the handle of the model deployment."""
        self._handle = handle

    async def describe(self, key: ModelKey) -> PackageDescription:
        """Load a version."""
        try:
            return await asyncio.wait_for(self._call(self._for(key).describe.remote(key.text)), LOAD_TIMEOUT_S)
        except TimeoutError:
            raise TimedOut(f"no replica had the model loaded within {LOAD_TIMEOUT_S:g} s") from None

    async def infer(self, key: ModelKey, tensor: npt.NDArray[np.float32]) -> TensorAnswer:
        """Run preprocessed images."""
        return await self._call(self._for(key).infer.remote(key.text, tensor))

    async def segment(self, key: ModelKey, volume: Volume) -> AsyncIterator[float | SegmentAnswer]:
        """Segment a volume."""
        with _our_errors():
            async for word in self._for(key, stream=True).segment.remote(key.text, OneShotVolume(volume)):
                yield word

    def _for(self, key: ModelKey, stream: bool = False) -> Any:
        return self._handle.options(multiplexed_model_id=key.text, stream=stream)

    async def _call(self, response: Awaitable[T]) -> T:
        with _our_errors():
            return await response


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except BackPressureError:
        raise Unavailable("too many requests are waiting; send this one again later") from None
    except RequestCancelledError:
        raise Unavailable("the request was cancelled inside the service; send it again") from None
    except OutOfMemoryError:
        raise _out_of_memory() from None
    except RayTaskError as error:  # before RayActorError: an error of the replica's own work has both in its family
        raise _cause_of(error) from None
    except RayActorError:
        raise ReplicaLost("the replica's process ended") from None
    except DeploymentUnavailableError:
        raise Unavailable("the model deployment is not there; look at `serve status`") from None
    except RayError as error:
        log.error("ray_failed", error=type(error).__name__)
        raise ReplicaLost("Ray lost the replica's answer") from None


def _cause_of(error: RayTaskError) -> MedflError:
    """Return our own error as the replica raised it, without the traceback that Ray adds to its text."""
    cause = error.cause
    if isinstance(cause, MedflError):
        return cause
    if isinstance(cause, OutOfMemoryError):
        return _out_of_memory()
    if isinstance(cause, RayActorError):
        return ReplicaLost("the replica's process ended")
    log.error("replica_failed", error=type(cause).__name__)
    return InferenceError("the model replica failed on this request; its log has the reason")


def _out_of_memory() -> Unavailable:
    """Not `ReplicaLost`: sent again, the same request would take the memory of the next replica."""
    log.error("replica_out_of_memory")
    return Unavailable(
        "the model replica ran out of memory, and the request is not sent again; send a smaller image, or have the "
        "operator lower limits.max_voxels"
    )
