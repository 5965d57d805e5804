"""Plants one fault after another in a copy of the code and runs the tests that are to catch it.

    PYTHONPATH=tests python -m planted.plant --json benchmarks/results/planted_faults.json

Each outcome is written as soon as it is known; a second call goes on with what is not caught
yet, as long as the packages are those of the same commit.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from planted.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
PACKAGES = ("medfl_ray", "actors", "serve", "tune")
PARTS = (*PACKAGES, "tests", "configs", "pyproject.toml")
NOT_CAUGHT = re.compile(r"\b(NameError|ImportError|ModuleNotFoundError|SyntaxError|UnboundLocalError)\b")
TIME_LIMIT_S = 600


class Misplaced(Exception):
    """A fault whose text, or whose test, is not there exactly once: the code moved on, and the fault has to follow."""


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: the file it was planted in, the tests that failed and why, and the time that it took."""

    fault: Fault
    file: str
    failed: Mapping[str, str]
    duration_s: float

    @property
    def is_caught(self) -> bool:
        """Whether every test that was to catch the fault failed, and by what it checks."""
        named = {test.split("[")[0].rpartition("::")[2] for test in self.failed}
        return set(self.fault.tests) <= named and not any(map(NOT_CAUGHT.search, self.failed.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        reasons = {test: reason[:120] for test, reason in sorted(self.failed.items())[:3]}
        return {
            "room": self.fault.room,
            "file": self.file,
            "caught": self.is_caught,
            "tests": list(self.fault.tests),
            "num_failed": len(self.failed),
            "first_failures": reasons,
            "duration_s": round(self.duration_s, 1),
        }


def file_of(fault: Fault, root: Path) -> Path:
    """Return the file that holds a fault's text, wherever it lies by now.

    Raises:
      Misplaced: the text is not there exactly once.
    """
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    found = [path for path in paths for _ in range(path.read_text(encoding="utf-8").count(fault.old))]
    if len(found) != 1:
        places = ", ".join(path.relative_to(root).as_posix() for path in found) or "no file"
        raise Misplaced(f"{fault.name!r}: its text is in {places}; expected one place. Follow the code: {fault.old!r}")
    return found[0]


@cache
def tests_by_name(root: Path) -> Mapping[str, tuple[str, ...]]:
    """Return every test function of a tree by its name, with the files that have one of that name."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.setdefault(node.name, []).append(path.relative_to(root).as_posix())
    return {name: tuple(files) for name, files in found.items()}


def nodes_of(names: Iterable[str], root: Path) -> list[str]:
    """Return pytest's names of tests, wherever they lie by now.

    Raises:
      Misplaced: there is no test of a name, or more than one.
    """
    known, nodes = tests_by_name(root), []
    for name in names:
        files = known.get(name, ())
        if len(files) != 1:
            raise Misplaced(f"the test {name} is in {len(files)} files; expected one. Name the test that checks it now")
        nodes.append(f"{files[0]}::{name}")
    return nodes


def copy_tree(target: Path, root: Path = ROOT) -> None:
    """Copy what the tests need: the packages, the tests and the configurations."""
    target.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if (root / part).is_dir():
            shutil.copytree(root / part, target / part, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy2(root / part, target / part)


def run_tests(folder: Path, nodes: Iterable[str]) -> dict[str, str]:
    """Run tests in a copy and return those that failed, each with the first line of why.

    Raises:
      RuntimeError: pytest did not come to an end in which tests passed or failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-m", "", "-p", "no:cacheprovider", *nodes]
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S
    )
    failed = dict(re.findall(r"^FAILED (\S+(?:\[.*?\])?)(?: - (.*))?$", ended.stdout, re.MULTILINE))
    if ended.returncode not in (0, 1) or bool(failed) != bool(ended.returncode):
        raise RuntimeError(f"pytest ended with {ended.returncode}: {ended.stdout[-1500:]}{ended.stderr[-500:]}")
    return failed


def plant(fault: Fault, folder: Path, root: Path = ROOT) -> Outcome:
    """Copy the tree into an empty folder, plant a fault there and run its tests.

    Raises:
      Misplaced: the fault's text or a test is not there exactly once.
    """
    started = time.monotonic()
    copy_tree(folder, root)
    path = file_of(fault, folder)
    path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
    ast.parse(path.read_text(encoding="utf-8"))  # a fault is a mistake that the interpreter takes
    failed = run_tests(folder, nodes_of(fault.tests, folder))
    return Outcome(fault, path.relative_to(folder).as_posix(), failed, time.monotonic() - started)


def write(path: Path, outcomes: Mapping[str, Mapping[str, Any]], commit: str) -> None:
    """Write the outcomes known so far."""
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "num_faults": len(FAULTS),
        "num_caught": sum(outcome["caught"] for outcome in outcomes.values()),
        "faults": {fault.name: outcomes[fault.name] for fault in FAULTS if fault.name in outcomes},
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def known_outcomes(path: Path, commit: str) -> dict[str, dict[str, Any]]:
    """Return the outcomes of an earlier call at the same commit."""
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return dict(record["faults"]) if record["commit"] == commit else {}


def last_commit() -> str:
    """Return the last commit that changed the packages: what was found of them holds until the next one."""
    command = ["git", "log", "-1", "--format=%H", "--", *PACKAGES]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    """Plant what was asked for and return 1 where something was not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the outcomes are kept")
    parser.add_argument("--only", action="append", metavar="NAME", help="plant this fault, known or not")
    given = parser.parse_args()
    commit = last_commit()
    outcomes = known_outcomes(given.json, commit)
    for fault in FAULTS:
        is_known = outcomes.get(fault.name, {}).get("caught", False)
        if fault.name not in given.only if given.only else is_known:
            continue
        with tempfile.TemporaryDirectory(prefix="medfl-fault-") as scratch:
            outcome = plant(fault, Path(scratch) / "tree")
        outcomes[fault.name] = outcome.to_dict()
        write(given.json, outcomes, commit)
        print(f"{'caught' if outcome.is_caught else 'MISSED'}  {outcome.duration_s:5.1f} s  {fault.room}: {fault.name}")
    missed = [name for name, outcome in outcomes.items() if not outcome["caught"]]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} caught" + (f"; missed: {missed}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
