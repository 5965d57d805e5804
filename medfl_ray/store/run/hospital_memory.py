"""What a hospital remembers from round to round, in its own folder; training/rules/client_rules.py says what.

A file per round, written whole or not at all. A round starts from the newest file of an earlier round, so that one
that is interrupted, given up or repeated starts from what it started from the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from medfl_ray.errors import StorageError
from medfl_ray.params import Vector
from medfl_ray.store.durable import replace_file

FOLDER = "memory"


class HospitalMemory:
    """The memory of one hospital in one run."""

    def __init__(self, folder: Path, job: str, keep: int) -> None:
        """Take the hospital's own folder, the run's job, and from how many rounds back a run may be resumed.

        Args:
          keep: checkpoints that a run keeps.
        """
        self._folder = folder / FOLDER / job
        self._keep = keep

    def before(self, round: int) -> Mapping[str, Vector]:
        """Return what the hospital knew before a round; nothing before its first.

        Raises:
          StorageError: the file cannot be read.
        """
        earlier = [number for number in self._rounds() if number < round]
        if not earlier:
            return {}
        path = self._path(max(earlier))
        try:
            return load(path.read_bytes())
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise StorageError(
                f"the hospital's memory of round {max(earlier)} cannot be read ({type(error).__name__}); restore "
                f"{path.name!r} in its state folder from a backup, or remove it to go on from the round before"
            ) from None

    def save(self, round: int, memory: Mapping[str, Vector]) -> None:
        """Keep what the hospital knows after a round; what no checkpoint can lead back to is forgotten.

        Raises:
          StorageError: the disk is full or the folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"cannot make the folder of the hospital's memory: {error.strerror or type(error).__name__}"
            ) from None
        replace_file(self._path(round), save(dict(memory)), private=True)
        numbers = self._rounds()
        # A run that was set back to an earlier checkpoint repeats its rounds: what came after them then is void.
        void = [number for number in numbers if number > round]
        needed = max((number for number in numbers if number <= round - self._keep), default=0)
        for number in (*void, *(number for number in numbers if number < needed)):
            self._path(number).unlink(missing_ok=True)

    def forget_from(self, round: int) -> None:
        """Forget a round that is planned anew, and those after it: what came of an earlier attempt is void."""
        for number in self._rounds():
            if number >= round:
                self._path(number).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self._folder / f"round-{round:05d}.safetensors"

    def _rounds(self) -> list[int]:
        names = [path.stem.removeprefix("round-") for path in self._folder.glob("round-*.safetensors")]
        return sorted(int(name) for name in names if name.isdecimal())
