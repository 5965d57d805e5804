"""Convolutions of slices give what the volume convolutions gave, whatever their strides and paddings."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from medfl_ray.export.slice_convolutions import convolve_slices, spread_transposed_convolutions, spread_weights

RNG = np.random.default_rng(0)


def graph(op_type, weights, bias=True, **attributes):
    """One layer over volumes [N, C, D, H, W]."""
    channels = weights.shape[0] if op_type == "ConvTranspose" else weights.shape[1]
    width = weights.shape[1] if op_type == "ConvTranspose" else weights.shape[0]
    initializers = [numpy_helper.from_array(weights, "w")]
    if bias:
        initializers.append(numpy_helper.from_array(RNG.normal(size=width).astype(np.float32), "b"))
    node = helper.make_node(op_type, ["x", *(i.name for i in initializers)], ["y"], name="layer", **attributes)
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, "d", "h", "w"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width, "d2", "h2", "w2"])
    model = helper.make_graph([node], "g", [image], [result], initializers)
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, image):
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": image})[0]


def kinds(model):
    return {node.op_type for node in model.graph.node}


def weights_of(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((3, 3, 3), {"pads": [1] * 6}),
        ((3, 3, 3), {"pads": [1] * 6, "strides": [2, 2, 2]}),
        ((2, 3, 1), {"pads": [0, 1, 0, 1, 1, 0], "strides": [1, 2, 1]}),
        ((5, 3, 3), {"pads": [2, 1, 1, 2, 1, 1], "strides": [3, 1, 2]}),
        ((3, 3, 3), {}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_by_slices(kernel, attributes, bias):
    model = graph("Conv", weights_of(4, 3, *kernel), bias, **attributes)
    sliced = convolve_slices(model)
    image = weights_of(2, 3, 9, 8, 7)
    np.testing.assert_allclose(run(sliced, image), run(model, image), atol=1e-4)
    assert "Gather" in kinds(sliced)
    assert len(sliced.graph.initializer[0].dims) == 4 or all(len(i.dims) < 5 for i in sliced.graph.initializer)


@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "more"),
    [
        ((3, 3, 3), (2, 2, 2), (1,) * 6, (1, 1, 1)),
        ((2, 2, 2), (2, 2, 2), (0,) * 6, (0, 0, 0)),
        ((4, 4, 4), (2, 2, 2), (1,) * 6, (0, 0, 0)),
        ((3, 2, 3), (1, 2, 3), (1, 0, 0, 1, 0, 0), (0, 0, 0)),
    ],
)
def test_a_transposed_convolution_spread(kernel, strides, pads, more):
    model = graph(
        "ConvTranspose", weights_of(3, 4, *kernel), strides=strides, pads=pads, output_padding=more, kernel_shape=kernel
    )
    image = weights_of(2, 3, 4, 5, 6)
    expected = run(model, image)
    assert expected.shape[2:] == tuple(n * s for n, s in zip((4, 5, 6), strides, strict=True))
    spread = spread_transposed_convolutions(model)
    np.testing.assert_allclose(run(spread, image), expected, atol=1e-4)
    np.testing.assert_allclose(run(convolve_slices(spread), image), expected, atol=1e-4)
    assert "ConvTranspose" not in kinds(spread)


@pytest.mark.parametrize(
    "model",
    [
        graph("ConvTranspose", weights_of(3, 4, 3, 3, 3), strides=[2, 2, 2], pads=[1] * 6),  # 2n - 1 voxels
        graph("ConvTranspose", weights_of(3, 4, 2, 2, 2), strides=[2, 2, 2], dilations=[2, 2, 2]),
        graph("Conv", weights_of(4, 3, 1, 1, 1)),
        graph("Conv", weights_of(4, 1, 3, 3, 3), group=4),
    ],
)
def test_other_layers_stay_as_they_are(model):
    before = [node.op_type for node in model.graph.node]
    after = convolve_slices(spread_transposed_convolutions(model))
    assert [node.op_type for node in after.graph.node] == before


def test_spread_weights_by_hand():
    """Stride 2, kernel 3, padding 1: an even voxel takes w1 of its own, an odd one w2 of its own and w0 of the next."""
    w = np.array([10.0, 20.0, 30.0], dtype=np.float32).reshape(1, 1, 3, 1, 1)
    plain, reach = spread_weights(w, (2, 1, 1), (1, 0, 0))
    assert reach == [(0, 1), (0, 0), (0, 0)]
    assert plain[:, 0, :, 0, 0].tolist() == [[20.0, 0.0], [30.0, 10.0]]


def test_a_quantised_convolution_stays_quantised():
    """The integers are the same, and so is every bit of the result.

    Weights of seven bits: without VNNI, onnxruntime adds pairs of products in 16 bits, which larger ones overflow.
    """
    scalar = {
        "xs": np.float32(0.05), "xz": np.uint8(120), "ys": np.float32(0.3), "yz": np.uint8(128),
        "ws": np.full(4, 0.01, np.float32), "wz": np.zeros(4, np.int8),
        "w": RNG.integers(-63, 63, size=(4, 3, 3, 3, 3)).astype(np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="dw", axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="conv", pads=[1] * 6, strides=[2, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"], name="qc"),
        helper.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"], name="dc"),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "d", "h", "w"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, "d2", "h", "w"])
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in scalar.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [result], initializers),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    volume = weights_of(1, 3, 6, 8, 8)
    sliced = convolve_slices(model)
    np.testing.assert_array_equal(run(sliced, volume), run(model, volume))
    assert [node.op_type for node in sliced.graph.node].count("QuantizeLinear") == 2
