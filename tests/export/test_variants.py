"""Variants in fewer bits: what is in the files, what they lose, and that a bad one is not kept."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from medfl_ray.data.phantoms.write_layout import phantom_set, write_phantoms
from medfl_ray.errors import ExportError
from medfl_ray.export.calibration import CalibrationFolder, OpenImages, open_images
from medfl_ray.export.description import read_description
from medfl_ray.export.onnx_check import check_onnx
from medfl_ray.export.onnx_export import export_onnx, network_of
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.variants import Judge, calibration_windows, int8_graphs, session_run, write_variant
from medfl_ray.params import flatten

SMALL = {"type": "unet3d", "features": [8, 32]}


@pytest.fixture(scope="module")
def package_dir(make_package, tmp_path_factory):
    """An untrained network in all variants."""
    package = make_package(SMALL, "segmentation", (16, 16, 16))
    torch.manual_seed(0)
    network = network_of(package)
    folder = tmp_path_factory.mktemp("package")
    export_onnx(package, flatten(network), folder, variants=("float16", "int8"))
    return folder


def test_files_are_what_the_description_says(package_dir):
    description = read_description(package_dir)
    assert set(description.variants) == {"float32", "float16", "int8"}
    for variant in description.variants.values():
        path = package_dir / variant.file
        check_onnx(path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == variant.sha256
    small, large = description.variants["int8"], description.variants["float32"]
    assert small.size_bytes < large.size_bytes
    for name in ("float16", "int8"):
        variant = description.variants[name]
        assert 0 <= variant.dice_loss < 0.05
        assert variant.truth_loss is None
        assert variant.speed > 0
        assert variant.images == "4 phantoms"


def test_weights_have_fewer_bits_and_images_do_not(package_dir):
    kinds = {}
    for name in ("float16", "int8"):
        model = onnx.load(package_dir / f"model.{name}.onnx")
        kinds[name] = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) >= 4}
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert kinds["float16"] == {TensorProto.FLOAT16}
    assert TensorProto.INT8 in kinds["int8"]


def test_int8_convolutions_are_by_slices(package_dir):
    model = onnx.load(package_dir / "model.int8.onnx")
    quantised = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    assert quantised
    assert all(len(tensor.dims) in (1, 4) for tensor in quantised.values())


def test_variants_take_any_batch_and_size(package_dir):
    rng = np.random.default_rng(1)
    windows = rng.normal(size=(3, 2, 16, 24, 32)).astype(np.float32)
    exact = OnnxModel.open(package_dir).run(windows)
    for name, most in (("float16", 0.02), ("int8", 0.3)):
        found = OnnxModel.open(package_dir, name).run(windows)
        assert found.shape == exact.shape
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() < most * np.abs(exact).max()


def test_a_variant_that_loses_too_much_is_not_kept(package_dir, tmp_path):
    """Calibrated on black images, every range is too small for a real one."""
    description = read_description(package_dir)
    (tmp_path / "model.onnx").write_bytes((package_dir / "model.onnx").read_bytes())
    rng = np.random.default_rng(0)
    black, real = np.full((2, 16, 16, 16), 1e-3, np.float32), rng.normal(size=(2, 16, 16, 16)).astype(np.float32)
    images = OpenImages((black,), (real,), (), "dots")
    with pytest.raises(ExportError, match=r"int8 variant loses 0\.\d+ Dice .* on dots"):
        write_variant("int8", tmp_path, onnx.load(package_dir / "model.onnx"), description, images)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_first_and_last_layers_are_left_out_one_after_the_other(package_dir):
    description = read_description(package_dir)
    images = OpenImages((np.ones((2, 16, 16, 16), np.float32),), (), (), "ones")
    counts = [
        sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)
        for graph in int8_graphs(onnx.load(package_dir / "model.onnx"), description, images)
    ]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3


def test_calibration_windows_are_spread_over_the_image(package_dir):
    description = read_description(package_dir)
    image = np.zeros((2, 40, 16, 16), np.float32)
    image[:] = np.arange(40)[None, :, None, None]
    firsts = [int(window[0, 0, 0, 0, 0]) for window in calibration_windows([image], description)]
    assert firsts == [0, 12, 24]
    assert len(list(calibration_windows([np.zeros((2, 100, 64, 64), np.float32)], description))) == 4


def test_private_images_are_not_calibrated_on(make_package):
    class Private:
        declared = "private"

    package = make_package(SMALL, "segmentation", (16, 16, 16))
    with pytest.raises(ExportError, match="--calibration"):
        open_images(package, Private(), None)


@pytest.mark.parametrize(("patients", "calibrated", "measured"), [(4, 2, 2), (1, 1, 1)])
def test_images_of_a_folder(make_package, tmp_path, patients, calibrated, measured):
    """Half of the patients calibrate, the others measure; a single one does both."""
    phantoms = phantom_set("brain_tumour_t1c_flair", num_hospitals=1, num_patients=patients, size_voxels=16, seed=3)
    assert len(list(write_phantoms(tmp_path / "Mrs-Gray", phantoms))) == patients
    labels = {value: name for value, name in phantoms.preset.labels.items() if value > 0}
    package = make_package(SMALL, "segmentation", (16, 16, 16))
    prepared = package.preprocessing.model_copy(update={"label_values": tuple(labels)})
    package = replace(package, labels=labels, preprocessing=prepared)
    images = open_images(package, None, CalibrationFolder(tmp_path / "Mrs-Gray", "synthetic"))
    assert (len(images.calibration), len(images.measured), len(images.truths)) == (calibrated, measured, measured)
    assert images.origin == f"{measured} synthetic images of a folder"
    assert images.truths[0].shape == images.measured[0].shape[1:]
    assert np.array_equal(images.calibration[0], images.measured[0]) is (patients == 1)


def test_true_labels_decide_where_they_are_known(package_dir):
    """Against labels that are the float32 model's own, both losses are one."""
    description = read_description(package_dir)
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 16)).astype(np.float32)
    run = session_run(package_dir / "model.onnx", description)
    own = run(image[None])[0].argmax(axis=0).astype(np.uint8)
    judge = Judge(package_dir / "model.onnx", description, OpenImages((), (image,), (own,), "one image"))
    same = judge.measure(onnx.load(package_dir / "model.onnx"))
    assert (same.loss, same.truth_loss, same.cost) == (0.0, 0.0, 0.0)
    coarse = judge.measure(onnx.load(package_dir / "model.int8.onnx"))
    assert coarse.truth_loss == pytest.approx(coarse.loss)
    assert coarse.cost == coarse.truth_loss > 0
