"""The privacy ledger: killed with SIGKILL at every failpoint, and timed.

A kill is an undercount when rounds were trained that the ledger does not charge, and overcharges as many
attempts as it charges without training.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import Goal, Options, benchmark, report
from ledger_victim import MECHANISM, open_ledger

from medfl_ray.store.ledger.events import charges

OPENING = ("create.begin", "create.before_commit", "create.done", "create.key")
PLACES = ("begin", "appended", "before_commit", "committed")
FAILPOINTS = (
    *(f"ledger.{place}" for place in OPENING),
    *(f"ledger.{kind}.{place}" for kind in ("reserve", "settle", "release") for place in PLACES),
)
REPEATS = 5
NUM_ROUNDS = 6
GOALS = (
    Goal("kills", at_least=12 * REPEATS),
    Goal("undercounts", at_most=0),
    Goal("overcharged_attempts_max", at_most=1),
)


def measure(options: Options) -> dict[str, float]:
    """Kill, judge and time."""
    repeats = 1 if options.quick else REPEATS
    surplus = [kill_at(options.out, place, count) for place in FAILPOINTS for count in range(1, repeats + 1)]
    return {
        "kills": len(surplus),
        "undercounts": sum(value < 0 for value in surplus),
        "overcharged_attempts_max": max(surplus),
        "append_ms": append_ms(options.out, 40 if options.quick else 400),
        "hospital_round_ms": hospital_round_ms(options.out, 20 if options.quick else 1000),
    }


def kill_at(out: Path, failpoint: str, count: int) -> int:
    """Kill a process at the count-th passage (places passed less often: the first), let it go on once more, and
    return how many attempts are charged beyond those trained."""
    folder = out / f"{failpoint}-{count}"
    folder.mkdir(parents=True)
    passage = min(count, 1 if ".create." in failpoint else 2 if ".release." in failpoint else 4)
    trained = run_victim(folder, "killed", f"{failpoint}:{passage}", -signal.SIGKILL)
    surplus = num_charged(folder) - trained
    trained += run_victim(folder, "resumed", None, 0)
    worst = max(surplus, num_charged(folder) - trained, key=abs)
    shutil.rmtree(folder)
    return worst


def run_victim(folder: Path, job: str, failpoint: str | None, expected_exit: int) -> int:
    """Run the victim and return under how many charges it trained.

    Raises:
      RuntimeError: it ended otherwise than expected, so that nothing was measured.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MEDFL_FAILPOINT"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    if failpoint is not None:
        environment["MEDFL_FAILPOINT"] = failpoint
    command = [sys.executable, str(Path(__file__).with_name("ledger_victim.py")), str(folder), job, str(NUM_ROUNDS)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != expected_exit:
        raise RuntimeError(f"the victim at {failpoint} ended with {ended.returncode}: {ended.stderr[-500:]}")
    return ended.stdout.count("trained")


def num_charged(folder: Path) -> int:
    """Return how many attempts the ledger charges, after checking every row."""
    return len(charges(open_ledger(folder).events()))


def append_ms(out: Path, num_rounds: int) -> float:
    """Return the median time of writing one row durably, in milliseconds, without accounting."""
    folder = out / "append"
    folder.mkdir()
    ledger = open_ledger(folder)
    times = []
    for number in range(num_rounds):
        started = time.perf_counter()
        ledger.settle(ledger.reserve("timed", number, 0, MECHANISM, None))
        times.append((time.perf_counter() - started) / 2)
    return 1000 * statistics.median(times)


def hospital_round_ms(out: Path, num_hospitals: int) -> float:
    """Return what one round costs a hospital of a large simulation: reserve, settle and account, in milliseconds."""
    folders = [out / f"hospital-{number}" for number in range(num_hospitals)]
    for folder in folders:
        folder.mkdir()
    ledgers = [open_ledger(folder, folder.name, max_epsilon=8.0) for folder in folders]
    started = time.perf_counter()
    for ledger in ledgers:
        ledger.settle(ledger.reserve("simulation", 1, 0, MECHANISM, 8.0))
        ledger.spent()
    return 1000 * (time.perf_counter() - started) / num_hospitals


if __name__ == "__main__":
    with benchmark(__doc__) as options:
        report(options, measure(options), GOALS)
