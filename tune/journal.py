"""The durable record of a search's trials: one line when a trial starts, one when it ends. A resume reads nothing else.

Ray keeps a state of its own, in pickles; it is not used again once the search's process has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfl_ray.errors import StorageError
from medfl_ray.store.durable import append_line
from tune.pareto import Point
from tune.space import Value

JOURNAL = "trials.jsonl"
RESULT = "result.json"
State = Literal["started", "finished", "stopped", "failed"]


class Result(BaseModel):
    """What a trial came to. epsilon and size_bytes are those of its whole run, also where it was stopped early.

    spent: the largest epsilon that its own charges alone amount to at a hospital (patient, add/remove). In JSON an
    infinite one is the string "Infinity".
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    epsilon: float
    dice: float
    low: float
    high: float
    size_bytes: float
    rounds: int
    spent: float
    seconds: float = 0.0


class Trial(BaseModel):
    """One line of the journal: what is known of a trial at its start or end."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    number: int
    state: State
    parameters: dict[str, Value]
    result: Result | None = None
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state != "started"


class Journal:
    """The trials of a search, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, trial: Trial) -> None:
        """Write a line and flush it to the disk.

        Raises:
          StorageError: the file cannot be written.
        """
        append_line(self.folder / JOURNAL, trial.model_dump_json())

    def trials(self) -> list[Trial]:
        """Return the last word on every trial, by number; a torn last line is what a crash leaves, and passed over.

        Raises:
          StorageError: a line in the middle is damaged.
        """
        return list(self._by_number(self.lines()).values())

    def lines(self) -> list[Trial]:
        """Return every line."""
        path = self.folder / JOURNAL
        texts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found = []
        for number, text in enumerate(texts, start=1):
            try:
                found.append(Trial.model_validate_json(text))
            except ValidationError:
                if number < len(texts):
                    raise StorageError(
                        f"line {number} of {JOURNAL} of the search {self.folder.name!r} is damaged; restore the file "
                        "or start a new search"
                    ) from None
        return found

    @staticmethod
    def _by_number(lines: Iterable[Trial]) -> dict[int, Trial]:
        known: dict[int, Trial] = {}
        for line in lines:
            known[line.number] = line
        return dict(sorted(known.items()))

    def trial_folder(self, number: int) -> Path:
        """Return where a trial's run lies."""
        return trial_folder(self.folder, number)


def trial_folder(folder: Path, number: int) -> Path:
    """Return where a trial's run lies."""
    return folder / "trials" / f"{number:03d}"


def points(trials: Sequence[Trial]) -> list[Point]:
    """Return the finished trials as points; one that was stopped early has no final score."""
    return [
        Point(t.number, t.result.epsilon, t.result.dice, t.result.size_bytes, t.result.low, t.result.high)
        for t in trials
        if t.state == "finished" and t.result is not None
    ]
