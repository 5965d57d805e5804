"""Tensors of the Open Inference Protocol v2: JSON and the binary extension, read strictly and written exactly.

Source: https://github.com/open-inference/open-inference-protocol, REST; binary tensors as NVIDIA Triton documents them.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medfl_ray.export.description import PackageDescription
from serve.refusals import Refusal, TooLarge

HEADER_LENGTH = "Inference-Header-Content-Length"
LABELS = "labels"
MAX_AXES = 8
MAX_ELEMENTS = 2**31
MAX_HEADER_BYTES = 1024**2

Array = npt.NDArray[np.float32]
InferenceAnswer = npt.NDArray[np.float32] | npt.NDArray[np.uint8]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Tensor(_Message):
    name: str = Field(max_length=256)
    shape: list[int] = Field(max_length=MAX_AXES)
    datatype: str = Field(max_length=16)
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(_Message):
    name: str = Field(max_length=256)
    parameters: dict[str, Any] = {}


class _Request(_Message):
    id: str | None = Field(default=None, max_length=256)
    parameters: dict[str, Any] = {}
    inputs: list[_Tensor] = Field(min_length=1, max_length=8)
    outputs: list[_Output] = Field(default=[], max_length=8)


@dataclass(frozen=True, eq=False)
class InferRequest:
    """A request that fits the model: an image [N, C, *S] and the outputs that are wanted, True where in binary."""

    tensor: Array = field(repr=False)
    outputs: dict[str, bool]
    id: str | None


def read_request(
    body: Path,
    header_length: str | None,
    description: PackageDescription,
    most_json: int,
    most_voxels: int = MAX_ELEMENTS,
) -> InferRequest:
    """Read a request's body from its file; a binary tensor stays on the disk until it is used.

    Args:
      header_length: what the header Inference-Header-Content-Length says, if it is there.
      most_json: largest JSON in bytes.
      most_voxels: most voxels of one image, over all channels; the model takes it whole.

    Raises:
      Refusal: the body is not a request of the protocol, or not one for this model.
    """
    size = body.stat().st_size
    json_size = size if header_length is None else _header_length(header_length, size)
    if json_size > most_json:
        raise TooLarge(
            f"the request has {json_size} bytes of JSON; this service takes {most_json}. Send tensors in binary"
        )
    with body.open("rb") as stream:
        message = _parse(stream.read(json_size))
    (tensor,) = _only_input(message, description)
    shape = _check_shape(tensor, description, most_voxels)
    binary_size = tensor.parameters.get("binary_data_size")
    if binary_size is None:
        if size != json_size:
            raise Refusal(f"{size - json_size} bytes follow the JSON, but no input has the parameter binary_data_size")
        image = _from_json(tensor, shape)
    else:
        image = _from_binary(body, tensor, shape, binary_size, json_size, size)
    if not np.isfinite(image).all():
        raise Refusal(f"the input {tensor.name!r} has values that are NaN or infinite; a model needs finite ones")
    return InferRequest(image, _wanted(message, description), message.id)


def _header_length(text: str, size: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 12:
        raise Refusal(f"the header {HEADER_LENGTH} is not a number of bytes")
    length = int(text)
    if length == 0:
        raise Refusal(f"{HEADER_LENGTH} is 0: raw requests without JSON are not supported, for they have no shape")
    if length > size:
        raise Refusal(f"{HEADER_LENGTH} is {length}, but the body has {size} bytes")
    return length


def _parse(text: bytes) -> _Request:
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON ({type(error).__name__})") from None
    try:
        return _Request.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise Refusal(f"{where[:128]}: {first['msg']}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise Refusal(f"the request has the value {name}; JSON and models know finite numbers only")


def _only_input(message: _Request, description: PackageDescription) -> list[_Tensor]:
    names = [tensor.name for tensor in message.inputs]
    if names != [description.input]:
        raise Refusal(f"the inputs are {', '.join(map(repr, names))}; the model has one, {description.input!r}")
    return message.inputs


def _check_shape(tensor: _Tensor, description: PackageDescription, most_voxels: int) -> tuple[int, ...]:
    """Return the shape [N, C, *S] if the model can take it."""
    if tensor.datatype != "FP32":
        raise Refusal(f"the datatype of {tensor.name!r} is {tensor.datatype!r}; the model takes FP32")
    shape, expected = tuple(tensor.shape), input_shape(description)
    if len(shape) != len(expected) or any(have < 1 for have in shape):
        raise Refusal(f"the shape of {tensor.name!r} is {list(shape)}; expected {list(expected)}, -1 for any size")
    if math.prod(shape) > MAX_ELEMENTS:
        raise TooLarge(f"the shape of {tensor.name!r} is {list(shape)}, more than {MAX_ELEMENTS} values")
    if math.prod(shape[1:]) > most_voxels:
        raise TooLarge(
            f"one image of {tensor.name!r} has {math.prod(shape[1:])} values; this service takes {most_voxels}, as the "
            "model gets it whole. Send it in parts, or as a volume to /segment"
        )
    if any(want not in (-1, have) for have, want in zip(shape, expected, strict=True)):
        raise Refusal(f"the shape of {tensor.name!r} is {list(shape)}; expected {list(expected)}, -1 for any size")
    if description.dynamic_space and any(edge % description.size_divisor for edge in shape[2:]):
        raise Refusal(f"the sizes {list(shape[2:])} are not multiples of {description.size_divisor}; pad the image")
    return shape


def _from_json(tensor: _Tensor, shape: tuple[int, ...]) -> Array:
    try:
        values = np.asarray(tensor.data, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise Refusal(f"the data of {tensor.name!r} are not an array of numbers") from None
    if not _only_numbers(tensor.data):
        raise Refusal(f"the data of {tensor.name!r} are not an array of numbers")
    if values.shape not in (shape, (math.prod(shape),)):
        raise Refusal(
            f"the data of {tensor.name!r} have the shape {list(values.shape)}; its shape {list(shape)} needs "
            f"{math.prod(shape)} values, flat or nested"
        )
    with np.errstate(over="ignore"):  # becomes infinite, which the caller refuses
        return values.reshape(shape).astype(np.float32)


def _only_numbers(data: Any) -> bool:
    """Whether nested lists hold numbers alone; NumPy would take '1' and True for one."""
    if isinstance(data, list):
        kinds = set(map(type, data))
        return all(map(_only_numbers, data)) if list in kinds else kinds <= {int, float}
    return False


def _from_binary(
    body: Path, tensor: _Tensor, shape: tuple[int, ...], binary_size: Any, json_size: int, size: int
) -> Array:
    if tensor.data is not None:
        raise Refusal(f"{tensor.name!r} has both data and binary_data_size; send one of them")
    expected = 4 * math.prod(shape)
    if type(binary_size) is not int or binary_size != expected:
        raise Refusal(f"binary_data_size of {tensor.name!r} is {binary_size!r:.32}; its shape needs {expected}")
    if size - json_size != expected:
        raise Refusal(f"{size - json_size} bytes follow the JSON; binary_data_size says {expected}")
    mapped = np.memmap(body, dtype="<f4", mode="r", offset=json_size, shape=shape)
    return np.asarray(mapped)


def _wanted(message: _Request, description: PackageDescription) -> dict[str, bool]:
    """Return the outputs that are asked for, all of them if none is named, and whether each is wanted in binary."""
    known = (description.output, LABELS)
    by_default = _flag(message.parameters, "binary_data_output", False)
    if not message.outputs:
        return dict.fromkeys(known, by_default)
    wanted = {}
    for output in message.outputs:
        if output.name not in known:
            raise Refusal(f"the model has no output {output.name!r}; it has {known[0]!r} and {known[1]!r}")
        if output.parameters.get("classification") is not None:
            raise Refusal("the parameter classification is not supported; ask for the output 'labels'")
        wanted[output.name] = _flag(output.parameters, "binary_data", by_default)
    return wanted


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(f"the parameter {name} is neither true nor false")
    return value


def labels_of(logits: Array) -> npt.NDArray[np.uint8]:
    """Return the class [N, *S] with the largest logit of [N, L, *S]."""
    labels: npt.NDArray[np.uint8] = np.argmax(logits, axis=1).astype(np.uint8)
    return labels


@dataclass(frozen=True)
class Encoded:
    """An answer: parts to send one after the other, and the length of the JSON where binary follows it."""

    parts: tuple[bytes | memoryview, ...] = field(repr=False)
    header_length: int | None

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(len(part) for part in self.parts)


def write_answer(
    request: InferRequest, name: str, version: str, logits: Array, description: PackageDescription, most_json: int
) -> Encoded:
    """Write the outputs that were asked for, in the order of the request.

    Raises:
      TooLarge: the answer would be too much JSON.
    """
    tensors: dict[str, InferenceAnswer] = {description.output: logits}
    if LABELS in request.outputs:
        tensors[LABELS] = labels_of(logits)
    # About 12 characters of JSON a number.
    textual = sum(tensors[output].size * 12 for output, binary in request.outputs.items() if not binary)
    if textual > most_json:
        raise TooLarge(
            f"the answer would be about {textual} bytes of JSON; this service sends {most_json}. Ask for binary "
            "outputs: the parameter binary_data_output"
        )
    outputs, blobs = [], []
    for output, binary in request.outputs.items():
        tensor = tensors[output]
        entry: dict[str, Any] = {
            "name": output,
            "shape": list(tensor.shape),
            "datatype": "UINT8" if tensor.dtype == np.uint8 else "FP32",
        }
        if binary:
            little_endian = np.ascontiguousarray(tensor, dtype="u1" if tensor.dtype == np.uint8 else "<f4")
            blobs.append(little_endian.data.cast("B"))
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = tensor.reshape(-1).tolist()
        outputs.append(entry)
    message: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": outputs}
    if request.id is not None:
        message["id"] = request.id
    header = json.dumps(message).encode()
    return Encoded((header, *blobs), len(header) if blobs else None)


def input_shape(description: PackageDescription) -> list[int]:
    """Return the shape of the image input, -1 where any size is taken."""
    batch = -1 if description.dynamic_batch else 1
    space = [-1] * description.spatial_dims if description.dynamic_space else list(description.patch_size)
    return [batch, description.num_channels, *space]


def metadata(name: str, versions: tuple[str, ...], description: PackageDescription) -> dict[str, Any]:
    """Return what GET /v2/models/NAME says."""
    batch, _, *space = input_shape(description)
    is_dense = description.task == "segmentation"
    classes: list[int] = space if is_dense else []
    return {
        "name": name,
        "versions": list(versions),
        "platform": "onnxruntime_onnx",
        "inputs": [_entry(description.input, "FP32", input_shape(description))],
        "outputs": [
            _entry(description.output, "FP32", [batch, description.out_channels, *classes]),
            _entry(LABELS, "UINT8", [batch, *classes]),
        ],
    }


def _entry(name: str, datatype: Literal["FP32", "UINT8"], shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}
