"""One version per request, bounded time, and work that is sent again when its replica is lost."""

import asyncio

import numpy as np
import pytest
import structlog
from ray.exceptions import OutOfMemoryError, RayTaskError
from tiny_models import noise_volume, promote

from medfl_ray.export.description import read_description
from serve.backend import ATTEMPTS, Backend, ReplicaLost
from serve.refusals import NotServed, TimedOut, Unavailable
from serve.replicas.model_loader import Catalogue, ModelKey
from serve.replicas.ray_replicas import RayReplicas
from serve.replicas.replica import TensorAnswer, WorkReport
from serve.replicas.sources import FolderSource
from serve.serving_metrics import ServingMetrics

TENSOR = np.zeros((1, 1, 8, 8, 8), dtype=np.float32)


class UnsteadyReplicas:
    """Replicas that are lost some times, or never answer, or refuse a version."""

    def __init__(self, models, losses=0, hangs=False, broken=()):
        self.models, self.losses, self.hangs, self.broken = models, losses, hangs, broken
        self.asked = []

    async def describe(self, key):
        if key.version in self.broken:
            raise Unavailable("broken")
        return read_description(self.models / key.name / key.version)

    async def infer(self, key, tensor):
        self.asked.append(key)
        if self.hangs:
            await asyncio.sleep(60)
        if len(self.asked) <= self.losses:
            raise ReplicaLost("gone")
        return TensorAnswer(key, tensor, WorkReport(0.1, (1,)))

    async def segment(self, key, volume):
        self.asked.append(key)
        yield 0.5


def backend_of(replicas, models, timeout_s=5.0):
    metrics = ServingMetrics(0.5, 0.1, ray_too=False)
    catalogue = Catalogue(FolderSource(models), replicas.describe, on_change=metrics.served)
    return Backend(replicas, catalogue, metrics, timeout_s), metrics


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("serve.backend.RETRY_WAIT_S", 0.0)


def test_lost_work_is_sent_again_to_the_same_version(models, no_waiting):
    replicas = UnsteadyReplicas(models, losses=1)
    backend, metrics = backend_of(replicas, models)
    answer = asyncio.run(backend.infer(ModelKey("tiny", "2"), TENSOR))
    assert answer.key == ModelKey("tiny", "2")
    assert replicas.asked == [ModelKey("tiny", "2")] * 2
    assert b'medfl_serve_retries_total{model="tiny"} 1.0' in metrics.page()


def test_work_that_is_lost_again_and_again_is_given_up_with_a_sentence(models, no_waiting):
    replicas = UnsteadyReplicas(models, losses=99)
    backend, _ = backend_of(replicas, models)
    with pytest.raises(Unavailable, match="were lost"):
        asyncio.run(backend.infer(ModelKey("tiny", "1"), TENSOR))
    assert len(replicas.asked) == ATTEMPTS == 2


def test_a_replica_that_ends_without_an_answer_counts_as_lost(models, no_waiting):
    async def work():
        replicas = UnsteadyReplicas(models)
        backend, _ = backend_of(replicas, models)
        await backend.catalogue.refresh()
        told = []
        with pytest.raises(Unavailable):
            await backend.segment("tiny", None, noise_volume(), told.append)
        assert told == [0.5] * ATTEMPTS

    asyncio.run(work())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_request_that_took_all_memory_is_not_sent_to_another_replica(models, no_waiting, wrapped):
    killed = OutOfMemoryError("the node was low on memory")
    error = RayTaskError("infer", "a traceback", killed) if wrapped else killed

    class Handle:
        asked = 0

        def options(self, **_):
            return self

        @property
        def infer(self):
            return self

        async def remote(self, *_):
            self.asked += 1
            raise error

    handle = Handle()
    backend, _ = backend_of(RayReplicas(handle), models)
    with pytest.raises(Unavailable, match="ran out of memory") as raised:
        asyncio.run(backend.infer(ModelKey("tiny", "1"), TENSOR))
    assert "traceback" not in str(raised.value)
    assert handle.asked == 1


def test_a_replica_that_hangs_is_not_waited_for(models):
    backend, _ = backend_of(UnsteadyReplicas(models, hangs=True), models, timeout_s=0.05)
    with pytest.raises(TimedOut, match=r"within 0\.05 s"):
        asyncio.run(backend.infer(ModelKey("tiny", "1"), TENSOR))


def test_versions_are_looked_up_by_name_and_number(models):
    async def work():
        backend, _ = backend_of(UnsteadyReplicas(models), models)
        catalogue = backend.catalogue
        assert not catalogue.ready
        with pytest.raises(NotServed):
            catalogue.resolve("tiny")
        await catalogue.refresh()
        assert catalogue.ready
        assert catalogue.resolve("tiny") == ModelKey("tiny", "1")
        assert catalogue.resolve("tiny", "2") == ModelKey("tiny", "2")
        for name, version in (("tiny", "3"), ("other", None)):
            with pytest.raises(NotServed):
                catalogue.resolve(name, version)

    asyncio.run(work())


def test_a_promoted_version_that_cannot_be_loaded_does_not_take_over(models):
    async def work():
        replicas = UnsteadyReplicas(models, broken=("2",))
        backend, metrics = backend_of(replicas, models)
        await backend.catalogue.refresh()
        promote(models, 2)
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                await backend.catalogue.refresh()
        assert [line["event"] for line in lines] == ["version_refused"]  # said once
        assert backend.catalogue.resolve("tiny") == ModelKey("tiny", "1")
        replicas.broken = ()
        await backend.catalogue.refresh()
        assert backend.catalogue.resolve("tiny") == ModelKey("tiny", "2")
        page = metrics.page()
        assert b'medfl_serve_served_version{model="tiny",version="1"} 0.0' in page
        assert b'medfl_serve_served_version{model="tiny",version="2"} 1.0' in page

    try:
        asyncio.run(work())
    finally:
        promote(models, 1)


def test_a_source_that_cannot_be_read_leaves_what_is_served(models, monkeypatch):
    async def work():
        backend, _ = backend_of(UnsteadyReplicas(models), models)
        await backend.catalogue.refresh()

        def fail(self):
            raise OSError("the disk is gone")

        monkeypatch.setattr(FolderSource, "offers", fail)
        await backend.catalogue.refresh()
        assert backend.catalogue.resolve("tiny") == ModelKey("tiny", "1")

    asyncio.run(work())


def test_a_model_without_a_promoted_version_is_served_by_number_only(models):
    async def work():
        backend, _ = backend_of(UnsteadyReplicas(models), models)
        (models / "tiny" / "champion").write_text("none")
        await backend.catalogue.refresh()
        assert not backend.catalogue.ready
        with pytest.raises(Unavailable, match="promote"):
            backend.catalogue.resolve("tiny")
        assert backend.catalogue.resolve("tiny", "1") == ModelKey("tiny", "1")

    try:
        asyncio.run(work())
    finally:
        promote(models, 1)
