"""The model replica as a plain object: windows, batches, answers and what they report."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import noise_volume, promote, write_model

from medfl_ray.data.volume import Volume
from medfl_ray.errors import ExportError, GeometryError, InferenceError
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.predictor import Predictor
from serve.refusals import NotServed
from serve.replicas.model_loader import ModelKey
from serve.replicas.replica import ModelReplica, OneShotVolume, SegmentAnswer, WindowBatch, own_answer
from serve.replicas.sources import FolderSource
from serve.settings import ServeSettings


@pytest.fixture
def replica(models):
    return ModelReplica(lambda: FolderSource(models), ServeSettings(voxels_per_batch=4 * 8**3))


async def segment(replica, key, volume):
    words = [word async for word in replica.segment(key, OneShotVolume(volume))]
    *progress, answer = words
    assert isinstance(answer, SegmentAnswer)
    return progress, answer


def test_a_mask_is_that_of_the_predictor(models, replica):
    volume = noise_volume((21, 18, 25))
    progress, answer = asyncio.run(segment(replica, "tiny@2", volume))
    expected = Predictor(OnnxModel.open(models / "tiny" / "2"), "2").segment(volume)
    assert np.array_equal(answer.segmentation.mask, expected.mask)
    assert set(np.unique(answer.segmentation.mask)) == {20}
    assert (answer.key, answer.segmentation.version) == (ModelKey("tiny", "2"), "2")
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == (0.0, 1.0)


def test_a_small_volume_that_would_be_large_at_the_models_spacing_is_refused(tmp_path):
    write_model(tmp_path / "tiny", mark=1, spacing_mm=(1.0, 1.0, 1.0))
    settings = ServeSettings.model_validate({"limits": {"max_voxels": 10**5}})
    replica = ModelReplica(lambda: FolderSource(tmp_path), settings)
    volume = noise_volume((8, 8, 8))
    thick = Volume(volume.array, np.diag([30.0, 30.0, 30.0, 1.0]))
    with pytest.raises(GeometryError, match="at most 100000 in all"):
        asyncio.run(segment(replica, "tiny@1", thick))


def test_it_reports_batches_and_the_shift_of_intensities(replica):
    _, answer = asyncio.run(segment(replica, "tiny@1", noise_volume((20, 20, 20), shift=2.0)))
    assert sum(answer.report.batch_windows) == 27  # 3 windows of 8 voxels per axis
    assert set(answer.report.batch_windows) == {4, 3}
    assert answer.report.shifts == pytest.approx((2.0,), abs=0.1)
    assert answer.report.busy_s > 0


def test_tensors_are_run_in_batches_and_come_back_in_order(replica):
    tensor = np.zeros((11, 1, 8, 8, 8), dtype=np.float32)
    answer = asyncio.run(replica.infer("tiny@2", tensor))
    assert answer.logits.shape == (11, 4, 8, 8, 8)
    assert answer.report.batch_windows == (4, 4, 3)


def test_windows_of_several_requests_run_together_by_version_and_size(replica):
    async def work():
        one, two = await replica.load("tiny@1"), await replica.load("tiny@2")
        window = np.zeros((1, 1, 8, 8, 8), dtype=np.float32)
        other = np.zeros((2, 1, 4, 4, 4), dtype=np.float32)
        return await replica.run_together(
            [WindowBatch(one, window), WindowBatch(two, window), WindowBatch(one, window), WindowBatch(one, other)]
        )

    answers = asyncio.run(work())
    assert [int(logits.argmax(axis=1).max()) for logits, _ in answers] == [1, 2, 1, 1]
    assert [together for _, together in answers] == [2, 1, 2, 2]
    assert answers[3][0].shape == (2, 4, 4, 4, 4)


def test_a_request_that_fails_fails_alone(replica):
    """As where one request's windows do not fit into memory together with the others'."""

    async def work():
        loaded = await replica.load("tiny@1")
        run = loaded.predictor.model.run

        def fails_on_sevens(windows):
            if (windows == 7).any():
                raise InferenceError("no memory")
            return run(windows)

        model = SimpleNamespace(key=loaded.key, predictor=SimpleNamespace(model=SimpleNamespace(run=fails_on_sevens)))
        window = np.zeros((2, 1, 8, 8, 8), dtype=np.float32)
        return await replica.run_together([WindowBatch(model, w) for w in (window, window + 7, window[:1])])

    first, failed, last = asyncio.run(work())
    assert isinstance(failed, InferenceError)
    with pytest.raises(InferenceError):
        own_answer(failed)
    assert [len(logits) for logits, _ in (first, last)] == [2, 1]
    assert own_answer(first)[1] == 2


def test_what_cannot_be_loaded_says_so(models, replica):
    with pytest.raises(NotServed):
        asyncio.run(replica.load("tiny@7"))
    write_model(models / "broken" / "1", mark=1, name="broken")
    path = models / "broken" / "1" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    promote(models, 1, "broken")
    with pytest.raises(ExportError, match="SHA-256"):
        asyncio.run(replica.load("broken@1"))
    for name in ("champion", "1/model.onnx", "1/model.json"):
        (models / "broken" / name).unlink()


def test_a_volume_that_does_not_fit_is_refused(replica):
    volume = noise_volume()
    two_channels = type(volume)(np.concatenate([volume.array] * 2), volume.affine)
    with pytest.raises(GeometryError):
        asyncio.run(segment(replica, "tiny@1", two_channels))


def test_a_replica_whose_runtime_hangs_is_not_healthy(models):
    replica = ModelReplica(
        lambda: FolderSource(models), ServeSettings.model_validate({"limits": {"inference_timeout_s": 0.01}})
    )
    asyncio.run(replica.check_health())
    replica._running_since = 0.0
    with pytest.raises(Exception, match="has not come back"):
        asyncio.run(replica.check_health())
