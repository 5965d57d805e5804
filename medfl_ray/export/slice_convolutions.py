"""Volume convolutions written as convolutions of slices: the same sums, by kernels that processors do fast.

onnxruntime has fast kernels for images [N, C, H, W] and slow ones for volumes [N, C, D, H, W]. A 3D convolution is
a 2D one over slices whose channels hold the neighbouring slices as well; a transposed convolution of stride s is a
plain one with s^3 times the channels, which are then dealt out to the finer grid. Both rewritings keep every weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

Array = npt.NDArray[Any]


class _Nodes(Tape):
    """New nodes for the place of an old one, with constants in the graph's initializers."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        super().__init__()
        self._graph, self._node, self._count = graph, node, 0

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.op(op_type, list(inputs), attributes or None)

    def constant(self, values: Any) -> ir.Value:
        """Keep values among the initializers."""
        name = f"{self._node.name}.constant{self._count}"
        self._count += 1
        array = np.asarray(values)
        value = ir.Value(name=name, const_value=ir.tensor(np.array(array, order="C"), name=name))
        self._graph.register_initializer(value)
        return value

    def edge(self, value: ir.Value, first: int, end: int | None = None) -> ir.Value:
        """Return the lengths of some axes."""
        return self("Shape", value, start=first, end=first + 1 if end is None else end)

    def put(self, last: ir.Node, result: ir.Value) -> None:
        """Replace the nodes from the old one to a last one that follows it; the result takes the output's name."""
        old = last.outputs[0]
        self._graph.insert_before(self._node, self.nodes)
        result.name, result.type, result.shape = old.name, old.type, old.shape
        outputs = self._graph.outputs
        for position in [number for number, output in enumerate(outputs) if output is old]:
            outputs[position] = result
        ir.convenience.replace_all_uses_with(old, result)
        old.name = f"{old.name}.replaced"
        removed = [last]
        while removed[-1] is not self._node:
            removed.append(_producer(removed[-1].inputs[0]))
        for gone in removed:
            self._graph.remove(gone, safe=True)


def spread_transposed_convolutions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn 3D transposed convolutions that multiply every edge by their stride into plain ones and a new order."""
    read = ir.from_proto(model)
    for node in list(read.graph):
        if node.op_type == "ConvTranspose" and _is_plain_volume(node) and _multiplies_edges(node):
            _spread(read.graph, node)
    return _written(read)


def convolve_slices(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn 3D convolutions, quantised ones too, into 2D convolutions of slices stacked with their neighbours."""
    read = ir.from_proto(model)
    for node in list(read.graph):
        if node.op_type == "Conv" and _is_plain_volume(node) and _weights(node).shape[2] > 1:
            _stack(read.graph, node)
    return _written(read)


