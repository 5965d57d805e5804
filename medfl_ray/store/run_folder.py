"""The folder of one run: configuration, checkpoints, metrics, receipts and final results."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.numpy import save

from medfl_ray.config import RunConfig
from medfl_ray.config_files import dump_yaml, load_run_config
from medfl_ray.errors import CheckpointError, ConfigError
from medfl_ray.messages import ClientFailure, HospitalInfo, RoundResult, SiteEvaluation
from medfl_ray.params import Layout, Vector, to_tensors
from medfl_ray.store.checkpoints import Checkpoint, last_good_checkpoint, save_checkpoint
from medfl_ray.store.durable import append_line, replace_file


class RunFolder:
    """Everything that a run leaves behind, and from which it resumes."""

    def __init__(self, path: Path, run: RunConfig) -> None:
        self.path = path
        self.run = run
        self.problems: list[str] = []

    @classmethod
    def create(cls, run: RunConfig) -> RunFolder:
        """Make runs/<time>-<name>/ with the resolved configuration in it.

        Raises:
          CheckpointError: the folder cannot be made or written.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        path = run.output.directory / f"{stamp}-{run.name}"
        for number in range(2, 100):
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                path = run.output.directory / f"{stamp}-{run.name}-{number}"
            except OSError as error:
                raise CheckpointError(
                    f"cannot make a folder under output.directory {run.output.directory.name!r}: {error.strerror}. "
                    "Choose a folder that you may write to."
                ) from None
        replace_file(path / "config.yaml", dump_yaml(run).encode())
        return cls(path, run)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run.

        Raises:
          ConfigError: the folder is not a run's.
        """
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path.name!r} is not the folder of a run: it has no config.yaml")
        return cls(path, load_run_config(path / "config.yaml"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of it when the process ends, however it ends.

        Raises:
          CheckpointError: another process is running it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise CheckpointError(
                    f"another process is running {self.path.name!r}; two at once would overwrite each other's "
                    "checkpoints. Wait until it ends, or end it"
                ) from None
            yield

    def discard_if_unused(self) -> None:
        """Remove the folder of a run that ended before its first attempt: nothing was trained, charged or kept."""
        if not (self.path / "attempt").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def job(self) -> str:
        """Name under which the run is charged in the ledgers."""
        return self.path.resolve().name  # also for --resume .

    def next_attempt(self) -> int:
        """Return a number that no earlier attempt of this run has used, durably."""
        path = self.path / "attempt"
        try:
            number = int(path.read_text()) + 1 if path.is_file() else 1
        except ValueError:
            raise CheckpointError(
                f"the file 'attempt' of {self.path.name!r} holds no number, so that this attempt could be taken for an "
                "earlier one; write a number above that of any line of receipts.jsonl into it"
            ) from None
        replace_file(path, str(number).encode())
        return number

    def resume(self) -> Checkpoint | None:
        """Return the last good checkpoint; metrics and receipts are completed from it after a crash in between."""
        checkpoint, self.problems = last_good_checkpoint(self.path / "checkpoints")
        if checkpoint is None and self.problems:
            raise CheckpointError(
                f"none of the {len(self.problems)} checkpoints of {self.path.name!r} can be read ({self.problems[0]}). "
                "Restore one from a backup, or start a new run from its config.yaml"
            )
        if checkpoint is not None and checkpoint.round not in {r.round for r in self.results() if r.receipt.published}:
            self.record(checkpoint.result)
        return checkpoint

    def results(self) -> list[RoundResult]:
        """Return the closed rounds; a torn last line is passed over."""
        path = self.path / "metrics.jsonl"
        results = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                results.append(RoundResult.model_validate_json(line))
            except ValidationError:
                self.problems.append("metrics.jsonl holds a line that cannot be read; it is passed over")
        return results

    def trained_so_far(self) -> set[str]:
        """Return the hospitals that delivered an update in the rounds kept so far."""
        return {hospital for result in self.results() for hospital in result.receipt.trained}

    def asked_so_far(self) -> set[str]:
        """Return the hospitals that were asked in the rounds kept so far."""
        return {hospital for result in self.results() for hospital in result.receipt.asked}

    def save_checkpoint(self, state: Any, result: RoundResult) -> None:
        """Make a published round durable; `state` has round, weights and server_state."""
        checkpoint = Checkpoint(state.round, state.weights, state.server_state, result)
        save_checkpoint(self.path / "checkpoints", checkpoint, self.run.output.keep_checkpoints)

    def record(self, result: RoundResult) -> None:
        """Append a closed round to metrics.jsonl and receipts.jsonl."""
        append_line(self.path / "metrics.jsonl", result.model_dump_json())
        append_line(self.path / "receipts.jsonl", result.receipt.model_dump_json())

    def save_hospitals(self, infos: Sequence[HospitalInfo], failures: Sequence[ClientFailure]) -> None:
        """Write hospitals.json and, where a hospital could not start, failures.json."""
        self.save_json("hospitals.json", {info.hospital: info.model_dump(mode="json") for info in infos})
        self._save_failures(failures)

    def save_group_sizes(self, sizes: Mapping[str, int], hospitals_per_group: int | None = None) -> None:
        """Write into config.yaml how many patients each hospital, and how many hospitals a simulation computes at
        once, so that a resume reuses it."""
        before = self.run.training
        measured = {**before.measured_group_sizes, **sizes}
        per_group = hospitals_per_group or before.hospitals_per_group
        if (measured, per_group) != (before.measured_group_sizes, before.hospitals_per_group):
            training = before.model_copy(update={"measured_group_sizes": measured, "hospitals_per_group": per_group})
            self.run = self.run.model_copy(update={"training": training})
            replace_file(self.path / "config.yaml", dump_yaml(self.run).encode())

    def save_final(
        self,
        weights: Vector,
        layout: Layout,
        evaluations: Sequence[SiteEvaluation],
        failures: Sequence[ClientFailure],
    ) -> None:
        """Write model.safetensors, evaluation.json, failures.json and the pictures."""
        replace_file(self.path / "model.safetensors", save(to_tensors(weights, layout)))
        plain = {e.hospital: e.model_dump(mode="json", exclude={"pictures"}) for e in evaluations}
        self.save_json("evaluation.json", plain)
        self._save_failures(failures)
        pictures = self.path / "pictures"
        for evaluation in evaluations:
            for number, picture in enumerate(evaluation.pictures, start=1):
                pictures.mkdir(exist_ok=True)
                replace_file(pictures / f"{evaluation.hospital}-{number}.png", picture)

    def _save_failures(self, failures: Sequence[ClientFailure]) -> None:
        if failures:
            self.save_json("failures.json", [failure.model_dump(mode="json") for failure in failures])

    def save_baselines(self, document: Mapping[str, object]) -> None:
        """Write baselines.json."""
        self.save_json("baselines.json", document)

    def save_ledgers(self, ledgers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write ledger.json, an export of each hospital's account."""
        self.save_json("ledger.json", dict(ledgers))

    def save_json(self, name: str, document: object) -> None:
        """Replace a JSON file of the run."""
        replace_file(self.path / name, json.dumps(document, indent=1).encode())
