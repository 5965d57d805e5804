"""ONNX files that a machine should not load: they ask for its files, for libraries, or for all its memory."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from medfl_ray.errors import ExportError
from medfl_ray.export.onnx_check import check_onnx


def model(nodes=None, initializers=(), shape=(1, 2, 8, 8), opsets=(("", 20),), **fields):
    nodes = nodes or [helper.make_node("Relu", ["x"], ["y"])]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [image], [result], list(initializers))
    imports = [helper.make_opsetid(*entry) for entry in opsets]
    return helper.make_model(graph, opset_imports=imports, **fields)


def outside(name="w"):
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def huge(*dims):
    return onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=list(dims))


def nested(tensor):
    """A tensor inside a branch inside a branch."""
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    branch = helper.make_node("If", ["x"], ["c2"], then_branch=inner, else_branch=inner)
    outer = helper.make_graph([branch], "outer", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=outer, else_branch=outer)


def constant(tensor):
    return helper.make_node("Constant", [], ["y"], value=tensor)


def function():
    node = helper.make_node("Relu", ["a"], ["b"])
    return helper.make_function("own", "f", ["a"], ["b"], [node], [helper.make_opsetid("", 20)])


HOSTILE = {
    "weights outside": (model(initializers=[outside()]), "other files"),
    "weights outside, in an attribute": (model([constant(outside())]), "other files"),
    "weights outside, two branches down": (model([nested(outside())]), "other files"),
    "a library's operator": (model([helper.make_node("Run", ["x"], ["y"], domain="evil")]), "'evil'"),
    "a library's operators announced": (model(opsets=(("", 20), ("com.evil", 1))), r"'com\.evil'"),
    "an absurd edge": (model(shape=(1, 2, 2**40, 8)), "claims a tensor"),
    "a negative edge": (model(initializers=[huge(-5)]), "claims a tensor"),
    "absurd in product": (model(initializers=[huge(100_000, 100_000, 10)]), "claims a tensor"),
    "absurd, two branches down": (model([nested(huge(2**40))]), "claims a tensor"),
    "functions": (model(functions=[function()]), "functions of its own"),
    "nothing": (onnx.ModelProto(), "no graph"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(tmp_path, what):
    hostile, words = HOSTILE[what]
    path = tmp_path / "model.onnx"
    path.write_bytes(hostile.SerializeToString())
    with pytest.raises(ExportError, match=words):
        check_onnx(path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"PK\x03\x04 a zip", b"<html>"])
def test_what_is_not_onnx_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.onnx"):
        check_onnx(path)


def test_a_missing_file_and_a_plain_model(tmp_path):
    with pytest.raises(ExportError, match="cannot be read"):
        check_onnx(tmp_path / "none.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(model().SerializeToString())
    check_onnx(path)
