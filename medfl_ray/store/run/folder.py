"""The folder of one run: configuration, checkpoints, metrics, receipts and final results."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.numpy import save

from medfl_ray.config.evaluation import EvaluationConfig
from medfl_ray.config.files import dump_yaml, load_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import budget_hash
from medfl_ray.errors import ConfigError, StorageError
from medfl_ray.failpoints import failpoint
from medfl_ray.messages import (
    ClientFailure,
    HospitalInfo,
    Message,
    Receipt,
    RoundPlan,
    RoundResult,
    SignedReceipt,
    SiteEvaluation,
)
from medfl_ray.params import Layout, Vector, to_tensors
from medfl_ray.round_times import clock_of, has_secret_cohorts, round_file_times, stamp
from medfl_ray.store.durable import append_line, replace_file
from medfl_ray.store.run.checkpoints import Checkpoint, best_checkpoint, last_good_checkpoint, save_checkpoint
from medfl_ray.store.run.journal import OpenAttempt, RoundJournal
from medfl_ray.store.run.receipts import FIRST, read_receipts, receipt_hash, sign_receipt, verify_receipts
from medfl_ray.store.run.saved_studies import SavedStudies
from medfl_ray.store.signing_key import SigningKey, create_key, load_key
from medfl_ray.store.state_folders import FEDERATION_FOLDER

RECEIPTS = "receipts.jsonl"
KEY_NAME = "coordinator.key"
WHILE = {"open": "being planned", "collecting": "collecting updates", "aggregated": "being published"}


class RunFolder:
    """Everything that a run leaves behind, and from which it resumes."""

    def __init__(self, path: Path, run: RunConfig, key_folder: Path | None = None) -> None:
        """Take the run's folder; `key_folder` holds the key that signs receipts, in the run's folder when absent."""
        self.path = path
        self.run = run
        self.problems: list[str] = []
        self._key_path = (key_folder or path / FEDERATION_FOLDER) / KEY_NAME
        self._journal = RoundJournal(path)
        self._last_receipt: str | None = None
        self._checkpoint_scores: dict[Path, float] = {}

    @classmethod
    def create(cls, run: RunConfig) -> RunFolder:
        """Make runs/<time>-<name>/ with the resolved configuration in it.

        Raises:
          StorageError: the folder cannot be made or written.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        directory = run.output.directory.expanduser()
        path = directory / f"{stamp}-{run.name}"
        for number in range(2, 100):
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                path = directory / f"{stamp}-{run.name}-{number}"
            except OSError as error:
                raise StorageError(
                    f"cannot make a folder under output.directory {run.output.directory.name!r}: {error.strerror}. "
                    "Choose a folder that you may write to."
                ) from None
        replace_file(path / "config.yaml", dump_yaml(run).encode())
        replace_file(path / "job", path.name.encode())
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
          StorageError: another process is running it.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise StorageError(
                    f"another process is running {self.path.name!r}; two at once would overwrite each other's "
                    "checkpoints. Wait until it ends, or end it"
                ) from None
            yield

    def close(self) -> None:
        """Let go of the files that are held open; of a run with secret cohorts the files' times are rounded up."""
        self._journal.dispose()
        if has_secret_cohorts(self.run) and self.path.is_dir():
            round_file_times([*self.path.rglob("*"), self.path])

    def discard_if_unused(self) -> None:
        """Remove the folder of a run that ended before its first attempt: nothing was trained, charged or kept."""
        if not (self.path / "attempt").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def job(self) -> str:
        """Name under which the run is charged in the ledgers; the folder may be renamed afterwards."""
        kept = self.path / "job"
        return kept.read_text().strip() if kept.is_file() else self.path.resolve().name  # also for --resume .

    def next_attempt(self) -> int:
        """Return a number that no earlier attempt of this run has used, durably."""
        path = self.path / "attempt"
        try:
            number = int(path.read_text()) + 1 if path.is_file() else 1
        except ValueError:
            raise StorageError(
                f"the file 'attempt' of {self.path.name!r} holds no number, so that this attempt could be taken for an "
                "earlier one; write a number above that of any line of receipts.jsonl into it"
            ) from None
        replace_file(path, str(number).encode())
        return number

    def resume(self) -> Checkpoint | None:
        """Return the last good checkpoint; what a crash left half-written is completed, and `problems` say what."""
        checkpoint, damaged = last_good_checkpoint(self.path / "checkpoints")
        if checkpoint is None and damaged:
            raise StorageError(
                f"none of the {len(damaged)} checkpoints of {self.path.name!r} can be read ({damaged[0]}). "
                "Restore one from a backup, or start a new run from its config.yaml"
            )
        self.problems = [f"{problem}; the checkpoint before it is used" for problem in damaged]
        results, receipts = self.results(), self.signed_receipts()
        self._refuse_other_budget(receipts)
        kept = {(result.round, result.receipt.attempt) for result in results}
        found = checkpoint.result if checkpoint is not None else None
        if found is not None and (found.round, found.receipt.attempt) not in kept:
            results.append(found)
            append_line(self.path / "metrics.jsonl", found.model_dump_json())
        self._complete_receipts(results, receipts)
        closed = {(result.round, result.receipt.attempt): result.receipt for result in results}
        for attempt in self._journal.unfinished():
            self._close(attempt, found, closed)
        return checkpoint

    def _refuse_other_budget(self, receipts: Sequence[Receipt]) -> None:
        """A budget or delta that is changed between two attempts would make what was spent before look cheaper."""
        known = {receipt.budget_hash for receipt in receipts} - {""}
        if known and budget_hash(self.run) not in known:
            raise ConfigError(
                f"config.yaml of {self.path.name!r} has another privacy section, or declares other hospitals, than "
                "its last round was run with; restore it, or start a new run from the changed file"
            )

    def _complete_receipts(self, results: Sequence[RoundResult], receipts: Sequence[Receipt]) -> None:
        """Write the receipts that a crash between metrics.jsonl and receipts.jsonl left out."""
        written = {(receipt.round, receipt.attempt) for receipt in receipts}
        for result in results:
            if (result.round, result.receipt.attempt) not in written:
                self._append_receipt(result.receipt)

    def _close(self, attempt: OpenAttempt, last: RoundResult | None, closed: Mapping[tuple[int, int], Receipt]) -> None:
        """Close an attempt that a crash interrupted: published where its checkpoint is there, else abandoned."""
        plan = attempt.plan
        if last is not None and (last.round, last.receipt.attempt) == (plan.round, plan.attempt):
            self._journal.move(plan, "published", last.receipt.weights_after)
            return
        receipt = closed.get((plan.round, plan.attempt))
        if receipt is None:
            self.record(interrupted_round(attempt))
            self.problems.append(
                f"round {plan.round} was interrupted while {WHILE[attempt.state]} (attempt {plan.attempt}, "
                f"{len(attempt.delivered)} updates had arrived) and is repeated; what it has charged stays charged"
            )
        else:
            self._journal.close(receipt)

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

    @property
    def saved(self) -> SavedStudies:
        """Finished baselines and studies."""
        return SavedStudies(self.path / "pieces")

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the best mean score over hospitals; None where none may show one."""
        return best_checkpoint(self.path / "checkpoints")

    def receipts(self) -> list[Receipt]:
        """Return the receipts of the rounds kept so far, in order."""
        return [result.receipt for result in self.results()]

    def signed_receipts(self) -> list[SignedReceipt]:
        """Return the receipts as they were signed, checked; those of a version that did not sign are not.

        Raises:
          ReceiptError: one was changed or left out.
        """
        receipts, _ = read_receipts(self.path / RECEIPTS)
        if any(receipt.signature for receipt in receipts):
            verify_receipts(receipts)
        return receipts

    def open_round(self, plan: RoundPlan) -> None:
        """Note a plan before anything is reserved for it."""
        self._journal.open(plan)

    def start_collecting(self, plan: RoundPlan) -> None:
        """Note that hospitals are being asked to train."""
        self._journal.move(plan, "collecting")

    def note_delivered(self, plan: RoundPlan, hospitals: Sequence[str]) -> None:
        """Note whose updates are in the sum; each hospital's once."""
        self._journal.deliver(plan, hospitals)

    def note_aggregated(self, plan: RoundPlan, weights_after: str) -> None:
        """Note the checksum of the weights that the round has led to."""
        self._journal.move(plan, "aggregated", weights_after)

    def save_checkpoint(self, state: Any, result: RoundResult) -> None:
        """Make a round durable, which publishes it; `state` has round, weights and server_state."""
        checkpoint = Checkpoint(state.round, state.weights, state.server_state, result)
        keep = self.run.output.keep_checkpoints
        save_checkpoint(self.path / "checkpoints", checkpoint, keep, self._checkpoint_scores)
        if result.receipt.secret_cohort:
            round_file_times([*(self.path / "checkpoints").rglob("*"), self.path / "checkpoints"])

    def record(self, result: RoundResult) -> None:
        """Append a closed round to metrics.jsonl and, signed, to receipts.jsonl."""
        append_line(self.path / "metrics.jsonl", result.model_dump_json())
        failpoint("record.metrics")
        self._append_receipt(result.receipt)
        self._journal.close(result.receipt)
        if result.receipt.secret_cohort:
            round_file_times(self.path.iterdir())

    def _append_receipt(self, receipt: Receipt) -> None:
        if self._last_receipt is None:
            earlier, _ = read_receipts(self.path / RECEIPTS)
            self._last_receipt = receipt_hash(earlier[-1]) if earlier else FIRST
        signed, digest = sign_receipt(receipt, self._last_receipt, self._key)
        append_line(self.path / RECEIPTS, signed.model_dump_json())
        self._last_receipt = digest

    @cached_property
    def _key(self) -> SigningKey:
        if self._key_path.exists():
            return load_key(self._key_path)
        self._key_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return create_key(self._key_path)

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

    def save_evaluation(self, evaluation: EvaluationConfig) -> None:
        """Write into config.yaml which studies are done of a run, where more are asked for after its end."""
        self.run = self.run.model_copy(update={"evaluation": evaluation})
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
        # Sorted: who is first to answer may be whose data an earlier round has loaded.
        evaluations = sorted(evaluations, key=lambda evaluation: evaluation.hospital)
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
            in_order = sorted(failures, key=lambda failure: (failure.hospital, failure.round))
            self.save_json("failures.json", [failure.model_dump(mode="json") for failure in in_order])

    def save_baselines(self, document: Mapping[str, object]) -> None:
        """Write baselines.json."""
        self.save_json("baselines.json", document)

    def save_ledgers(self, ledgers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write ledger.json, an export of each hospital's account."""
        self.save_json("ledger.json", dict(ledgers))

    def save_record(self, name: str, record: Message) -> None:
        """Write a record into a JSON file of the run."""
        self.save_json(name, record.model_dump(mode="json"))

    def save_json(self, name: str, document: object) -> None:
        """Replace a JSON file of the run."""
        replace_file(self.path / name, json.dumps(document, indent=1).encode())


def interrupted_round(attempt: OpenAttempt) -> RoundResult:
    """Return the record of an attempt that the run's end left open: nothing published, its charges stay."""
    plan = attempt.plan
    receipt = Receipt(
        **plan.receipt_fields,
        trained=attempt.delivered,
        failures=(),
        update_hashes={},
        spent={},
        weights_after=None,
        published=False,
        ended_at=stamp(clock_of(not plan.hospitals)()),
        secret_cohort=not plan.hospitals,
        reason=f"the run ended while the round was {WHILE[attempt.state]}",
    )
    return RoundResult(round=plan.round, receipt=receipt, metrics={}, duration_s=0.0)
