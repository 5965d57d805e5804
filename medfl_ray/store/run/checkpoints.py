"""Checkpoints of a run: a folder per round, with a manifest of SHA-256 sums, renamed into place."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from medfl_ray.errors import StorageError
from medfl_ray.failpoints import failpoint
from medfl_ray.messages import HEADLINES, RoundResult
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


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, keep: int, scores: MutableMapping[Path, float] | None = None
) -> None:
    """Write a checkpoint durably, then forget all but the newest `keep` and the best, by `mean_score`.

    Args:
      scores: what earlier calls found, so that a checkpoint of a thousand hospitals is not read again in every round.

    Raises:
      StorageError: the disk is full or the folder cannot be written; the checkpoints before it are intact.
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
        failpoint("checkpoint.begin")
        for name, content in files.items():
            write_synced(temporary / name, content)
        failpoint("checkpoint.written")
        manifest = {name: sha256(content) for name, content in files.items()}
        write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        failpoint("checkpoint.manifest")
        _replace_folder(final, temporary)
        failpoint("checkpoint.renamed")
        known = {} if scores is None else scores
        known[final] = mean_score(checkpoint.result)
        _forget_all_but(folder, keep, known)
        failpoint("checkpoint.pruned")
    except OSError as error:
        raise StorageError(
            f"cannot write the checkpoint of round {checkpoint.round}: {error.strerror or type(error).__name__}. "
            "Free space; the run continues from the checkpoint before with medfl-ray run --resume."
        ) from None


def _replace_folder(final: Path, temporary: Path) -> None:
    """Rename a whole checkpoint into place; a damaged one of the same round, which was trained again, goes first."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _forget_all_but(folder: Path, keep: int, scores: MutableMapping[Path, float]) -> None:
    """Remove all checkpoints but the newest `keep` and the best; scores that are not known are read."""
    paths = sorted(folder.glob("round-*"))
    if len(paths) <= keep:
        return
    for path in paths:
        if path not in scores:
            scores[path] = _score_of(path)
    best = max(paths, key=lambda path: scores[path])
    for path in paths[:-keep]:
        if path != best or scores[path] == -math.inf:
            shutil.rmtree(path, ignore_errors=True)
            del scores[path]


def _score_of(path: Path) -> float:
    """Return a checkpoint's mean score over the hospitals; minus infinity where none may be shown or read."""
    try:
        state = json.loads((path / "state.json").read_text())
        return mean_score(RoundResult.model_validate(state["result"]))
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


def mean_score(result: RoundResult) -> float:
    """Return the mean Dice, or AUC, over hospitals whose figure may be shown; minus infinity where there is none.

    Nor is there one where a hospital did not score the weights, for it would be a mean of other hospitals.
    """
    if result.lacks_scores:
        return -math.inf
    for name in HEADLINES:
        values = [metrics[name].value for metrics in result.metrics.values() if name in metrics]
        shown = [value for value in values if value is not None and not math.isnan(value)]
        if shown:
            return sum(shown) / len(shown)
    return -math.inf


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint and check every file against the manifest.

    Raises:
      StorageError: a file is missing or does not match its checksum.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        contents = {name: (path / name).read_bytes() for name in ("weights.safetensors", "state.json")}
        damaged = [name for name, content in contents.items() if manifest.get(name) != sha256(content)]
        if damaged:
            raise StorageError(f"checkpoint {path.name!r}: {damaged[0]} does not match its checksum")
        tensors = load(contents["weights.safetensors"])
        state = json.loads(contents["state.json"])
        result = RoundResult.model_validate(state["result"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"checkpoint {path.name!r} cannot be read: {type(error).__name__}") from None
    server = {name.removeprefix(_SERVER): value for name, value in tensors.items() if name.startswith(_SERVER)}
    return Checkpoint(int(state["round"]), tensors["weights"], server, result)


def last_good_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that reads whole, and a sentence for each newer one that does not."""
    problems: list[str] = []
    for path in sorted(folder.glob("round-*"), reverse=True):
        try:
            return load_checkpoint(path), problems
        except StorageError as error:
            problems.append(str(error))
    return None, problems


def best_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint with the best mean score, the first of equals; None where none may show or be read."""
    best: Checkpoint | None = None
    for path in sorted(folder.glob("round-*")):
        try:
            found = load_checkpoint(path)
        except StorageError:
            continue
        score = mean_score(found.result)
        if score > (mean_score(best.result) if best is not None else -math.inf):
            best = found
    return best
