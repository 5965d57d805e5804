"""Which models a hospital has scored on private patients, in its own state folder: each purpose of a run, one model.

The scores stay at the hospital. A coordinator that could have any number of models scored would learn from how long
that takes, and so each purpose is scored once, whatever is asked and however often.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import structlog

from medfl_ray.errors import StorageError
from medfl_ray.store.durable import replace_file

FILE, STEPS_FILE = "scored_models.json", "answer_steps.json"
MAX_DOUBLINGS = 40
"""More than any work takes; a larger number in the file is none that was written here."""
log = structlog.get_logger()
Record = dict[str, dict[str, dict[str, object]]]


class ScoredModels:
    """The record of one hospital in one run."""

    def __init__(self, folder: Path, job: str) -> None:
        """Take the hospital's state folder, which is there, and the run's job."""
        self._file, self._job = folder / FILE, job

    def admit(self, purpose: str, checksum: str) -> bool:
        """Note durably, before it is scored, that a model is scored for a purpose.

        Args:
          purpose: what the run scores the model for, as "final".
          checksum: of the model's weights.

        Returns:
          False where another model was scored for the purpose, or this one to the end.

        Raises:
          StorageError: the record cannot be read or written.
        """
        earlier = self._read().get(self._job, {}).get(purpose)
        if earlier is not None:
            return earlier == {"checksum": checksum, "done": False}
        self._write(purpose, checksum, done=False)
        return True

    def finish(self, purpose: str, checksum: str) -> None:
        """Note that the model was scored to the end; before that, a crash leaves it to be scored again.

        Raises:
          StorageError: the record cannot be read or written.
        """
        self._write(purpose, checksum, done=True)

    def _write(self, purpose: str, checksum: str, done: bool) -> None:
        record = self._read()
        record.setdefault(self._job, {})[purpose] = {"checksum": checksum, "done": done}
        replace_file(self._file, json.dumps(record, indent=1).encode(), private=True)

    def _read(self) -> Record:
        if not self._file.exists():
            return {}
        try:
            record: Record = json.loads(self._file.read_text(encoding="utf-8"))
            return {job: dict(scored) for job, scored in record.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise StorageError(
                f"{FILE!r} in the hospital's state folder cannot be read ({type(error).__name__}); remove it, and the "
                "models of each run may be scored once more"
            ) from None


class AnswerSteps(MutableMapping[str, int]):
    """How often the step of each kind of private answer was doubled, for good: see federation/answer_times.py.

    Where the file cannot be read or written, what is known stays in memory: the record must never decide over an
    answer, for whether it is written depends on how long the work took.
    """

    def __init__(self, folder: Path) -> None:
        """Take the hospital's state folder, which is there."""
        self._file = folder / STEPS_FILE
        self._known: dict[str, int] = {}
        try:
            raw = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
            counts = {str(kind): int(count) for kind, count in raw.items()}
            self._known = {kind: min(max(count, 0), MAX_DOUBLINGS) for kind, count in counts.items()}
        except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
            log.error("answer_steps_cannot_be_read", problem=type(error).__name__)

    def __getitem__(self, kind: str) -> int:
        return self._known[kind]

    def __setitem__(self, kind: str, doublings: int) -> None:
        self._known[kind] = min(doublings, MAX_DOUBLINGS)
        self._write()

    def __delitem__(self, kind: str) -> None:
        del self._known[kind]
        self._write()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def _write(self) -> None:
        try:
            replace_file(self._file, json.dumps(self._known).encode(), private=True)
        except (StorageError, OSError) as error:
            log.error("answer_steps_cannot_be_written", problem=str(error))
