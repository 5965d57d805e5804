"""Exhausted memory: smaller passes, the same gradients, and one clear error where nothing smaller is left."""

import numpy as np
import pytest
import torch
from small_runs import small_run

from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ModelError
from medfl_ray.models.catalogue import build_network
from medfl_ray.training.gradients import patient_gradients
from medfl_ray.training.gradients.memory import is_out_of_memory
from medfl_ray.training.gradients.patient_gradients import InGroups, OneAtATime
from medfl_ray.training.losses import make_loss
from medfl_ray.training.trainer import LocalJob, Trainer

ERRORS = (
    lambda: torch.OutOfMemoryError("CUDA out of memory"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:113] err == 0. DefaultCPUAllocator: can't allocate memory"),
    lambda: MemoryError(),
)


def test_a_real_allocation_that_is_too_large_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("bad_alloc"))


def patients(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 1, 16, 16, generator=generator),
            torch.randint(0, 2, (2, 16, 16), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("make_error", ERRORS)
def test_groups_become_smaller_and_every_gradient_stays(monkeypatch, make_error):
    run = small_run(data={"spatial_dims": 2}, model={"type": "unet2d"})
    torch.manual_seed(0)
    network = build_network(run.model, 2, 1, 2, True, (16, 16)).eval()
    loss = make_loss(run.training.loss, "segmentation")
    expected = list(OneAtATime(network, loss)(iter(patients(7))))
    sizes, whole = [], patient_gradients.stack

    def stack(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise make_error()
        return whole(images)

    monkeypatch.setattr(patient_gradients, "stack", stack)
    engine = InGroups(network, loss, group_size=6)
    found = list(engine(iter(patients(7))))
    assert sizes == [6, 3, 2, 1, 2, 1, 1]
    assert len(found) == 7
    for (gradient, value), (other, other_value) in zip(expected, found, strict=True):
        assert value == pytest.approx(other_value, rel=1e-5)
        for part, other_part in zip(gradient, other, strict=True):
            assert torch.allclose(part, other_part, rtol=1e-4, atol=1e-6)
    sizes.clear()
    list(engine(iter(patients(4))))
    assert sizes == [2, 2]


def test_an_error_that_is_not_about_memory_is_raised(monkeypatch):
    run = small_run(data={"spatial_dims": 2}, model={"type": "unet2d"})
    network = build_network(run.model, 2, 1, 2, True, (16, 16))

    def stack(images):
        raise RuntimeError("another fault")

    monkeypatch.setattr(patient_gradients, "stack", stack)
    with pytest.raises(RuntimeError, match="another fault"):
        list(InGroups(network, make_loss(run.training.loss, "segmentation"), group_size=4)(iter(patients(4))))


def trainer_of(run):
    return Trainer(
        model=run.model,
        training=run.training,
        task="segmentation",
        spatial_dims=3,
        in_channels=4,
        out_channels=3,
        patch_size=run.patch_size,
        for_dp=False,
    )


def train(run, limit=None, norm_seen=None):
    trainer = trainer_of(run)
    data = open_hospital_data(run, (list_hospitals(run)[0].hospital,))
    sizes, whole = [], trainer._logits

    def logits(network, some):
        sizes.append(len(some))
        if limit is not None and len(some) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(network, some)

    trainer._logits = logits
    if norm_seen is not None:
        trainer._sees_the_batch = norm_seen
    weights = trainer.initial_weights(3)
    return trainer.train(weights, data, LocalJob(2, 0.05, None, (1, 2, 3))).delta, sizes


def channels(run):
    data = open_hospital_data(run, (list_hospitals(run)[0].hospital,))
    return len(data.channels), max(data.labels) + 1


def test_plain_training_goes_on_in_smaller_passes_with_the_same_result():
    run = small_run(training={"batch_size": 4, "optimizer": "sgd"})
    assert channels(run) == (4, 3)
    whole, sizes = train(run)
    assert sizes == [4, 4]
    parted, sizes = train(run, limit=1)
    assert sizes == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert np.linalg.norm(whole - parted) <= 1e-4 * np.linalg.norm(whole)


@pytest.mark.parametrize("limit", [0, 1])
def test_where_nothing_smaller_gives_the_same_result_it_says_what_to_change(limit):
    run = small_run(training={"batch_size": 2, "optimizer": "sgd"})
    with pytest.raises(ModelError, match=r"memory is exhausted.*patch_size_voxels"):
        train(run, limit=limit, norm_seen=limit == 1)
