"""Variants of a model in fewer bits: float16 for processors that calculate in it, int8 for the others.

Each is measured against the float32 model on whole images that may be shown, and refused where it loses too much.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from medfl_ray.errors import ExportError
from medfl_ray.export.calibration import OpenImages
from medfl_ray.export.description import PackageDescription, Variant
from medfl_ray.export.parity import Image
from medfl_ray.export.precision import VariantName
from medfl_ray.export.slice_convolutions import convolve_slices, spread_transposed_convolutions
from medfl_ray.export.sliding_window import plan_windows, sliding_window
from medfl_ray.training.scoring.evaluation import dice_per_label

FILES: dict[VariantName, str] = {"float16": "model.float16.onnx", "int8": "model.int8.onnx"}
AIMED_LOSS = 0.002
LARGEST_LOSS = 0.05
WINDOWS_PER_IMAGE = 4
Run = Callable[[Image], Image]
Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Candidate:
    """A graph and what it costs: Dice against the float32 labels, and against true labels where images have them."""

    model: onnx.ModelProto
    loss: float
    truth_loss: float | None
    speed: float

    @property
    def cost(self) -> float:
        """What decides: the loss against the truth where it is known."""
        return self.loss if self.truth_loss is None else self.truth_loss


class Judge:
    """The float32 model's labels of the measured images, and the time it took."""

    def __init__(self, float32: Path, description: PackageDescription, images: OpenImages) -> None:
        """Run the float32 model once."""
        self._description, self._images = description, images
        self._reference = session_run(float32, description)
        self._labels = [_labels(self._reference, image, description) for image in images.measured]

    def measure(self, model: onnx.ModelProto) -> Candidate:
        """Run a model and the float32 one in turns; their times' ratio is the speed."""
        run = session_run(model.SerializeToString(), self._description)
        found, seconds = [], np.zeros(2)
        for image in self._images.measured:
            started = time.perf_counter()
            found.append(_labels(run, image, self._description))
            middle = time.perf_counter()
            _labels(self._reference, image, self._description)
            seconds += middle - started, time.perf_counter() - middle
        truths = self._images.truths
        return Candidate(
            model=model,
            loss=max(0.0, 1.0 - self._mean_dice(found, self._labels)),
            truth_loss=self._mean_dice(self._labels, truths) - self._mean_dice(found, truths) if truths else None,
            speed=float(seconds[1] / seconds[0]),
        )

    def _mean_dice(self, found: Sequence[Labels], expected: Sequence[Labels]) -> float:
        names = {value: str(value) for value in range(1, self._description.out_channels)}
        tables = [dice_per_label(a, b, names) for a, b in zip(found, expected, strict=True)]
        return float(np.mean([list(table.values()) for table in tables]))


def write_variant(
    name: VariantName, directory: Path, plain: onnx.ModelProto, description: PackageDescription, images: OpenImages
) -> Variant:
    """Write one variant next to model.onnx.

    Args:
      plain: the float32 graph with its volume convolutions as they were.

    Raises:
      ExportError: the variant cannot be made, or loses more than 0.05 Dice; then no file is left.
    """
    path = directory / FILES[name]
    path.unlink(missing_ok=True)
    judge = Judge(directory / description.variants["float32"].file, description, images)
    graphs = [half_precision(plain)] if name == "float16" else int8_graphs(plain, description, images)
    best = _first_within(AIMED_LOSS, (judge.measure(graph) for graph in graphs))
    if not best.loss <= LARGEST_LOSS:
        raise ExportError(
            f"the {name} variant loses {best.loss:.3f} Dice against float32 on {images.origin}; expected at most "
            f"{LARGEST_LOSS}. Serve float32, or calibrate on images like the training's with --calibration"
        )
    content = best.model.SerializeToString()
    path.write_bytes(content)
    return Variant(
        file=path.name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content),
        dice_loss=round(best.loss, 6), truth_loss=None if best.truth_loss is None else round(best.truth_loss, 6),
        speed=round(best.speed, 3), images=images.origin,
    )  # fmt: skip


def half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph in float16; its input and output stay float32, and so do the sums of its norms."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    blocked = [*DEFAULT_OP_BLOCK_LIST, "InstanceNormalization", "LayerNormalization"]
    converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True, op_block_list=blocked)
    return converted


def int8_graphs(
    plain: onnx.ModelProto, description: PackageDescription, images: OpenImages
) -> Iterator[onnx.ModelProto]:
    """Yield int8 graphs: every convolution quantised, then without the last one, then without the first as well.

    Weights of seven bits come first: with eight, a processor without VNNI saturates sums of two products, so that the
    file would be worth less there than where it was measured.
    """
    spread = spread_transposed_convolutions(plain)
    convolutions = [node.name for node in spread.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    if not convolutions:
        raise ExportError("the network has no layer that could be quantised; export it without --variants int8")
    for excluded in ([], convolutions[-1:], [convolutions[0], *convolutions[-1:]]):
        for seven_bits in (True, False):
            yield convolve_slices(_quantised(spread, excluded, seven_bits, description, images))


def _quantised(
    model: onnx.ModelProto,
    excluded: list[str],
    seven_bits: bool,
    description: PackageDescription,
    images: OpenImages,
) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder, _only_errors():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save_model(model, source)
        quantize_static(
            source,
            target,
            _windows_reader(description, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=excluded,
            per_channel=True,
            reduce_range=seven_bits,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"CalibMovingAverage": True},
        )
        return onnx.load_model(target)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keep out onnxruntime's advice to pre-process a graph that is slimmed already."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _windows_reader(description: PackageDescription, images: OpenImages) -> Any:
    """Return windows of the calibration images, spread over each, as the quantiser asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Windows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._windows = calibration_windows(images.calibration, description)

        def get_next(self) -> dict[str, Image] | None:
            window = next(self._windows, None)
            return None if window is None else {description.input: window}

    return Windows()


def calibration_windows(images: Sequence[Image], description: PackageDescription) -> Iterator[Image]:
    """Yield windows [1, C, *P], at most four of an image, spread over it."""
    for image in images:
        plan = plan_windows(image.shape[1:], description.patch_size, description.sliding_window.overlap)
        numbers = np.unique(np.linspace(0, len(plan) - 1, WINDOWS_PER_IMAGE).round().astype(int))
        for number in numbers.tolist():
            yield plan.cut(image, [number])


def session_run(model: Path | bytes, description: PackageDescription) -> Run:
    """Return a function from windows [N, C, *P] to logits, on one processor thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(windows: Image) -> Image:
        (logits,) = session.run([description.output], {description.input: np.ascontiguousarray(windows)})
        return np.asarray(logits, dtype=np.float32)

    return run


def _labels(run: Run, image: Image, description: PackageDescription) -> Labels:
    """Return the classes of an image's voxels, or the one class of the image."""
    if description.task == "segmentation":
        return np.asarray(sliding_window(run, image, description).argmax(axis=0), dtype=np.uint8)
    missing = [max(0, low - edge) for low, edge in zip(description.patch_size, image.shape[1:], strict=True)]
    padded = np.pad(image, [(0, 0), *((amount // 2, amount - amount // 2) for amount in missing)])
    return np.asarray(run(padded[None]).argmax(axis=1), dtype=np.uint8)


def _first_within(aim: float, candidates: Iterator[Candidate]) -> Candidate:
    """Return the first candidate that costs no more than the aim, otherwise the one that costs least."""
    seen: list[Candidate] = []
    for candidate in candidates:
        seen.append(candidate)
        if candidate.cost <= aim:
            return candidate
    return min(seen, key=lambda candidate: candidate.cost)