def spread_weights(weights: Array, strides: Sequence[int], pads: Sequence[int]) -> tuple[Array, list[tuple[int, int]]]:
    """Return weights [s0 s1 s2 L, C, *T] of the plain convolution and its padding before and after, per axis.

    Args:
      weights: [C, L, *K] of the transposed one. Output s j + r takes from input j + t the weight r + pad - s t.
    """
    kernel = weights.shape[2:]
    axes = list(zip(kernel, strides, pads, strict=True))
    reach = [((edge - 1 - pad) // stride, (stride - 1 + pad) // stride) for edge, stride, pad in axes]
    taps = [before + 1 + after for before, after in reach]
    by_tap = np.moveaxis(weights, (0, 1), (4, 3))
    plain = np.zeros((*strides, *taps, weights.shape[1], weights.shape[0]), dtype=weights.dtype)
    for phase in itertools.product(*(range(stride) for stride in strides)):
        for tap in itertools.product(*(range(length) for length in taps)):
            source: tuple[int, ...] = tuple(
                r + pad - stride * (t - before)
                for r, t, (_, stride, pad), (before, _) in zip(phase, tap, axes, reach, strict=True)
            )
            if all(0 <= position < edge for position, edge in zip(source, kernel, strict=True)):
                plain[phase + tap] = by_tap[source]
    return plain.transpose(0, 1, 2, 6, 7, 3, 4, 5).reshape(-1, weights.shape[0], *taps), reach


def _spread(graph: ir.Graph, node: ir.Node) -> None:
    strides = _ints(node, "strides", (1,) * 3)
    plain, reach = spread_weights(_weights(node), strides, _ints(node, "pads", (0,) * 6)[:3])
    make = _Nodes(graph, node)
    inputs = [node.inputs[0], make.constant(plain)]
    if len(node.inputs) > 2:
        inputs.append(make.constant(np.tile(_known(node.inputs[2]), prod(strides))))
    pads = [*(before for before, _ in reach), *(after for _, after in reach)]
    fine = make("Conv", *inputs, kernel_shape=list(plain.shape[2:]), pads=pads)
    make.put(node, _deal_out(make, fine, strides))


def _deal_out(make: _Nodes, fine: ir.Value, strides: Sequence[int]) -> ir.Value:
    """Return [N, L, s0 D, s1 H, s2 W] from [N, s0 s1 s2 L, D, H, W].

    The last axis first and alone: onnxruntime turns a matrix quickly, and then moves whole rows.
    """
    count, depth, height, width = (make.edge(fine, axis) for axis in (0, 2, 3, 4))
    steps = [make.constant([stride]) for stride in strides]
    rest = make.constant([-1])
    outer = make("Mul", count, make.constant([strides[0] * strides[1]]))
    columns = make("Transpose", make("Reshape", fine, make("Concat", outer, steps[2], rest, axis=0)), perm=[0, 2, 1])
    wide = make("Mul", width, steps[2])
    apart = make("Reshape", columns, make("Concat", count, steps[0], steps[1], rest, depth, height, wide, axis=0))
    dealt = make("Transpose", apart, perm=[0, 3, 4, 1, 5, 2, 6])
    edges = make("Mul", depth, steps[0]), make("Mul", height, steps[1]), wide
    return make("Reshape", dealt, make("Concat", count, rest, *edges, axis=0))


def _stack(graph: ir.Graph, node: ir.Node) -> None:
    """Move voxels where they are small: before an input is dequantised, and after an output is quantised."""
    kernel, pads, strides = _weights(node).shape[2:], _ints(node, "pads", (0,) * 6), _ints(node, "strides", (1,) * 3)
    make = _Nodes(graph, node)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    scaling = list(source.inputs[1:]) if source is not None and source.op_type == "DequantizeLinear" else []
    volume = _producer(node.inputs[0]).inputs[0] if scaling else node.inputs[0]
    assert volume is not None
    zero = scaling[1] if scaling else make.constant(np.zeros((), _weights(node).dtype))
    stacked = _stack_neighbours(make, volume, zero, (kernel[0], strides[0], pads[0], pads[3]))
    if scaling:
        stacked = make("DequantizeLinear", stacked, *scaling)
    flat = make(
        "Conv", stacked, _flat_weights(make, node), *node.inputs[2:], kernel_shape=list(kernel[1:]),
        strides=list(strides[1:]), pads=[pads[1], pads[2], pads[4], pads[5]],
    )  # fmt: skip
    last = node
    quantised = _only_user(node, "QuantizeLinear")
    restored = _only_user(quantised, "DequantizeLinear") if quantised is not None else None
    if quantised is not None and restored is not None:
        flat, last = make("QuantizeLinear", flat, *quantised.inputs[1:]), restored
    shape = make("Concat", make.edge(volume, 0), make.constant([-1]), make.edge(flat, 1, 4), axis=0)
    result = make("Transpose", make("Reshape", flat, shape), perm=[0, 2, 1, 3, 4])
    if last is not node:
        result = make("DequantizeLinear", result, *last.inputs[1:])
    make.put(last, result)


def _stack_neighbours(make: _Nodes, volume: ir.Value, zero: ir.Value | None, depth: tuple[int, ...]) -> ir.Value:
    """Return [N D', K C, H, W] from [N, C, D, H, W]: each slice with the K - 1 after it, of the padded volume."""
    kernel, stride, before, after = depth
    slices = make("Transpose", volume, perm=[0, 2, 1, 3, 4])
    if before or after:
        slices = make("Pad", slices, make.constant([0, before, 0, 0, 0, 0, after, 0, 0, 0]), zero)
    beyond = make("Squeeze", make("Sub", make.edge(slices, 1), make.constant([kernel - 1])))
    first = make("Range", make.constant(0), beyond, make.constant(stride))
    indices = make("Add", make("Unsqueeze", first, make.constant([1])), make.constant(np.arange(kernel)))
    stacked = make("Gather", slices, indices, axis=1)
    channels = make("Mul", make.edge(slices, 2), make.constant([kernel]))
    return make("Reshape", stacked, make("Concat", make.constant([-1]), channels, make.edge(slices, 3, 5), axis=0))


def _flat_weights(make: _Nodes, node: ir.Node) -> ir.Value:
    """Return weights [L, K C, H, W] from [L, C, K, H, W], quantised as the old ones were."""
    values = _weights(node)
    width, channels, depth, *others = values.shape
    flat = make.constant(values.transpose(0, 2, 1, 3, 4).reshape(width, depth * channels, *others))
    source = node.inputs[1].producer() if node.inputs[1] is not None else None
    return flat if source is None else make("DequantizeLinear", flat, *source.inputs[1:], axis=0)


def _written(model: ir.Model) -> onnx.ModelProto:
    RemoveUnusedNodesPass()(model)
    model.graph.sort()
    proto: onnx.ModelProto = ir.to_proto(model)
    del proto.graph.value_info[:]
    return proto


def _is_plain_volume(node: ir.Node) -> bool:
    weights = _constant(node.inputs[1])
    return (
        weights is not None
        and weights.ndim == 5
        and _ints(node, "group", (1,)) == (1,)
        and set(_ints(node, "dilations", (1,))) == {1}
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def _multiplies_edges(node: ir.Node) -> bool:
    """Tell whether the output's edges are the input's times the stride."""
    kernel, pads = _weights(node).shape[2:], _ints(node, "pads", (0,) * 6)
    strides, more = _ints(node, "strides", (1,) * 3), _ints(node, "output_padding", (0,) * 3)
    return all(
        kernel[axis] - stride + more[axis] == pads[axis] + pads[axis + 3] and kernel[axis] > pads[axis]
        for axis, stride in enumerate(strides)
    )


def _only_user(node: ir.Node, op_type: str) -> ir.Node | None:
    users = [use.node for use in node.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _producer(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def _ints(node: ir.Node, name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    if attribute is None:
        return otherwise
    return tuple(attribute.as_ints()) if attribute.type == ir.AttributeType.INTS else (attribute.as_int(),)


def _constant(value: ir.Value | None) -> Array | None:
    """Return a constant's values; of quantised weights the stored integers."""
    source = value.producer() if value is not None else None
    if source is not None and source.op_type == "DequantizeLinear":
        value = source.inputs[0]
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _known(value: ir.Value | None) -> Array:
    values = _constant(value)
    assert values is not None
    return values


def _weights(node: ir.Node) -> Array:
    return _known(node.inputs[1])
