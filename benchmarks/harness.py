"""What every benchmark shares: its options, its figures against their goals, and the machine it ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True)
class Goal:
    """A figure's goal: at least or at most a limit; either may be left open."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Say whether a measured value reaches the goal; not-a-number never does."""
        above = self.at_least is None or value >= self.at_least
        below = self.at_most is None or value <= self.at_most
        return above and below and value == value

    def __str__(self) -> str:
        limits = []
        if self.at_least is not None:
            limits.append(f">= {self.at_least:g}")
        if self.at_most is not None:
            limits.append(f"<= {self.at_most:g}")
        return " and ".join(limits)


@dataclass(frozen=True)
class Options:
    """How a benchmark was called; `own` are the options that only this benchmark has."""

    quick: bool
    json: Path | None
    out: Path
    own: argparse.Namespace = field(default_factory=argparse.Namespace)


@contextmanager
def benchmark(
    description: str,
    arguments: Sequence[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> Iterator[Options]:
    """Parse --quick, --json FILE and --out DIR; without --out, what is written goes to a folder that is removed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of the full measurement")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=STANDARD_OUTPUT,
        metavar="FILE",
        help="write the figures as one flat JSON object; without FILE to the standard output, the table to the other",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep runs and pictures in this folder")
    if add_options is not None:
        add_options(parser)
    given = parser.parse_args(arguments)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        yield Options(given.quick, given.json, given.out, given)
        return
    with tempfile.TemporaryDirectory(prefix="medfl-benchmark-") as scratch:
        yield Options(given.quick, given.json, Path(scratch), given)


def report(options: Options, figures: Mapping[str, float], goals: Sequence[Goal] = ()) -> None:
    """Print the machine and the table of figures and goals, and write the JSON file if one was asked for."""
    alone = options.json == STANDARD_OUTPUT
    readers = sys.stderr if alone else sys.stdout
    print(describe_machine(), file=readers)
    if options.quick:
        print("quick: a smaller measurement; its figures are no result", file=readers)
    print(table(figures, goals), file=readers)
    if options.json is not None:
        finite = {name: value if value == value else None for name, value in figures.items()}
        text = json.dumps(finite, indent=2, allow_nan=False) + "\n"
        if alone:
            print(text, end="")
        else:
            options.json.write_text(text, encoding="utf-8")


def table(figures: Mapping[str, float], goals: Sequence[Goal] = ()) -> str:
    """Lay out each figure, its goal and whether it holds; a goal that was not measured is shown as such."""
    by_name = {goal.figure: goal for goal in goals}
    lines = []
    width = max(map(len, [*figures, *by_name]), default=0)
    for name, value in figures.items():
        goal = by_name.get(name)
        verdict = "" if goal is None else f"{goal!s:<16} {'holds' if goal.holds(value) else 'FALLS SHORT'}"
        lines.append(f"  {name:<{width}}  {value:>12.5g}  {verdict}".rstrip())
    for name in (name for name in by_name if name not in figures):
        lines.append(f"  {name:<{width}}  {'-':>12}  {by_name[name]!s:<16} not measured")
    return "\n".join(lines)


def describe_machine() -> str:
    """Name the processor, cores, accelerator and the versions that matter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "monai"))
    return f"{_processor()}, {cores} cores, {_accelerator()}; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _accelerator() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    return "no GPU used"
