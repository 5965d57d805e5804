"""Two processes at once, and SIGKILL anywhere: never an undercount, at most one attempt too much."""

import os
import signal
from pathlib import Path

import pytest
from ledger_files import as_version_one
from warm import WarmParent, WarmProcess

from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import charged_segments

PROGRAM = Path(__file__).with_name("ledger_process.py")
ROOT = Path(__file__).parents[2]
FAILPOINTS = [
    "ledger.create.begin",
    "ledger.create.before_commit",
    "ledger.create.done",
    "ledger.create.key",
    *(
        f"ledger.{kind}.{place}"
        for kind in ("reserve", "settle", "release")
        for place in ("begin", "appended", "before_commit", "committed")
    ),
]
STEPS_PER_ROUND = 8


def start(
    warm: WarmParent, folder: Path, rounds: int, writer: str = "job", failpoint: str | None = None
) -> WarmProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MEDFL_FAILPOINT", None)
    if failpoint is not None:
        environment["MEDFL_FAILPOINT"] = failpoint
    return warm.start(PROGRAM, folder, rounds, writer, env=environment)


def charged_steps(folder: Path) -> int:
    ledger = PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", 1e-5, 1.0)
    return sum(segment.num_steps for segment in charged_segments(ledger.events()))


def steps_used(lines: list[str]) -> int:
    """Return the steps under which a process may have trained: settled is the moment before training."""
    return STEPS_PER_ROUND * sum(line.startswith("settled") for line in lines)


def check_killed_at(warm: WarmParent, folder: Path, failpoint: str) -> None:
    process = start(warm, folder, 4, failpoint=failpoint)
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == -signal.SIGKILL
    surplus = charged_steps(folder) - steps_used(lines)
    assert 0 <= surplus <= STEPS_PER_ROUND
    again = start(warm, folder, 2, writer="resumed").communicate(timeout=120)[0].splitlines()
    assert again[-1] == "done"
    assert charged_steps(folder) - steps_used(lines + again) == surplus


def test_killed_between_reserve_and_settle_it_stays_charged(warm: WarmParent, tmp_path: Path) -> None:
    process = start(warm, tmp_path, 4, failpoint="ledger.reserve.committed:2")
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == -signal.SIGKILL
    assert lines == ["opened", "reserved 1", "settled 1"]
    assert charged_steps(tmp_path) == 2 * STEPS_PER_ROUND


@pytest.mark.ci
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_anywhere_it_never_undercounts(warm: WarmParent, tmp_path: Path, failpoint: str) -> None:
    check_killed_at(warm, tmp_path, failpoint)


UNPROTECTED_FAILPOINTS = [
    *(f"ledger.unprotected.{place}" for place in ("begin", "appended", "before_commit", "committed")),
    *("ledger.upgrade.begin", "ledger.upgrade.before_commit"),
]


@pytest.mark.ci
@pytest.mark.parametrize("failpoint", UNPROTECTED_FAILPOINTS)
def test_killed_while_it_marks_an_unprotected_job_the_file_is_whole(
    warm: WarmParent, tmp_path: Path, failpoint: str
) -> None:
    """Also where a file of the first version is brought up to date in the same transaction: both or neither."""
    start(warm, tmp_path, 1).communicate(timeout=120)
    as_version_one(tmp_path / "ledger.sqlite")
    charged = charged_steps(tmp_path)
    process = start(warm, tmp_path, 0, writer="unprotected", failpoint=failpoint)
    assert process.communicate(timeout=120)[0].splitlines() == ["opened"]
    assert process.returncode == -signal.SIGKILL
    ledger = PrivacyLedger.open(tmp_path / "ledger.sqlite", "north", "scans", 1e-5, 1.0)
    assert ledger.is_unprotected() == failpoint.endswith("committed")
    assert charged_steps(tmp_path) == charged
    assert start(warm, tmp_path, 0, writer="unprotected").communicate(timeout=120)[0].splitlines()[1] == "marked"
    assert len([event for event in ledger.events() if event.kind == "unprotected"]) == 1


def test_two_processes_never_pass_the_budget_together(warm: WarmParent, tmp_path: Path) -> None:
    mechanism_steps = STEPS_PER_ROUND
    PrivacyLedger.open(tmp_path / "ledger.sqlite", "north", "scans", 1e-5, 1.0)
    processes = [start(warm, tmp_path, 5, writer=f"writer-{number}") for number in range(2)]
    answers = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    assert all(lines[-1] == "done" for lines in answers)
    assert any("refused" in lines for lines in answers)
    used = sum(steps_used(lines) for lines in answers)
    assert charged_steps(tmp_path) == used
    assert epsilon_spent([Segment(20.0, 1.0, used)], 1e-5) <= 1.0
    assert epsilon_spent([Segment(20.0, 1.0, used + mechanism_steps)], 1e-5) > 1.0


def test_a_forked_child_writes_to_the_same_account(tmp_path: Path) -> None:
    ledger = PrivacyLedger.open(tmp_path / "ledger.sqlite", "north", "scans", 1e-5, None)
    mechanism = Mechanism(
        noise_multiplier=4.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=1e-5
    )
    ledger.reserve("parent", 1, 0, mechanism, None)
    child = os.fork()
    if child == 0:
        ledger.reserve("child", 1, 0, mechanism, None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ledger.reserve("parent", 2, 0, mechanism, None)
    assert [event.job for event in ledger.events()] == ["parent", "child", "parent"]
