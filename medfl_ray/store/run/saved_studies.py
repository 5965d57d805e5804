"""Finished pieces of what follows a run's rounds, a JSON file each, with a model's weights beside it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from medfl_ray.params import checksum
from medfl_ray.store.durable import replace_file
from medfl_ray.study_records import SavedResult

WEIGHTS = "weights_checksum"


class SavedStudies:
    """A folder of pieces; one that a crash has left half-written is as if it were not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str) -> SavedResult | None:
        """Return a piece, or None where it is not there, does not read whole, or its weights are not its own."""
        try:
            document = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
            expected = document.pop(WEIGHTS, None)
            if expected is None:
                return SavedResult(document)
            weights = load((self._folder / f"{name}.safetensors").read_bytes())["weights"]
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
            return None
        return SavedResult(document, weights) if checksum(weights) == expected else None

    def save(self, name: str, piece: SavedResult) -> None:
        """Keep a piece, its weights first: a document vouches for what lies beside it.

        Raises:
          StorageError: the disk is full or the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        document = dict(piece.document)
        if piece.weights is not None:
            replace_file(self._folder / f"{name}.safetensors", save({"weights": piece.weights}))
            document[WEIGHTS] = checksum(piece.weights)
        replace_file(self._folder / f"{name}.json", json.dumps(document, indent=1).encode())
