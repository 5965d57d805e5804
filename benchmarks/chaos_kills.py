"""Killing the coordinator's process at every named point of a round, resuming it, and judging what is left.

Each victim is a fork of this process, in which everything is imported already: a run of three hospitals in one
process, so that a kill takes coordinator and hospitals alike.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from medfl_ray import params
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.config.files import parse_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ReceiptError
from medfl_ray.federation.hospital import Hospital
from medfl_ray.messages import RoundPlan
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import charges
from medfl_ray.store.run.checkpoints import last_good_checkpoint
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.receipts import read_receipts, verify_receipts
from medfl_ray.training.trainer import LocalJob

FAILPOINTS = (
    "round.opened",
    "ledger.reserve.committed",
    "round.reserved",
    "round.collecting",
    "ledger.settle.before_commit",
    "ledger.settle.committed",
    "round.update",
    "round.collected",
    "round.mirrored",
    "round.aggregated",
    "round.evaluated",
    "checkpoint.begin",
    "checkpoint.written",
    "checkpoint.manifest",
    "checkpoint.renamed",
    "checkpoint.pruned",
    "round.published",
    "record.metrics",
    "round.recorded",
)
NUM_ROUNDS = 5
PER_HOSPITAL = ("round.update", "ledger.reserve.committed", "ledger.settle.before_commit", "ledger.settle.committed")
NUM_HOSPITALS = 3
AT_ONCE = 2
VICTIM_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Killed:
    """What one kill and the resume after it have left.

    surplus: per hospital, attempts charged beyond the run's rounds, the largest; undercounted: whether a training is
    not charged. resume_s: from the resumed process's start to its first training; NaN where nothing was left to train.
    """

    failpoint: str
    passage: int
    private: bool
    undercounted: bool
    surplus: int
    lost_rounds: int
    resume_s: float
    checksum: str


def configure(private: bool, out: Path) -> RunConfig:
    """Return a run of three small hospitals that takes about a second."""
    privacy = {"enable_dp": True, "noise_multiplier": 20.0, "sample_rate": 0.5} if private else {"enable_dp": False}
    return parse_run_config(
        {
            "name": "chaos",
            "data": {
                "phantom": {
                    "preset": "balls",
                    "num_hospitals": NUM_HOSPITALS,
                    "patients_per_hospital": 6,
                    "size_voxels": 16,
                },
                "spatial_dims": 2,
            },
            "model": {"type": "unet2d", "features": [4, 8]},
            "training": {"batch_size": 2, "patch_size_voxels": 16, "patient_gradients": "single"},
            "federation": {"rounds": NUM_ROUNDS, "local_steps": 2, "pool": "local", "seed": 7},
            "privacy": privacy,
            "output": {"directory": str(out), "state_directory": str(out / "state"), "report": False, "export": False},
        }
    )


def policies_of(run: RunConfig) -> tuple[SitePolicy, ...]:
    """Return the hospitals, as private as real ones: their ledgers lie outside of the run's folder."""
    changes = {"declared": "private", "max_epsilon": 100.0} if run.privacy.enable_dp else {}
    return tuple(policy.model_copy(update=changes) for policy in list_hospitals(run))


def victim(folder: Path, trace: Path) -> None:
    """Run or resume the federation of a folder; each training's hospital, round and attempt go into a file before."""
    claim = Hospital._claim

    def traced(hospital: Hospital, plan: RoundPlan) -> LocalJob:
        job = claim(hospital, plan)
        with trace.open("a") as file:
            file.write(f"{hospital.id} {plan.round} {plan.attempt} {time.monotonic()}\n")
        return job

    Hospital._claim = traced  # type: ignore[method-assign]
    run = RunFolder.open(folder).run
    policies = policies_of(run)
    pool = local_pool(hospital_specs(run, policies, folder))
    run_in_process(run, policies, folder, pool, lambda event: None, threading.Event())


def fork_victim(folder: Path, trace: Path, failpoint: str | None) -> tuple[int, float]:
    """Run the victim in a fork of this process; return its exit status, negative for a signal, and when it began.

    Raises:
      TimeoutError: it hangs; it is killed.
    """
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.pop("MEDFL_FAILPOINT", None)
            if failpoint is not None:
                os.environ["MEDFL_FAILPOINT"] = failpoint
            victim(folder, trace)
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a fork never returns to its parent's code
            (folder / "victim.log").write_text(traceback.format_exc())
            os._exit(70)
    while time.monotonic() - began < VICTIM_TIMEOUT_S:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), began
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the victim at {failpoint} hung for {VICTIM_TIMEOUT_S:g} s")


