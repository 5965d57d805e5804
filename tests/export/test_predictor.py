"""A volume becomes a mask on its own grid: the mask that MONAI's inferer and torch would give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_packages import model_package, write_package
from monai.inferers.utils import sliding_window_inference

from medfl_ray.data.volume import Volume
from medfl_ray.errors import GeometryError, InferenceError
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.predictor import Predictor, label_values
from medfl_ray.training.scoring.inference import WINDOW

OBLIQUE = np.array([[0.1, -1.4, 0.2, 10.0], [0.9, 0.1, 0.3, -20.0], [-0.2, 0.3, 2.4, 30.0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    return folder, write_package(folder, model_package(spacing_mm=(1.5, 1.5, 1.5)))


@pytest.fixture(scope="module")
def predictor(exported):
    return Predictor(OnnxModel.open(exported[0]), version="3")


def volume(shape=(29, 23, 17), affine=OBLIQUE, channels=1):
    values = np.random.default_rng(0).gamma(2.0, 100.0, size=(channels, *shape)).astype(np.float32)
    return Volume(values, np.asarray(affine, dtype=np.float64))


def test_the_mask_is_that_of_monai_and_torch(exported, predictor):
    image = volume()
    prepared = predictor.description.preprocessing.prepare(image)
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.from_numpy(prepared.image)[None], (16, 16, 16), 4, exported[1], overlap=WINDOW.overlap,
            mode=WINDOW.mode, padding_mode=WINDOW.padding,
        )  # fmt: skip
    classes = logits[0].argmax(0).numpy().astype(np.uint8)
    expected = predictor.description.preprocessing.restore(classes, prepared.affine, image)
    fractions = []
    result = predictor.segment(image, fractions.append)
    assert result.mask.shape == image.spatial_shape
    assert result.mask.dtype == np.uint8
    assert set(np.unique(expected)) <= {0, 10, 20}
    assert (result.mask == expected).mean() > 0.999
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert len(fractions) == len(predictor.start(image).plan) > 3
    assert (result.labels, result.model, result.version) == ({10: "anterior", 20: "posterior"}, "trial", "3")


def test_volumes_are_those_of_the_voxels(predictor):
    image = volume()
    result = predictor.segment(image)
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3])) / 1000
    for value, name in result.labels.items():
        assert result.volumes_ml[name] == pytest.approx((result.mask == value).sum() * voxel)
    assert sum(result.volumes_ml.values()) > 0


def test_windows_of_two_volumes_may_share_a_run(predictor):
    images = [volume(), volume((30, 12, 14), np.diag([1.5, -1.5, 2.0, 1]))]
    alone = [predictor.segment(image).mask for image in images]
    steps = [predictor.start(image) for image in images]
    queue = [(s, number) for s in steps for number in range(len(s.plan))]
    for start in range(len(queue), 0, -3):
        batch = queue[max(start - 3, 0) : start]
        logits = predictor.model.run(np.concatenate([s.windows([number]) for s, number in batch]))
        for (s, number), result in zip(batch, logits, strict=True):
            s.add(number, result)
    for s, expected in zip(steps, alone, strict=True):
        assert (s.finish().mask == expected).mean() > 0.9999


def test_a_mask_with_a_missing_window_is_not_given(predictor):
    steps = predictor.start(volume())
    steps.add(1, predictor.model.run(steps.windows([1]))[0])
    with pytest.raises(InferenceError, match=r"0 of \d+ windows"):
        steps.finish()


def test_progress_may_end_the_work(predictor):
    seen = []

    def progress(fraction):
        seen.append(fraction)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictor.segment(volume(), progress)
    assert len(seen) == 1


def test_other_channels_and_tasks_are_refused(predictor):
    with pytest.raises(GeometryError, match="2 channels; expected 1"):
        predictor.segment(volume(channels=2))
    with pytest.raises(InferenceError, match="is for segmentation, not for classification"):
        predictor.classify(volume())


def test_a_picture_and_a_slice_in_two_dimensions(tmp_path):
    write_package(tmp_path, model_package((16, 16), labels={1: "tumour"}, label_values=()))
    predictor = Predictor(OnnxModel.open(tmp_path))
    flat = predictor.segment(volume((37, 20), np.eye(4)))
    assert flat.mask.shape == (37, 20)
    assert (flat.volumes_ml, flat.labels) == ({}, {1: "tumour"})
    thin = predictor.segment(volume((37, 1, 20), np.diag([1.0, 5, 1, 1])))
    assert thin.mask.shape == (37, 1, 20)
    assert np.array_equal(thin.mask[:, 0], flat.mask)
    assert thin.volumes_ml["tumour"] == pytest.approx((flat.mask == 1).sum() * 5 / 1000)


@pytest.mark.ci
def test_probabilities_of_a_small_image_are_those_of_training(tmp_path):
    from medfl_ray.training.scoring.inference import classify

    network = write_package(tmp_path, model_package((32, 32), task="classification", labels={1: "tumour"}))
    predictor = Predictor(OnnxModel.open(tmp_path))
    image = volume((25, 40), np.eye(4))
    found = predictor.classify(image)
    prepared = predictor.description.preprocessing.prepare(image).image
    with torch.inference_mode():
        expected = classify(network, torch.from_numpy(prepared)[None], (32, 32))[0]
    assert list(found) == ["0", "tumour"]
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-5)
    with pytest.raises(InferenceError, match="is for classification"):
        predictor.segment(image)


def test_values_follow_the_training_labels(predictor):
    assert label_values(predictor.description) == {10: "anterior", 20: "posterior"}
