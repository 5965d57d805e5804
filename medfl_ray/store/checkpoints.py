"""Checkpoints of a run: a folder per round, with a manifest of SHA-256 sums, renamed into place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medfl_ray.errors import CheckpointError
from medfl_ray.messages import RoundResult
from medfl_ray.params import Vector
from medfl_ray.store.durable import sha256, sync_folder, write_synced

MANIFEST = "manifest.json"
_SERVER = "server/"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One published round: weights [P], the strategy's state and what happened."""

    round: int
    weights: Vector
    server_state: Mapping[str, npt.NDArray[np.float32]]
    result: RoundResult


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint durably, then forget all but the newest `keep`.

    Raises:
      CheckpointError: the disk is full or the folder cannot be written; the checkpoints before it are intact.
    """
    final = folder / f"round-{checkpoint.round:05d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {"weights": checkpoint.weights, **{_SERVER + k: v for k, v in checkpoint.server_state.items()}}
        files = {
            "weights.safetensors": save(tensors),
            "state.json": json.dumps(
                {"round": checkpoint.round, "result": checkpoint.result.model_dump(mode="json")}
            ).encode(),
        }
        for name, content in files.items():
            write_synced(temporary / name, content)
        manifest = {name: sha256(content) for name, content in files.items()}
        write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint of round {checkpoint.round}: {error.strerror or type(error).__name__}. "
            "Free space; the run continues from the checkpoint before with medfl-ray run --resume."
        ) from None
    for old in sorted(folder.glob("round-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every file against the manifest.

    Raises:
      CheckpointError: a file is missing or does not match its checksum.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        contents = {name: (path / name).read_bytes() for name in ("weights.safetensors", "state.json")}
        damaged = [name for name, content in contents.items() if manifest.get(name) != sha256(content)]
        if damaged:
            raise CheckpointError(f"checkpoint {path.name!r}: {damaged[0]} does not match its checksum")
        tensors = load(contents["weights.safetensors"])
        state = json.loads(contents["state.json"])
        result = RoundResult.model_validate(state["result"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path.name!r} cannot be read: {type(error).__name__}") from None
    server = {name.removeprefix(_SERVER): value for name, value in tensors.items() if name.startswith(_SERVER)}
    return Checkpoint(int(state["round"]), tensors["weights"], server, result)


def last_good_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that reads whole, and a sentence for each newer one that does not."""
    problems: list[str] = []
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            return load_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems
