"""A simulation beside its peers: a plain PyTorch loop, pfl-research and Flower, on one workload, in turns.

The peers' scripts, their workload and the program that measures every command lie in the folder --peers. A contender
without an environment here is left out and shown as not measured. With --out, what has been measured before is kept
and only what is missing is run, so that a measurement can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import STANDARD_OUTPUT, Options, benchmark, describe_machine, report
from simulation_results import NAMES, Run, figures_of, goals_here, page, update_error, weights_errors

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("workload.py", "measure.py", "raw_torch.py", "pfl_sim.py", "flower_sim.py")
CASES = {
    "S1": ("raw", "pfl", "flower", "ours", "exact"),
    "S2": ("raw", "pfl", "flower", "ours"),
    "S3": ("raw", "pfl", "flower", "ours", "bf16"),
}
QUICK = {
    "S1": {"BENCH_N": "24", "BENCH_C": "12", "BENCH_ROUNDS": "2"},
    "S2": {"BENCH_N": "24", "BENCH_C": "24", "BENCH_ROUNDS": "1"},
    "S3": {"BENCH_N": "2", "BENCH_C": "2", "BENCH_ROUNDS": "1"},
}
PACKAGES = {"raw": ("torch", "monai"), "pfl": ("pfl", "torch", "monai"), "flower": ("flwr", "ray", "torch", "monai")}
LIMIT_S = 900


@dataclass(frozen=True)
class Contender:
    """How one contender is called: its Python, and its script and arguments with the case left open."""

    python: Path
    script: Path
    arguments: tuple[str, ...]
    versions: str

    def command(self, case: str) -> list[str]:
        """Return the command that runs a case."""
        return [str(self.python), str(self.script), case, *self.arguments]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark asks."""
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR", help="folder of the peers' scripts")
    parser.add_argument("--cases", default=",".join(CASES), help="cases, separated by commas (default: %(default)s)")
    parser.add_argument("--contenders", default=",".join(NAMES), help="contenders (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="turns of every case (default: 3; 1 with --quick)")
    parser.add_argument(
        "--float64",
        action="store_true",
        help="also compute S1 in float64, and how far from it rounding takes each contender",
    )
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=Path(sys.executable),
        metavar="PYTHON",
        help="Python that runs the plain loop and Flower (default: this one)",
    )
    parser.add_argument(
        "--pfl-python",
        type=Path,
        default=Path(os.environ["MEDFL_PFL_PYTHON"]) if "MEDFL_PFL_PYTHON" in os.environ else None,
        metavar="PYTHON",
        help="Python with pfl-research (default: MEDFL_PFL_PYTHON; not measured without)",
    )


def versions_of(python: Path, packages: Sequence[str]) -> str | None:
    """Return the versions of packages in another Python; None where one of them, or the Python, is missing."""
    code = (
        "import sys; from importlib.metadata import version as v; print(', '.join(f'{p} {v(p)}' for p in sys.argv[1:]))"
    )
    try:
        done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def find_contenders(own: argparse.Namespace, peers: Path) -> tuple[dict[str, Contender], list[str]]:
    """Return who can run here, and a note on everybody who was asked for and cannot."""
    calls = {
        "raw": (own.peers_python, peers / "raw_torch.py", ("2x1",)),
        "pfl": (own.pfl_python, peers / "pfl_sim.py", ("2",)),
        "flower": (own.peers_python, peers / "flower_sim.py", ("numpy",)),
        "ours": (Path(sys.executable), ROOT / "benchmarks" / "simulation_contender.py", ("fast",)),
        "exact": (Path(sys.executable), ROOT / "benchmarks" / "simulation_contender.py", ("exact",)),
        "bf16": (Path(sys.executable), ROOT / "benchmarks" / "simulation_contender.py", ("bf16",)),
    }
    found: dict[str, Contender] = {}
    notes: list[str] = []
    for name in own.contenders.split(","):
        python, script, arguments = calls[name]
        packages = PACKAGES.get(name, ("torch", "ray", "monai"))
        versions = None if python is None else versions_of(python, packages)
        if versions is None:
            notes.append(f"`{name}` was not measured: no Python with {' and '.join(packages)} was named.")
        else:
            found[name] = Contender(python, script, arguments, versions)
    return found, notes


def turns(repeats: int, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (turn, contender): everybody once in each turn, another one first each time."""
    for turn in range(repeats):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            yield turn + 1, name


def measure_one(options: Options, peers: Path, contender: Contender, label: str, case: str) -> dict[str, Any]:
    """Run one contender under the peers' measure.py and return its record; its output is kept in a log."""
    environment = {
        **os.environ,
        **(QUICK[case] if options.quick else {}),
        "BENCH_LIMIT": os.environ.get("BENCH_LIMIT", str(LIMIT_S)),
        "BENCH_WEIGHTS": str((options.out / f"{label}.npy").resolve()),
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if contender.script.is_relative_to(ROOT):
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (peers, ROOT / "benchmarks", ROOT)))
    records = (options.out / f"{label}.jsonl").resolve()
    records.unlink(missing_ok=True)
    command = [sys.executable, str(peers / "measure.py"), str(records), label, "--", *contender.command(case)]
    with (options.out / f"{label}.log").open("w") as log:
        subprocess.run(command, cwd=peers, env=environment, stdout=log, stderr=log, check=True)
    record: dict[str, Any] = json.loads(records.read_text())
    return record


def float64_note(options: Options, peers: Path, case: str, turn: int = 1) -> str:
    """Say how far the final weights of each contender are from those computed in float64, over the whole update."""
    file = options.out / f"{case}.float64.npy"
    if not file.is_file():
        environment = {**os.environ, **(QUICK[case] if options.quick else {}), "PYTHONPATH": str(peers)}
        command = [sys.executable, str(ROOT / "benchmarks" / "simulation_float64.py"), case, str(file.resolve())]
        subprocess.run(command, env=environment, check=True)
    exact, initial = np.load(file), initial_weights(peers, case)
    finals = {name: options.out / f"{case}.{name}.{turn}.npy" for name in CASES[case]}
    errors = {name: update_error(np.load(path), exact, initial) for name, path in finals.items() if path.is_file()}
    return (
        f"Rounding in {case}: the distance of the final weights from those of the plain loop in float64, over the "
        f"length of the whole update, is {', '.join(f'{error:.1e} for `{name}`' for name, error in errors.items())}."
    )


def kept_runs(folder: Path, cases: Sequence[str]) -> list[Run]:
    """Return the runs of these cases that a folder holds; those that failed are left out, to be run again."""
    runs = []
    for file in sorted(folder.glob("*.*.*.jsonl")):
        case, contender, turn = file.stem.split(".")
        run = Run(case, contender, int(turn), json.loads(file.read_text()))
        if case in cases and contender in NAMES and not run.failure:
            runs.append(run)
    return runs


def initial_weights(peers: Path, case: str) -> Any:
    """Return the first weights [P] of a case, as every contender builds them."""
    if str(peers) not in sys.path:
        sys.path.insert(0, str(peers))
    import workload

    return workload.flat(workload.make_model(workload.CASES[case]))


def write(options: Options, peers: Path, runs: Sequence[Run], notes: Sequence[str]) -> dict[str, float]:
    """Write the page beside the JSON file (and into --out), and return the figures."""
    in_order = sorted(runs, key=lambda run: (run.case, list(NAMES).index(run.contender), run.turn))
    errors = weights_errors(in_order, options.out, lambda case: initial_weights(peers, case))
    text = page(in_order, errors, goals_here(cpu_flags()), describe_machine(), notes)
    targets = [options.out / "simulation.md"]
    if options.json not in (None, STANDARD_OUTPUT):
        targets.append(options.json.with_suffix(".md"))
    for target in targets:
        target.write_text(text, encoding="utf-8")
    return figures_of(in_order, errors)


def measure(options: Options) -> dict[str, float]:
    """Let the contenders of every case take turns; what is measured is written after each turn."""
    own, peers = options.own, options.own.peers.resolve()
    missing = [name for name in SCRIPTS if not (peers / name).is_file()]
    if missing:
        sys.exit(f"--peers: the folder lacks {', '.join(missing)}; name the folder with the peers' scripts")
    cases = own.cases.split(",")
    unknown = sorted({*cases} - CASES.keys() | {*own.contenders.split(",")} - NAMES.keys())
    if unknown:
        sys.exit(f"unknown case or contender {', '.join(unknown)}; cases are {', '.join(CASES)}, see --help")
    found, notes = find_contenders(own, peers)
    notes += [f"`{name}`: {contender.versions}." for name, contender in found.items()]
    if options.quick:
        notes.append("Quick: a smaller measurement; its figures are no result.")
    runs = kept_runs(options.out, cases)
    done = {(run.case, run.contender, run.turn) for run in runs}
    figures: dict[str, float] = {}
    for case in cases:
        names = [name for name in CASES[case] if name in found]
        for turn, name in turns(own.repeats or (1 if options.quick else 3), names):
            if (case, name, turn) in done:
                continue
            label = f"{case}.{name}.{turn}"
            run = Run(case, name, turn, measure_one(options, peers, found[name], label, case))
            runs.append(run)
            seconds = run.failure or f"{run.round_s:.3f} s a round, first after {run.first_round_s:.1f} s"
            print(f"{label}: {seconds}", file=sys.stderr, flush=True)
            if run.failure:
                notes.append(f"`{name}` in turn {turn} of {case}: {run.failure}.")
            figures = write(options, peers, runs, notes)
    if own.float64 and "S1" in cases:
        notes.append(float64_note(options, peers, "S1"))
        figures = {}
    return figures or write(options, peers, runs, notes)


def cpu_flags() -> list[str]:
    """Return what the processor can do, empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])


if __name__ == "__main__":
    with benchmark(__doc__, add_options=add_options) as options:
        report(options, measure(options), goals_here(cpu_flags()))