def kill_and_resume(out: Path, private: bool, failpoint: str, count: int) -> Killed:
    """Kill a run at a passage of a failpoint, resume it, and judge.

    Raises:
      RuntimeError: the victim was not killed there, or did not end well when resumed, so that nothing was measured.
    """
    place = out / f"{'private' if private else 'plain'}-{failpoint}-{count}"
    place.mkdir(parents=True)
    folder, trace = RunFolder.create(configure(private, place)).path, place / "trace"
    passage = (count - 1) % NUM_ROUNDS + 1
    if failpoint in PER_HOSPITAL:  # a different hospital each time
        passage = (passage - 1) * NUM_HOSPITALS + count % NUM_HOSPITALS + 1
    status, _ = fork_victim(folder, trace, f"{failpoint}:{passage}")
    if status != -signal.SIGKILL:
        raise RuntimeError(f"the victim at {failpoint}, passage {passage}, ended with {status}, not with SIGKILL")
    before = len(_lines(trace))
    status, began = fork_victim(folder, trace, None)
    if status != 0:
        log = (folder / "victim.log").read_text() if (folder / "victim.log").exists() else ""
        raise RuntimeError(f"resumed after {failpoint}, passage {passage}, the run ended with {status}: {log[-1500:]}")
    resumed = _lines(trace)[before:]
    undercounted, surplus = judge_ledgers(folder, trace) if private else (False, 0)
    return Killed(
        failpoint=failpoint,
        passage=passage,
        private=private,
        undercounted=undercounted,
        surplus=surplus,
        lost_rounds=lost_rounds(folder),
        resume_s=float(resumed[0].split()[3]) - began if resumed else math.nan,
        checksum=weights_checksum(folder),
    )


def judge_ledgers(folder: Path, trace: Path) -> tuple[bool, int]:
    """Say whether a training is not charged, and how many attempts beyond its rounds a hospital is charged at most."""
    run = RunFolder.open(folder).run
    trained: dict[str, set[tuple[int, int]]] = {}
    for line in _lines(trace):
        hospital, number, attempt, _ = line.split()
        trained.setdefault(hospital, set()).add((int(number), int(attempt)))
    undercounted, surplus = False, 0
    for spec in hospital_specs(run, policies_of(run), folder):
        ledger = PrivacyLedger.open(
            spec.state_folder / "ledger.sqlite", spec.policy.hospital, spec.policy.data_set, 1e-5, None
        )
        charged = {(event.round, event.attempt) for event in charges(ledger.events())}
        undercounted |= not trained.get(spec.policy.hospital, set()) <= charged
        surplus = max(surplus, len(charged) - NUM_ROUNDS)
    return undercounted, surplus


def lost_rounds(folder: Path) -> int:
    """Return how many rounds the receipts lack, or all where they do not verify."""
    receipts, _ = read_receipts(folder / "receipts.jsonl")
    try:
        verify_receipts(receipts)
    except ReceiptError:
        return NUM_ROUNDS
    published = [receipt.round for receipt in receipts if receipt.published]
    return NUM_ROUNDS - len(set(published)) + len(published) - len(set(published))


def weights_checksum(folder: Path) -> str:
    """Return the checksum of the last checkpoint's weights."""
    checkpoint, _ = last_good_checkpoint(folder / "checkpoints")
    return params.checksum(checkpoint.weights) if checkpoint is not None else ""


def gc_frozen(out: Path, private: bool) -> tuple[str, float]:
    """Return the weights' checksum of a run that nobody kills, and its seconds from start to first training."""
    place = out / f"{'private' if private else 'plain'}-gc_frozen"
    place.mkdir(parents=True)
    folder, trace = RunFolder.create(configure(private, place)).path, place / "trace"
    status, began = fork_victim(folder, trace, None)
    if status != 0:
        raise RuntimeError(f"a run that nobody killed ended with {status}: {(folder / 'victim.log').read_text()}")
    return weights_checksum(folder), float(_lines(trace)[0].split()[3]) - began


def kill_everywhere(out: Path, repeats: int, failpoints: tuple[str, ...] = FAILPOINTS) -> dict[str, float]:
    """Kill at every failpoint so many times, private and plain, and return the figures."""
    warm_up(out / "warm")
    cold = {private: gc_frozen(out, private) for private in (True, False)}
    kills: list[Killed] = []
    # Forked now, each worker has everything imported too, and a single thread, as who forks should.
    with ProcessPoolExecutor(AT_ONCE, mp_context=get_context("fork")) as workers:
        kills.extend(workers.map(partial(_kill_case, out), _cases(repeats, failpoints)))
    plain = [kill for kill in kills if not kill.private]
    waits = [kill.resume_s - cold[kill.private][1] for kill in kills if not math.isnan(kill.resume_s)]
    return {
        "kills": len(kills),
        "undercounts": sum(kill.undercounted for kill in kills),
        "overcharged_attempts_max": max(kill.surplus for kill in kills),
        "lost_rounds": sum(kill.lost_rounds for kill in kills),
        "resume_minus_cold_s_max": max(waits),
        "model_hash_equal": min(float(kill.checksum == cold[False][0]) for kill in plain),
    }


def _kill_case(out: Path, case: tuple[bool, str, int]) -> Killed:
    return kill_and_resume(out, *case)


def _cases(repeats: int, failpoints: tuple[str, ...]) -> Iterator[tuple[bool, str, int]]:
    for failpoint in failpoints:
        for count in range(1, repeats + 1):
            yield True, failpoint, count
            if not failpoint.startswith("ledger."):  # without differential privacy there is none
                yield False, failpoint, count


def warm_up(out: Path) -> None:
    """Import and prepare, in this process, all that a run needs, by one whole run of each kind."""
    for private in (True, False):
        out.mkdir(parents=True, exist_ok=True)
        folder = RunFolder.create(configure(private, out / str(private))).path
        run = RunFolder.open(folder).run
        policies = policies_of(run)
        pool = local_pool(hospital_specs(run, policies, folder))
        run_in_process(run, policies, folder, pool, lambda event: None, threading.Event())


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
