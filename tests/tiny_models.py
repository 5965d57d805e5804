"""Model packages of a few bytes: each version marks every voxel with its own class, so that a mask names it."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from medfl_ray.config.model import ModelConfig
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.volume import Volume
from medfl_ray.export.description import (
    DESCRIPTION,
    ChannelIntensities,
    Fingerprint,
    PackageDescription,
    Variant,
)

NUM_CLASSES = 4
PATCH = (8, 8, 8)
FINGERPRINT = Fingerprint(
    origin="synthetic",
    num_images=3,
    channels=(ChannelIntensities(mean=0, std=1, percentiles=(-2.326, -0.674, 0, 0.674, 2.326)),),
)


def write_model(
    folder: Path,
    mark: int,
    name: str = "tiny",
    fingerprint: Fingerprint | None = FINGERPRINT,
    num_slow: int = 0,
    spacing_mm: tuple[float, ...] | None = None,
) -> PackageDescription:
    """Write a package whose network says class `mark` (1 to 3) everywhere; label values are ten times the class.

    Args:
      num_slow: convolutions that change nothing, each about 20 ms for 48 voxels an edge.
    """
    folder.mkdir(parents=True)
    content = _network(mark, num_slow).SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    description = PackageDescription(
        name=name,
        task="segmentation",
        network=ModelConfig.model_validate({"type": "unet3d", "features": [4, 8]}),
        spatial_dims=3,
        channels=("T1",),
        labels={1: "first", 2: "second", 3: "third"},
        out_channels=NUM_CLASSES,
        patch_size=PATCH,
        size_divisor=2,
        dynamic_batch=True,
        dynamic_space=True,
        dynamic_space_note="",
        preprocessing=Preprocessing(
            channels=("T1",), label_values=(10, 20, 30), intensity="none", spacing_mm=spacing_mm
        ),
        fingerprint=fingerprint,
        privacy={"differential_privacy": False},
        weights_checksum=f"mark-{mark}",
        opset=18,
        input="image",
        output="logits",
        variants={"float32": Variant(file="model.onnx", sha256=sha256, size_bytes=len(content))},
        parity={},
    )
    (folder / DESCRIPTION).write_text(description.model_dump_json(), encoding="utf-8")
    return description


def _network(mark: int, num_slow: int) -> onnx.ModelProto:
    scores = np.full((1, NUM_CLASSES, 1, 1, 1), 0, dtype=np.float32)
    scores[0, mark] = 5
    kernel = np.zeros((1, 1, 7, 7, 7), dtype=np.float32)
    kernel[0, 0, 3, 3, 3] = 1
    slow = [
        helper.make_node("Conv", [f"slow-{k}" if k else "image", "kernel"], [f"slow-{k + 1}"], pads=[3] * 6)
        for k in range(num_slow)
    ]
    nodes = [
        *slow,
        helper.make_node("Mul", [f"slow-{num_slow}" if num_slow else "image", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "scores"], ["logits"]),
    ]
    space = ["D", "H", "W"]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, *space])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", NUM_CLASSES, *space])],
        [
            numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
            numpy_helper.from_array(scores, "scores"),
            *([numpy_helper.from_array(kernel, "kernel")] if num_slow else []),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def promote(models: Path, version: int | str, name: str = "tiny") -> None:
    """Name the version of a model that is served by default."""
    new = models / name / ".champion.new"
    new.write_text(str(version), encoding="utf-8")
    new.replace(models / name / "champion")


def noise_volume(shape: tuple[int, ...] = (20, 20, 20), shift: float = 0.0, seed: int = 0) -> Volume:
    """A volume of unit noise around a mean."""
    values = np.random.default_rng(seed).normal(shift, 1, (1, *shape)).astype(np.float32)
    return Volume(values, np.eye(4))


def json_request(shape: tuple[int, ...] = (1, 1, 4, 4, 4), **changes: Any) -> dict[str, Any]:
    """A request of the Open Inference Protocol that the tiny model can answer."""
    values = np.arange(int(np.prod(shape)), dtype=np.float32).tolist()
    tensor = {"name": "image", "shape": list(shape), "datatype": "FP32", "data": values}
    return {"inputs": [{**tensor, **changes}]}


def binary_request(shape: tuple[int, ...] = (1, 1, 4, 4, 4), **message: Any) -> tuple[bytes, dict[str, str]]:
    """The same with a binary tensor: a body and its headers."""
    values = np.arange(int(np.prod(shape)), dtype="<f4").tobytes()
    tensor = {"name": "image", "shape": list(shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(values)}
    header = json.dumps({"inputs": [tensor], **message}).encode()
    return header + values, {"Inference-Header-Content-Length": str(len(header))}


def read_answer(body: bytes, header_length: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take an answer with binary tensors apart, by the standard library alone."""
    message = json.loads(body[:header_length])
    tensors, at = {}, header_length
    for output in message["outputs"]:
        size = output["parameters"]["binary_data_size"]
        raw, at = body[at : at + size], at + size
        kind = {"FP32": "f", "UINT8": "B"}[output["datatype"]]
        values = list(itertools.chain.from_iterable(struct.iter_unpack(f"<{kind}", raw)))
        tensors[output["name"]] = np.array(values).reshape(output["shape"])
    assert at == len(body)
    return message, tensors
