"""What goes to and from virtual hospitals: who trains in which group, who is scored, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from medfl_ray.config.run import RunConfig
from medfl_ray.federation.ports import SummedUpdates
from medfl_ray.messages import ClientFailure, ClientUpdate, Mechanism
from medfl_ray.params import Vector
from medfl_ray.store.run.hospital_memory import HospitalMemory


class VirtualData(Protocol):
    """One hospital's data as `medfl_ray.training.local_data.LocalData`, and what names its network's channels."""

    @property
    def channels(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Mapping[int, str]: ...


OpenData = Callable[[RunConfig, str], Any]
"""(run, name of a hospital) to its data; importable, or picklable as it is."""


@dataclass(frozen=True)
class Memories:
    """Where virtual hospitals keep what they remember of a run: a folder for each; without one they remember nothing.

    `keep` is the number of checkpoints that the run keeps.
    """

    folder: Path | None = None
    job: str = ""
    keep: int = 1

    def before(self, round: int, hospital: str) -> Mapping[str, Vector]:
        """Return what a hospital knew before a round."""
        return {} if self.folder is None else self._of(self.folder, hospital).before(round)

    def save(self, round: int, hospital: str, memory: Mapping[str, Vector]) -> None:
        """Keep what a hospital knows after a round; of a warm-up, round 0, nothing is kept."""
        if self.folder is not None and round > 0:
            self._of(self.folder, hospital).save(round, memory)

    def forget_from(self, round: int, hospital: str) -> None:
        """Forget what an earlier attempt at a round, or at a later one, has left at a hospital."""
        if self.folder is not None:
            self._of(self.folder, hospital).forget_from(round)

    def _of(self, folder: Path, hospital: str) -> HospitalMemory:
        return HospitalMemory(folder / hospital, self.job, self.keep)


@dataclass(frozen=True)
class HospitalTurn:
    """What one hospital of a group does in a round; `index` is its place in the run, `weight` that of its update."""

    hospital: str
    index: int
    weight: int
    num_steps: int
    mechanism: Mechanism | None = None


@dataclass(frozen=True)
class Assignment:
    """Groups of at most `group_size` hospitals for one process, and what their round has in common.

    With `streamed` every update comes back on its own, for rules that need each of them.
    """

    round: int
    attempt: int
    learning_rate: float
    clip_norm: float | None
    streamed: bool
    group_size: int
    groups: tuple[tuple[HospitalTurn, ...], ...]

    @property
    def hospitals(self) -> tuple[str, ...]:
        """Names of all hospitals of the groups."""
        return tuple(turn.hospital for group in self.groups for turn in group)

    def apart(self, singly: bool) -> list[Assignment]:
        """Return one assignment for each group, or for each hospital; alone it trains to other last bits."""
        groups = [(turn,) for group in self.groups for turn in group] if singly else self.groups
        return [replace(self, groups=(group,)) for group in groups]


@dataclass(frozen=True)
class EvaluationJob:
    """Hospitals whose held-out patients are scored; the first `num_pictures` also draw pictures."""

    round: int
    hospitals: tuple[str, ...]
    num_pictures: int = 0


@dataclass(frozen=True, eq=False)
class AssignmentResult:
    """What an assignment came to: one sum, or the single updates, and who failed."""

    total: SummedUpdates | None
    updates: tuple[ClientUpdate, ...]
    failures: tuple[ClientFailure, ...]
    seconds: Mapping[str, float]


class TimedData:
    """A hospital's data, with the time that drawing patches takes added to a total."""

    def __init__(self, data: Any, seconds: dict[str, float]) -> None:
        self._data, self._seconds = data, seconds
        self.num_train_patients: int = data.num_train_patients

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def train_patches(self, patient_index: int, num_patches: int, rng: Any) -> Any:
        """Draw patches of one patient; see `LocalData`."""
        started = time.perf_counter()
        drawn = self._data.train_patches(patient_index, num_patches, rng)
        self._seconds["data"] += time.perf_counter() - started
        return drawn
