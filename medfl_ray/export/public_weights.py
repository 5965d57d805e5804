"""Weights that no patient has shaped: written with a manifest that says so, and read only together with it.

A run may start from such weights without any privacy cost. That is why a file without a manifest, or one whose
manifest names another origin, is refused: weights of a run on private data would carry its patients along.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfl_ray.errors import ConfigError, ExportError
from medfl_ray.export.weights import load_weights, save_weights
from medfl_ray.params import Layout, Vector


class WeightsManifest(BaseModel):
    """What is known of a weights file; `origin` is what its training data were."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    origin: Literal["public", "synthetic"]
    source: str
    sha256: str
    layout_checksum: str
    made_with: dict[str, Any]


def manifest_path(weights: Path) -> Path:
    """Return the path of a weights file's manifest, next to the file."""
    return weights.with_suffix(".manifest.json")


def save_public_weights(
    path: Path,
    weights: Vector,
    layout: Layout,
    name: str,
    source: str,
    made_with: dict[str, Any],
    origin: Literal["public", "synthetic"] = "synthetic",
) -> WeightsManifest:
    """Write weights [P] that no private image has shaped, and their manifest.

    Raises:
      ConfigError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(path, weights, layout)
        manifest = WeightsManifest(
            name=name,
            origin=origin,
            source=source,
            sha256=sha256_of(path),
            layout_checksum=layout.checksum,
            made_with=made_with,
        )
        manifest_path(path).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path.name!r} ({error.strerror}); choose another output") from None
    return manifest


def read_manifest(path: Path) -> WeightsManifest:
    """Read the manifest of a weights file and check that it belongs to the file.

    Raises:
      ConfigError: file or manifest is missing or damaged, does not fit the other, or the origin is not public or
        synthetic.
    """
    name = path.name
    if not path.is_file():
        raise ConfigError(f"training.initial_weights: there is no file {name!r}; check the path or run pretrain")
    beside = manifest_path(path)
    if not beside.is_file():
        raise ConfigError(
            f"training.initial_weights: {name!r} has no {beside.name!r} beside it, so that nothing says its training "
            "data were public or synthetic; use weights that medfl-ray pretrain wrote"
        )
    try:
        manifest = WeightsManifest.model_validate_json(beside.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        raise ConfigError(
            f"training.initial_weights: {beside.name!r} is not a manifest with origin 'public' or 'synthetic'; "
            "weights of other origin would bring patients into the run"
        ) from None
    if manifest.sha256 != sha256_of(path):
        raise ConfigError(f"training.initial_weights: {name!r} is not the file of its manifest; write both again")
    return manifest


def load_public_weights(path: Path, layout: Layout, expected_sha256: str | None = None) -> Vector:
    """Read weights [P] for a network of a layout.

    Raises:
      ConfigError: see `read_manifest`; or the network is another, or the file is not the one the run began with.
    """
    manifest = read_manifest(path)
    if expected_sha256 is not None and manifest.sha256 != expected_sha256:
        raise ConfigError(
            f"training.initial_weights: {path.name!r} has changed since the run was configured; restore the file or "
            "start a new run"
        )
    if manifest.layout_checksum != layout.checksum:
        raise ConfigError(
            f"training.initial_weights: {path.name!r} belongs to another network ({_network_of(manifest)}); give the "
            "run the same model section, image channels and labels"
        )
    try:
        return load_weights(path, layout)
    except ExportError as error:
        raise ConfigError(f"training.initial_weights: {error}") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _network_of(manifest: WeightsManifest) -> str:
    model = manifest.made_with.get("model") or {}
    return f"{model.get('type', 'unknown')} with features {model.get('features', 'unknown')}"
