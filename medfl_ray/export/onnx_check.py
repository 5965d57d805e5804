"""An ONNX file from elsewhere, looked at before onnxruntime loads it.

A graph may name files of the machine for its weights, ask for operators of a library to be loaded, or claim shapes
that take all memory. None of this is in a model that this project exports, and so all of it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from medfl_ray.errors import ExportError

MAX_BYTES = 2**31 - 1
MAX_NODES = 100_000
LONGEST_EDGE = 1_000_000
MAX_VALUES = 2**31
DOMAINS = frozenset({"", "ai.onnx"})


def check_onnx(path: Path) -> None:
    """Refuse a model file that needs other files or libraries, or claims absurd sizes.

    Raises:
      ExportError: what is wrong with it.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ExportError(f"{path.name} has {size} bytes; a model has at most {MAX_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path.name} cannot be read ({error.strerror}); export the model again") from None
    check_onnx_content(content, path.name)


def check_onnx_content(content: bytes, name: str) -> None:
    """Check what `check_onnx` checks, of a file that was read."""
    try:
        model = onnx.load_from_string(content)
    except (DecodeError, ValueError):
        raise ExportError(f"{name} is not ONNX or is damaged; export the model again") from None
    if not model.graph.node or not model.graph.output:
        raise ExportError(f"{name} holds no graph; export the model again")
    if model.functions:
        raise ExportError(f"{name} has functions of its own, which are refused; export the model again")
    strange = sorted({entry.domain for entry in model.opset_import} - DOMAINS)
    nodes = list(_nodes(model.graph))
    strange += sorted({node.domain for node in nodes} - DOMAINS)
    if strange:
        raise ExportError(f"{name} asks for operators of {strange[0]!r}; expected standard ONNX operators only")
    if len(nodes) > MAX_NODES:
        raise ExportError(f"{name} has {len(nodes)} nodes; a model has at most {MAX_NODES}")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ExportError(f"{name} keeps weights in other files, which is refused; export it as a single file")
        _check_shape(tuple(tensor.dims), name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        shape = value.type.tensor_type.shape
        _check_shape(tuple(dim.dim_value for dim in shape.dim if dim.HasField("dim_value")), name)


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    product = 1
    for edge in shape:
        product *= max(edge, 1)
    if any(not 0 <= edge <= LONGEST_EDGE for edge in shape) or product > MAX_VALUES:
        raise ExportError(f"{name} claims a tensor of shape {list(shape)[:8]}, which no model has; export it again")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _inner(node):
            yield from _nodes(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[Any]:
    """Yield every tensor of a graph, those of inner graphs and attributes included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            for sparse in attribute.sparse_tensors:
                yield from (sparse.values, sparse.indices)
        for inner in _inner(node):
            yield from _tensors(inner)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
