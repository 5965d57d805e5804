"""ONNX export of a run's model: written only where onnxruntime says what torch says."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from torch import nn
from torch.export import Dim

from medfl_ray.data.prepare.dataset import HospitalData
from medfl_ray.errors import ExportError
from medfl_ray.export.calibration import CalibrationFolder, open_images
from medfl_ray.export.description import DESCRIPTION, PackageDescription, Variant
from medfl_ray.export.fingerprint import fingerprint_of
from medfl_ray.export.model_card import CARDS, write_card
from medfl_ray.export.optimise import graph_forms, slim
from medfl_ray.export.package import ModelPackage, load_run, open_public_data, read_package
from medfl_ray.export.parity import NUM_IMAGES, Image, Parity, measure_parity, parity_images, patches_of
from medfl_ray.export.precision import VariantName
from medfl_ray.export.variants import FILES, write_variant
from medfl_ray.export.weights import load_weights
from medfl_ray.models.catalogue import build_network, onnx_size_note, size_divisor
from medfl_ray.params import Vector, checksum, layout_of, load_into
from medfl_ray.training.scoring.inference import WINDOW

INPUT, OUTPUT = "image", "logits"
MODEL = "model.onnx"


@dataclass(frozen=True)
class Exported:
    """What an export wrote into a folder."""

    parity: Parity
    description: PackageDescription


def export_run(
    run_dir: Path, variants: Sequence[VariantName] = (), calibration: CalibrationFolder | None = None
) -> Exported:
    """Write a finished run's model package into its folder: model.onnx, variants, model.json and the model card.

    Raises:
      ConfigError: the folder is not a run's.
      ExportError: the run has not ended, its weights do not fit, or parity failed; then no model.onnx is left.
    """
    for name in (MODEL, *FILES.values(), DESCRIPTION, *CARDS):
        (run_dir / name).unlink(missing_ok=True)
    run = load_run(run_dir)
    data = open_public_data(run)
    package = read_package(run_dir, run, data)
    layout = layout_of(network_of(package))
    weights = load_weights(run_dir / "model.safetensors", layout)
    exported = export_onnx(package, weights, run_dir, data, variants, calibration)
    write_card(run_dir, run, exported.description)
    return exported


def network_of(package: ModelPackage) -> nn.Module:
    """Build a package's network, untrained, in evaluation mode."""
    return build_network(
        package.model, package.spatial_dims, package.num_channels, package.out_channels, False, package.patch_size
    ).eval()


def export_onnx(
    package: ModelPackage,
    weights: Vector,
    directory: Path,
    data: HospitalData | None = None,
    variants: Sequence[VariantName] = (),
    calibration: CalibrationFolder | None = None,
) -> Exported:
    """Write model.onnx, the variants asked for and, next to them, model.json with everything that serving needs.

    Args:
      weights: [P].
      data: a hospital's data that are not private, for parity, calibration and fingerprint; phantoms when None.
      calibration: a folder to take instead of these for the variants, and for parity where there is nothing else.

    Raises:
      ExportError: torch cannot export the network, the file is not valid ONNX, parity failed, or a variant loses too
        much.
    """
    network = network_of(package)
    load_into(network, weights)
    shown = open_images(package, data, calibration) if variants or calibration is not None else None
    if shown is not None and calibration is not None:
        images, origin = list(shown.measured[:NUM_IMAGES]), shown.origin
    else:
        images, origin = parity_images(package, data)
    sizes = _sizes(package)
    batches = [patches_of(images[:1], sizes[0]), *(patches_of(images, size) for size in sizes)]
    plain = _to_onnx(network, batches[-1], dynamic_space=len(sizes) > 1)
    with _unfinished(directory / MODEL) as path:
        parity = _save_first_equal(plain, path, lambda run: measure_parity(network, run, batches, origin))
        description = _describe(package, weights, plain, _variant(path), parity, data)
    if shown is not None:
        made = {name: write_variant(name, directory, slim(plain), description, shown) for name in variants}
        description = description.model_copy(update={"variants": {**description.variants, **made}})
    with _unfinished(directory / DESCRIPTION) as path:
        path.write_text(description.model_dump_json(indent=1), encoding="utf-8")
    return Exported(parity, description)


def _save_first_equal(
    plain: onnx.ModelProto, path: Path, check: Callable[[Callable[[Image], Image]], Parity]
) -> Parity:
    """Write the fastest form of a graph that holds parity, the exporter's own at the latest."""
    failed: ExportError | None = None
    for model in graph_forms(plain):
        try:
            _save_checked(model, path)
            return check(_runner(path))
        except ExportError as error:
            failed = error
    assert failed is not None
    raise failed


def _sizes(package: ModelPackage) -> list[tuple[int, ...]]:
    """Return the input sizes to check: the patch and, where space is dynamic, a larger one with unequal edges."""
    patch = package.patch_size
    if onnx_size_note(package.model):
        return [patch]
    step = size_divisor(package.model)
    return [patch, tuple(edge + step * (axis + 1) for axis, edge in enumerate(patch))]


def _variant(path: Path) -> Variant:
    return Variant(
        file=MODEL, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size, dice_loss=0.0,
        speed=1.0,
    )  # fmt: skip


def _describe(
    package: ModelPackage,
    weights: Vector,
    model: onnx.ModelProto,
    float32: Variant,
    parity: Parity,
    data: HospitalData | None,
) -> PackageDescription:
    note = onnx_size_note(package.model)
    return PackageDescription(
        name=package.name,
        task=package.task,
        network=package.model,
        spatial_dims=2 if package.spatial_dims == 2 else 3,
        channels=package.channels,
        labels=package.labels,
        out_channels=package.out_channels,
        patch_size=package.patch_size,
        size_divisor=size_divisor(package.model),
        dynamic_batch=True,
        dynamic_space=not note,
        dynamic_space_note=note,
        preprocessing=package.preprocessing,
        sliding_window=WINDOW,
        fingerprint=fingerprint_of(data) if data is not None else None,
        privacy=package.privacy,
        weights_checksum=checksum(weights),
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        input=INPUT,
        output=OUTPUT,
        variants={"float32": float32},
        parity=asdict(parity),
    )


def _to_onnx(network: nn.Module, example: torch.Tensor, dynamic_space: bool) -> onnx.ModelProto:
    axes = range(example.ndim) if dynamic_space else range(1)
    # A batch of one would be taken for a constant.
    example = example if len(example) > 1 else torch.cat([example, example])
    shapes = ({axis: Dim.DYNAMIC for axis in axes if axis != 1},)
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                network, (example,), dynamo=True, dynamic_shapes=shapes, input_names=[INPUT], output_names=[OUTPUT],
                verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(
                f"torch could not export the network ({type(error).__name__}); the weights are in model.safetensors"
            ) from error
    if program is None:
        raise ExportError("torch returned no exported program; the weights are in model.safetensors")
    return program.model_proto


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep out the exporter's words on packages that no network here needs, and on its own deprecations."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _save_checked(model: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError("the exporter wrote a file that the ONNX checker refuses; no model.onnx was kept") from error
    onnx.save_model(model, path)


def _runner(path: Path) -> Callable[[Image], Image]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(batch: Image) -> Image:
        (logits,) = session.run([OUTPUT], {INPUT: np.ascontiguousarray(batch)})
        result: npt.NDArray[np.float32] = np.asarray(logits)
        return result

    return run


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yield a temporary file next to the path; it replaces the path's file only if nothing goes wrong."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
