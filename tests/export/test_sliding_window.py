"""Windows and blending say what MONAI's sliding-window inference says, to the last bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.utils import sliding_window_inference

from medfl_ray.data.prepare.windows import SlidingWindow
from medfl_ray.errors import InferenceError
from medfl_ray.export.sliding_window import Blender, LabelImage, batches, plan_windows, window_weights


def blend(image, window, how, run, order=None, at_once=1, normalise=True):
    plan = plan_windows(image.shape[1:], window, how.overlap)
    found = {}

    def receive(first, planes):
        for index in range(planes.shape[1]):
            assert first + index not in found
            found[first + index] = planes[:, index].copy()

    blender = Blender(plan, how, receive, normalise)
    results = {}
    for numbers in batches(len(plan), at_once):
        results.update(zip(numbers, run(plan.cut(image, numbers)), strict=True))
    for number in order(len(plan)) if order else range(len(plan)):
        blender.add(number, results[number].copy())
    return np.stack([found[index] for index in range(image.shape[1])], axis=1)


def two_channels(windows):
    """A stand-in for a network whose output depends on where a voxel lies in its window."""
    slope = np.linspace(0.5, 1.5, windows.shape[-1], dtype=np.float32)
    return np.concatenate([windows * slope, windows[:, :, ::-1] ** 2], axis=1)


def of_monai(image, window, how, run):
    def network(batch):
        return torch.from_numpy(np.ascontiguousarray(run(batch.numpy())))

    logits = sliding_window_inference(
        torch.from_numpy(image)[None], window, 3, network, overlap=how.overlap, mode=how.mode,
        sigma_scale=how.sigma_scale, padding_mode=how.padding,
    )  # fmt: skip
    return logits[0].numpy()


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    window=st.lists(st.integers(2, 9), min_size=3, max_size=3),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7]),
    mode=st.sampled_from(["gaussian", "constant"]),
    sigma_scale=st.sampled_from([0.05, 0.125, 0.4]),
)
def test_blended_logits_are_monais(shape, window, overlap, mode, sigma_scale):
    how = SlidingWindow(overlap=overlap, mode=mode, sigma_scale=sigma_scale)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    window = tuple(window[: len(shape)])
    ours = blend(image, window, how, two_channels)
    np.testing.assert_allclose(ours, of_monai(image, window, how, two_channels), rtol=2e-6, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 300), min_size=3, max_size=3),
    window=st.integers(1, 96),
    overlap=st.floats(0, 0.99),
)
def test_scan_positions_are_monais(shape, window, overlap):
    padded = [max(n, window) for n in shape]
    interval = [window if window == n else max(1, int(window * (1 - overlap))) for n in padded]
    if np.prod([np.ceil(n / i) for n, i in zip(padded, interval, strict=True)]) > 2_000:
        return
    plan = plan_windows(shape, (window,) * 3, overlap)
    slices = dense_patch_slices(plan.padded_shape, (window,) * 3, interval)
    assert plan.starts == tuple(tuple(s.start for s in place) for place in slices)


@pytest.mark.parametrize("window", [(16,), (7, 12), (8, 5, 9), (96, 96, 96)])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_weights_are_monais(window, mode):
    theirs = compute_importance_map(window, mode=mode, sigma_scale=0.125).numpy()
    ours = window_weights(window, SlidingWindow(mode=mode))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert ours.dtype == np.float32


def test_weights_by_hand():
    # The voxels lie 1.5 and 0.5 from the middle; sigma is 4 / 8.
    weights = window_weights((4,), SlidingWindow())
    assert weights.tolist() == pytest.approx([np.exp(-4.5), np.exp(-0.5), np.exp(-0.5), np.exp(-4.5)])
    assert window_weights((9, 9), SlidingWindow()).min() == np.float32(1e-3)


def test_the_order_of_arrival_does_not_change_a_bit():
    image = np.random.default_rng(1).normal(size=(1, 20, 13, 17)).astype(np.float32)
    expected = blend(image, (8, 8, 8), SlidingWindow(), two_channels)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation
        found = blend(image, (8, 8, 8), SlidingWindow(), two_channels, order=order, at_once=1 + seed)
        assert np.array_equal(found, expected)


def test_labels_need_no_division():
    image = np.random.default_rng(2).normal(size=(1, 21, 9, 14)).astype(np.float32)
    plan = plan_windows(image.shape[1:], (8, 8, 8), 0.25)
    labels = LabelImage(plan.image_shape)
    blender = Blender(plan, SlidingWindow(), labels.receive, normalise=False)
    for number in range(len(plan)):
        blender.add(number, two_channels(plan.cut(image, [number]))[0])
    expected = of_monai(image, (8, 8, 8), SlidingWindow(), two_channels).argmax(axis=0)
    assert np.array_equal(labels.classes, expected)


def test_the_first_of_equal_classes_wins_and_what_is_not_finite_is_refused():
    labels = LabelImage((1, 3))
    labels.receive(0, np.array([[[1, 2, 0]], [[1, 3, 0]], [[0, 3, 9]]], dtype=np.float32))
    assert labels.classes.tolist() == [[0, 1, 2]]
    for bad in (np.nan, np.inf):
        with pytest.raises(InferenceError, match="not finite"):
            labels.receive(0, np.array([[[1, 2, 0]], [[1, bad, 0]]], dtype=np.float32))
    with pytest.raises(InferenceError, match="300 classes"):
        labels.receive(0, np.zeros((300, 1, 3), dtype=np.float32))


def test_windows_that_do_not_fit_are_refused():
    plan = plan_windows((8, 8), (4, 4), 0.25)
    blender = Blender(plan, SlidingWindow(), lambda first, planes: None, normalise=False)
    with pytest.raises(InferenceError, match=r"size \(2, 2\) for a window of \(4, 4\)"):
        blender.add(0, np.zeros((2, 2, 2), dtype=np.float32))
    blender.add(0, np.zeros((2, 4, 4), dtype=np.float32))
    for number in (0, len(plan), -1):
        with pytest.raises(InferenceError, match="twice or does not exist"):
            blender.add(number, np.zeros((2, 4, 4), dtype=np.float32))
