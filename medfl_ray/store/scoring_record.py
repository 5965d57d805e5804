"""Which models a hospital has scored on private patients, in its own state folder: each purpose of a run, one model.

The scores stay at the hospital. A coordinator that could have any number of models scored would learn from how long
that takes, and so each purpose is scored once, whatever is asked and however often.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from medfl_ray.errors import CheckpointError
from medfl_ray.store.durable import replace_file

FILE, STEPS_FILE = "scored_models.json", "answer_steps.json"
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
          CheckpointError: the record cannot be read or written.
        """
        earlier = self._read().get(self._job, {}).get(purpose)
        if earlier is not None:
            return earlier == {"checksum": checksum, "done": False}
        self._write(purpose, checksum, done=False)
        return True

    def finish(self, purpose: str, checksum: str) -> None:
        """Note that the model was scored to the end; before that, a crash leaves it to be scored again.

        Raises:
          CheckpointError: the record cannot be read or written.
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
            raise CheckpointError(
                f"{FILE!r} in the hospital's state folder cannot be read ({type(error).__name__}); remove it, and the "
                "models of each run may be scored once more"
            ) from None


class AnswerSteps(MutableMapping[str, int]):
    """How often the step of each kind of private answer was doubled, for good: see federation/answer_times.py."""

    def __init__(self, folder: Path) -> None:
        """Take the hospital's state folder, which is there."""
        self._file = folder / STEPS_FILE

    def __getitem__(self, kind: str) -> int:
        return self._read()[kind]

    def __setitem__(self, kind: str, doublings: int) -> None:
        replace_file(self._file, json.dumps({**self._read(), kind: doublings}).encode(), private=True)

    def __delitem__(self, kind: str) -> None:
        left = {other: count for other, count in self._read().items() if other != kind}
        replace_file(self._file, json.dumps(left).encode(), private=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, int]:
        if not self._file.exists():
            return {}
        try:
            return {str(kind): int(count) for kind, count in json.loads(self._file.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{STEPS_FILE!r} in the hospital's state folder cannot be read ({type(error).__name__}); restore it "
                "from a backup"
            ) from None
