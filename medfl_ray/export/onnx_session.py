"""One ONNX file of a package as a function from windows to logits: checked before it is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medfl_ray.errors import ExportError, InferenceError
from medfl_ray.export.description import PackageDescription, read_description
from medfl_ray.export.onnx_check import check_onnx_content
from medfl_ray.export.precision import VariantName

Array = npt.NDArray[np.float32]
ONNX_TYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ERRORS_ONLY = 3


class OnnxModel:
    """A package's model, ready to run; one object may be called from several threads."""

    def __init__(
        self, content: bytes, description: PackageDescription, num_threads: int, providers: Sequence[str] | None
    ) -> None:
        """Load a model that `open` has checked.

        Raises:
          ExportError: onnxruntime refuses it.
        """
        import onnxruntime

        self.description = description
        try:
            self._session = onnxruntime.InferenceSession(
                content, sess_options=_options(num_threads), providers=_providers(providers)
            )
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors share no narrower base
            raise ExportError(
                f"onnxruntime cannot load the model {description.name!r} ({type(error).__name__}); export it again"
            ) from None
        inputs = {entry.name: entry.type for entry in self._session.get_inputs()}
        outputs = [entry.name for entry in self._session.get_outputs()]
        if list(inputs) != [description.input] or outputs != [description.output]:
            raise ExportError(
                f"the model's inputs are {sorted(inputs)} and its outputs {outputs}; model.json says "
                f"{description.input!r} and {description.output!r}. Export the model again"
            )
        if inputs[description.input] not in ONNX_TYPES:
            raise ExportError(f"the model's input is of type {inputs[description.input]}; expected float32 or float16")
        self._type = ONNX_TYPES[inputs[description.input]]

    @classmethod
    def open(
        cls,
        package_dir: Path,
        variant: VariantName = "float32",
        num_threads: int = 1,
        providers: Sequence[str] | None = None,
    ) -> OnnxModel:
        """Load one variant of a package.

        Args:
          num_threads: processor threads of one run; a replica's share.
          providers: onnxruntime's execution providers, best first; by default a GPU where there is one.

        Raises:
          ExportError: the variant does not exist, its file is not the one that model.json names, it asks for other
            files or libraries, or onnxruntime cannot load it.
        """
        description = read_description(package_dir)
        content = _read_checked(package_dir, description, variant)
        check_onnx_content(content, description.variants[variant].file)
        return cls(content, description, num_threads, providers)

    @property
    def provider(self) -> str:
        """The execution provider that runs the model."""
        return str(self._session.get_providers()[0])

    def run(self, windows: Array) -> Array:
        """Return logits [N, L, *P] of windows [N, C, *P]; of a classifier [N, L].

        Raises:
          InferenceError: onnxruntime stopped.
        """
        try:
            feed = {self.description.input: np.ascontiguousarray(windows, dtype=self._type)}
            (logits,) = self._session.run([self.description.output], feed)
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors share no narrower base
            raise InferenceError(
                f"the model {self.description.name!r} stopped on windows of the shape {windows.shape} "
                f"({type(error).__name__}); check the model's parity and the free memory"
            ) from None
        result: Array = np.asarray(logits, dtype=np.float32)
        return result


def _read_checked(package_dir: Path, description: PackageDescription, variant: VariantName) -> bytes:
    """Return a variant's file; what is hashed is what is loaded."""
    if variant not in description.variants:
        raise ExportError(
            f"the package {description.name!r} has no variant {variant!r}; it has {', '.join(description.variants)}. "
            "Choose one of these or export the model with this variant"
        )
    entry = description.variants[variant]
    path = package_dir / entry.file
    if Path(entry.file).name != entry.file or not path.is_file():
        raise ExportError(f"{entry.file!r} is not in the package {description.name!r}; fetch or export it again")
    content = path.read_bytes() if path.stat().st_size == entry.size_bytes else b""
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ExportError(
            f"{entry.file} of the package {description.name!r} is not the file that model.json names (size or "
            "SHA-256); it is damaged or was exchanged. Fetch or export it again"
        )
    return content


def _options(num_threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # A pattern of one window's memory would be kept next to the arena: a third more at the peak, and no faster.
    options.enable_mem_pattern = False
    return options


def _providers(wanted: Sequence[str] | None) -> list[Any]:
    import onnxruntime

    if wanted is not None:
        return list(wanted)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not _has_gpu():
        return ["CPUExecutionProvider"]
    # TF32 would round the float32 model's sums to ten bits.
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


def _has_gpu() -> bool:
    """Tell whether this process may use a GPU of NVIDIA, without loading CUDA."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))
