from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from medfl_ray.config.data import DataConfig
from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.prepare.cache import PreparedCases
from medfl_ray.data.prepare.dataset import HospitalCases, HospitalData, PatchSampling
from medfl_ray.data.prepare.patches import draw_patch, foreground_voxels
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.sources import open_hospital_data


def case(patient="p", shape=(20, 20, 20), value=0.0, label=None):
    image = np.full((1, *shape), value, np.float32)
    target = np.zeros(shape, np.uint8) if label is None else label
    return PreparedCase(patient, f"{patient}-case", image, target, np.eye(4), (1.0,) * len(shape))


def data_of(patients, patch=(8, 8, 8), foreground=0.5, augment=False):
    hospital = HospitalCases("h", "private", ("a",), {1: "x"}, Preprocessing(), patients, (lambda: case(),))
    return HospitalData([hospital], PatchSampling(patch, foreground, augment), DataConfig(directory="x"))


def test_the_same_generator_gives_the_same_bits(decathlon, make_run):
    run = make_run(
        {"directory": str(decathlon()), "declared": "public"}, training={"patch_size_voxels": 8}, federation={"seed": 3}
    )
    first, second = (open_hospital_data(run, ("hospital-1",)) for _ in range(2))
    for data in (first, second):
        data.decode(2 if data is first else 0)
    a, b = (data.train_patches(1, 4, np.random.default_rng(5)) for data in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert (a[0].dtype, a[1].dtype, a[0].shape, a[1].shape) == (
        torch.float32,
        torch.int64,
        (4, 1, 8, 8, 8),
        (4, 8, 8, 8),
    )
    other = first.train_patches(1, 4, np.random.default_rng(6))
    assert not torch.equal(a[0], other[0])


def test_patches_come_from_all_cases_of_one_patient_and_no_other():
    patients = (
        (lambda: case("a", value=1), lambda: case("a", value=2)),
        (lambda: case("b", value=3),),
    )
    data = data_of(patients)
    images, _ = data.train_patches(0, 40, np.random.default_rng(0))
    assert set(images.unique().tolist()) == {1.0, 2.0}
    assert data.num_train_patients == 2


def test_foreground_fraction_centres_on_labels():
    label = np.zeros((30, 30, 30), np.uint8)
    label[3, 3, 3], label[20:25, 20:25, 20:25] = 1, 2
    rng, prepared = np.random.default_rng(0), case(shape=label.shape, label=label)
    voxels = foreground_voxels(label)
    targets = [draw_patch(prepared, voxels, (6, 6, 6), 1.0, rng)[1] for _ in range(200)]
    assert all(target.any() for target in targets)
    assert 60 < sum(bool((target == 1).any()) for target in targets) < 140  # classes are drawn evenly, rare or not


def test_small_volumes_are_padded_with_zeros_all_round():
    image, target = draw_patch(
        case(shape=(4, 9, 6), value=1, label=np.ones((4, 9, 6), np.uint8)), (), (8, 8, 8), 0.0, np.random.default_rng(0)
    )
    assert image.shape == (1, 8, 8, 8)
    assert image.sum() == target.sum() == 4 * 8 * 6
    assert image[0, 2:6, :, 1:7].all()


def test_augmentation_mirrors_image_and_label_together_and_left_right_only():
    label = np.zeros((8, 8, 8), np.uint8)
    label[:2, :3] = 1
    prepared = PreparedCase("p", "c", label[None].astype(np.float32), label, np.eye(4), (1.0,) * 3)
    data = data_of(((lambda: prepared,),), augment=True)
    images, targets = data.train_patches(0, 30, np.random.default_rng(1))
    assert {tuple(t.nonzero()[:, 0].unique().tolist()) for t in targets} == {(0, 1), (6, 7)}
    assert {tuple(t.nonzero()[:, 1].unique().tolist()) for t in targets} == {(0, 1, 2)}
    for image, target in zip(images, targets, strict=True):
        assert image[0][target == 1].mean() > image[0][target == 0].mean() + 0.5


def test_classification_targets_are_one_class_per_patch():
    picture = PreparedCase("p", "c", np.zeros((1, 10, 10), np.float32), 1, np.eye(4), (1.0, 1.0))
    images, targets = data_of(((lambda: picture,),), patch=(8, 8)).train_patches(0, 3, np.random.default_rng(0))
    assert images.shape == (3, 1, 8, 8)
    assert targets.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("cache", "decodes"), [("memory", 1), ("disk", 1), ("none", 3)])
def test_a_case_is_decoded_once(cache, decodes):
    calls = []

    def load():
        calls.append(threading.get_ident())
        return case(value=4)

    cases = PreparedCases([load], cache)
    for _ in range(3):
        assert cases[0].image[0, 0, 0, 0] == 4
    assert len(calls) == decodes


def test_threads_decode_each_case_once():
    calls = []
    cases = PreparedCases([lambda i=i: (calls.append(i), case(value=i))[1] for i in range(20)])
    cases.decode_all(4)
    assert sorted(calls) == list(range(20))
    assert [c.image[0, 0, 0, 0] for c in cases] == list(range(20))


def test_disk_cache_holds_no_identifier_and_is_removed():
    cases = PreparedCases([lambda: case("Mrs-Secret")], "disk")
    assert isinstance(cases[0].image, np.memmap)
    folder = cases._folder
    files = sorted(path.name for path in folder.iterdir())
    assert files == [".lock", "0.image.npy", "0.label.npy"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    assert all(b"Secret" not in path.read_bytes() for path in folder.iterdir())
    assert folder.stat().st_mode & 0o077 == 0
    del cases
    assert not folder.exists()


def test_reprs_show_no_patient():
    assert "secret" not in repr(case("secret"))
