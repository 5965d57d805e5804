"""A package's file is loaded only where it is the one that model.json names and holds all its weights."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest
import torch
from model_packages import model_package, write_package
from onnx import helper, numpy_helper

from medfl_ray.errors import ExportError, InferenceError
from medfl_ray.export.description import read_description
from medfl_ray.export.onnx_session import OnnxModel, refuse_external_data


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    return folder, write_package(folder, model_package())


@pytest.fixture
def package(exported, tmp_path):
    """A copy of a package that a test may damage."""
    for path in exported[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def exchange(package, content, **changes):
    """Put another file into a package, with model.json telling the truth about it."""
    (package / "model.onnx").write_bytes(content)
    description = read_description(package)
    variant = description.variants["float32"].model_copy(
        update={"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content), **changes}
    )
    new = description.model_copy(update={"variants": {"float32": variant}})
    (package / "model.json").write_text(new.model_dump_json())


def test_it_says_what_torch_says(exported):
    folder, network = exported
    model = OnnxModel.open(folder)
    windows = np.random.default_rng(0).normal(size=(3, 1, 16, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(windows)).numpy()
    found = model.run(windows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert model.provider == "CPUExecutionProvider"
    assert OnnxModel.open(folder, num_threads=2, providers=["CPUExecutionProvider"]).run(windows).shape == found.shape


def test_one_flipped_bit_is_refused(package):
    content = bytearray((package / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (package / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match="SHA-256"):
        OnnxModel.open(package)
    (package / "model.onnx").write_bytes(content + b"0")
    with pytest.raises(ExportError, match="SHA-256"):
        OnnxModel.open(package)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/hostname", "absent.onnx"])
def test_files_outside_the_package_are_refused(package, name):
    exchange(package, (package / "model.onnx").read_bytes(), file=name)
    with pytest.raises(ExportError, match="is not in the package"):
        OnnxModel.open(package)


def test_a_variant_that_does_not_exist(package):
    with pytest.raises(ExportError, match="no variant 'int8'; it has float32"):
        OnnxModel.open(package, "int8")


def test_what_is_no_model_is_refused(package):
    exchange(package, b"\xff" * 100)
    with pytest.raises(ExportError, match="not ONNX"):
        OnnxModel.open(package)
    exchange(package, b"")
    with pytest.raises(ExportError, match="cannot load"):
        OnnxModel.open(package)


def external(name="secret"):
    tensor = numpy_helper.from_array(np.zeros(4, dtype=np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return tensor


def in_initializer():
    return helper.make_graph([], "g", [], [], initializer=[external()])


def in_attribute():
    return helper.make_graph([helper.make_node("Constant", [], ["c"], value=external())], "g", [], [])


def in_inner_graph():
    branch = {"then_branch": in_initializer(), "else_branch": in_attribute()}
    return helper.make_graph([helper.make_node("If", ["x"], ["y"], **branch)], "g", [], [])


@pytest.mark.parametrize("graph", [in_initializer, in_attribute, in_inner_graph])
def test_weights_in_other_files_are_refused(package, graph):
    content = helper.make_model(graph()).SerializeToString()
    exchange(package, content)
    with pytest.raises(ExportError, match="weights in other files"):
        OnnxModel.open(package)


def test_weights_in_other_files_are_refused_in_functions():
    node = helper.make_node("Constant", [], ["c"], value=external())
    function = helper.make_function("own", "f", [], ["c"], [node], [helper.make_opsetid("", 18)])
    model = helper.make_model(helper.make_graph([], "g", [], []), functions=[function])
    with pytest.raises(ExportError, match="weights in other files"):
        refuse_external_data(model.SerializeToString())


def test_a_model_with_other_inputs_is_refused(package):
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    exchange(package, model.SerializeToString())
    with pytest.raises(ExportError, match="says 'image' and 'logits'"):
        OnnxModel.open(package)


def test_windows_of_another_shape_end_in_a_sentence(exported):
    with pytest.raises(InferenceError, match=r"stopped on windows of the shape \(1, 2, 16, 16, 16\)"):
        OnnxModel.open(exported[0]).run(np.zeros((1, 2, 16, 16, 16), dtype=np.float32))
