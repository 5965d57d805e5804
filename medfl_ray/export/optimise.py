"""Smaller and faster forms of an exported graph, best first; the caller keeps the first one that holds parity."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import onnx

from medfl_ray.export.slice_convolutions import convolve_slices

_log = logging.getLogger(__name__)


def graph_forms(model: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """Yield the graph slimmed and with its volume convolutions by slices, slimmed, and as torch wrote it."""
    slimmed = slim(model)
    sliced = convolve_slices(slimmed)
    if len(sliced.graph.node) != len(slimmed.graph.node):
        yield sliced
    yield slimmed
    if slimmed is not model:
        yield model


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and drop what is not needed; the graph as it was where that fails or makes it invalid."""
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        slimmed = onnxslim.slim(copy)
        if not isinstance(slimmed, onnx.ModelProto):
            return model
        onnx.checker.check_model(slimmed, full_check=True)
    except Exception as error:  # noqa: BLE001 - what onnxslim raises has no common base; the graph works without it
        _log.warning("onnxslim could not slim the graph (%s); it is kept as torch wrote it", type(error).__name__)
        return model
    return slimmed
