"""What a private step costs: plain training, ours and Opacus on the same networks and batches, one thread.

Every contender has a process of its own (dp_overhead_contender.py), so that its memory and its heap are those of a
training that does nothing else; the processes take turns, one step each. Noise is left out of every contender and
timed apart.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from dp_overhead_contender import Ready, Size, serve
from harness import Goal, Options, benchmark, describe_machine, report

CONTENDERS = ("plain", "ours", "ours_single", "ours_grouped", "opacus_hooks", "opacus_functorch", "opacus_ghost")
SLOW_CONTENDERS = ("opacus_hooks", "opacus_functorch", "opacus_ghost")
NOISE = "noise"
FEATURES_2D = (8, 8, 16, 32, 64, 8)
FEATURES_3D = (16, 16, 32, 64, 128, 16)
SAME_GRADIENT = 1e-3  # Opacus adds 1e-6 to every norm and computes it in float32
GOALS = (
    Goal("dp2d_b8_ratio", at_most=1.3),
    Goal("dp3d_ratio", at_most=1.1),
    Goal("dp3d_memory_ratio", at_most=1.0),
    Goal("noise_2d_share", at_most=0.25),
    Goal("noise_3d_share", at_most=0.05),
)


@dataclass(frozen=True)
class Case:
    """`rounds` of turns on one size; the slow contenders take theirs in every `slow_every`-th round."""

    name: str
    size: Size
    rounds: int
    slow_every: int = 1


@dataclass
class Measured:
    """One contender in one case: seconds of each step, or why it has none."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    peak_bytes: float = float("nan")
    failure: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        """Median wall time of a step, in seconds."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def least(self) -> float:
        """Shortest wall time of a step, in seconds."""
        return min(self.seconds, default=float("nan"))

    @property
    def processor(self) -> float:
        """Median processor time of a step, in seconds: other programs lengthen it less."""
        return statistics.median(self.processor_seconds) if self.processor_seconds else float("nan")

    @property
    def spread(self) -> str:
        """Range of the wall times, in seconds."""
        return f"{min(self.seconds):.4g} to {max(self.seconds):.4g}" if self.seconds else "-"


FULL = (
    *(Case(f"dp2d_b{batch}", Size(FEATURES_2D, 96, 2, batch), 40, 2) for batch in (2, 4, 8)),
    Case("dp3d", Size(FEATURES_3D, 64, 3, 2), 12, 4),
    Case("dp3d_b4", Size(FEATURES_3D, 64, 3, 4), 6, 3),
)
QUICK = (Case("dp2d_b8", Size(FEATURES_2D, 32, 2, 8), 2), Case("dp3d", Size(FEATURES_3D, 16, 3, 2), 2))


class Contender:
    """A running contender; forked, so that the libraries are loaded once."""

    def __init__(self, name: str, size: Size) -> None:
        context = multiprocessing.get_context("fork")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, size, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.ready: Ready = self._link.recv()
        except EOFError:
            self._process.join()
            self.ready = Ready(failure=f"its process ended with {self._process.exitcode}")

    def ask(self, what: str) -> Any:
        """Say "step" or "peak" and return the answer."""
        self._link.send(what)
        return self._link.recv()

    def end(self) -> None:
        """Let the process end."""
        if self._process.is_alive() and not self.ready.failure:
            self._link.send("end")
        self._process.join()


def measure_case(case: Case) -> dict[str, Measured]:
    """Start every contender, let them take turns and end them."""
    names = (*CONTENDERS, NOISE)
    measured = {name: Measured() for name in names}
    running: dict[str, Contender] = {}
    try:
        for name in names:
            running[name] = Contender(name, case.size)
            measured[name].failure, measured[name].note = running[name].ready.failure, running[name].ready.note
        expected = running["ours_single"].ready.gradient
        for name in CONTENDERS[1:]:
            if not measured[name].failure and not _same(expected, running[name].ready.gradient):
                measured[name].failure = "its clipped sum differs from that of patient by patient"
        for number in range(case.rounds):
            _take_turns({n: running[n] for n in names if not measured[n].failure}, measured, case, number)
        for name in names:
            if not measured[name].failure:
                measured[name].peak_bytes = running[name].ask("peak")
    finally:
        for contender in running.values():
            contender.end()
    return measured


def _take_turns(running: Mapping[str, Contender], measured: Mapping[str, Measured], case: Case, number: int) -> None:
    """One step of everybody whose turn it is; another one begins in every round."""
    due = [name for name in running if name not in SLOW_CONTENDERS or number % case.slow_every == 0]
    first = number % len(due)
    for name in due[first:] + due[:first]:
        wall, processor = running[name].ask("step")
        measured[name].seconds.append(wall)
        measured[name].processor_seconds.append(processor)


def _same(expected: Sequence[float], found: Sequence[float]) -> bool:
    return all(abs(a - b) <= SAME_GRADIENT * expected[0] for a, b in zip(expected, found, strict=True))


def figures_of(results: Mapping[str, Mapping[str, Measured]]) -> dict[str, float]:
    """Return the ratios to the plain step: time (median, least) and memory of every contender in every case."""
    figures: dict[str, float] = {}
    for case, measured in results.items():
        plain = measured["plain"]
        figures[f"{case}_plain_s"] = plain.median
        for name in CONTENDERS[1:]:
            prefix = case if name == "ours" else f"{case}_{name}"
            figures[f"{prefix}_ratio"] = measured[name].median / plain.median
            figures[f"{prefix}_least_ratio"] = measured[name].least / plain.least
            figures[f"{prefix}_processor_ratio"] = measured[name].processor / plain.processor
            figures[f"{prefix}_memory_ratio"] = measured[name].peak_bytes / plain.peak_bytes
        figures[f"{case}_noise_share"] = measured[NOISE].median / plain.median
    for short, long in SHORT_NAMES.items():
        if long in figures:
            figures[short] = figures[long]
    return figures


SHORT_NAMES = {
    "noise_2d_share": "dp2d_b8_noise_share",
    "noise_3d_share": "dp3d_noise_share",
    "opacus_hooks_2d_ratio": "dp2d_b8_opacus_hooks_ratio",
    "opacus_hooks_3d_ratio": "dp3d_opacus_hooks_ratio",
    "opacus_functorch_3d_ratio": "dp3d_opacus_functorch_ratio",
}


def write_page(results: Mapping[str, Mapping[str, Measured]], file: Path) -> None:
    """Write every contender's time and memory as a Markdown table."""
    lines = [
        "# Cost of a private step",
        "",
        f"Written by `benchmarks/dp_overhead.py`; one thread, {describe_machine()}, "
        f"opacus {metadata.version('opacus')}.",
        "Peak memory is resident memory above that before the contender was built. Noise is in no contender's step.",
        "",
        "| case | contender | steps | median s | range s | to plain | shortest to plain | processor time to plain "
        "| peak MB | to plain |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, measured in results.items():
        plain = measured["plain"]
        for name, own in measured.items():
            label = f"{name}, {own.note}" if own.note else name
            if own.failure:
                lines.append(f"| {case} | {name} | failed: {own.failure} | | | | | | | |")
                continue
            ratios = (own.median / plain.median, own.least / plain.least, own.processor / plain.processor)
            lines.append(
                f"| {case} | {label} | {len(own.seconds)} | {own.median:.4g} | {own.spread} | "
                + " | ".join(f"{ratio:.3f}" for ratio in ratios)
                + f" | {own.peak_bytes / 1e6:.0f} | {own.peak_bytes / plain.peak_bytes:.2f} |"
            )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(options: Options) -> dict[str, float]:
    """Measure every case and write the page."""
    results: dict[str, dict[str, Measured]] = {}
    for case in QUICK if options.quick else FULL:
        results[case.name] = measure_case(case)
        for name, own in results[case.name].items():
            if own.failure:
                print(f"{case.name}: {name} failed: {own.failure}")
        write_page(results, options.out / "dp_overhead.md")  # what is measured stays if a later case is stopped
    return figures_of(results)


if __name__ == "__main__":
    with benchmark(__doc__) as options:
        report(options, measure(options), GOALS)
