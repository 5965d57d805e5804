"""How a simulation's cost grows: with hospitals, parameters and actors; its overhead, its sums and its memory.

Hospitals have 8 to 32 random images of 32 x 32 pixels and train one epoch of a two-dimensional U-Net with batches of
8; no evaluation on the way. Seconds are those of this machine; exponents and ratios are what counts.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import STANDARD_OUTPUT, Goal, Options, benchmark, describe_machine, report
from scaling_overhead import compare
from scaling_runs import SMALL, configure, num_parameters, simulate

from actors.cluster import connect, disconnect, simulation_environment
from actors.simulation.run import Simulation

GOALS = (
    Goal("hospitals_exponent", at_least=0.97, at_most=1.03),
    Goal("overhead_ratio", at_most=1.02),
    Goal("aggregate_vs_readonly", at_most=4.0),
    Goal("rss_slope_mb_per_round", at_most=0.5),
)
WIDTHS = {"0.1M": SMALL, "1M": (40, 80, 160, 320), "10M": (124, 248, 496, 992), "30M": (216, 432, 864, 1728)}
COUNTS = (10, 100, 300, 1000, 3000, 10_000)
FIT_FROM = 100
ACTORS = (1, 2, 4)
SUMMED, SUMMED_SIZE, SUMMED_AT_ONCE = 1000, 1_000_000, 16
SETTLED_ROUND = 20


@dataclass(frozen=True)
class Point:
    """A measurement: hospitals of a round, parameters, actors and the median seconds of a round."""

    part: str
    num_hospitals: int
    num_parameters: int
    num_actors: int
    round_s: float


def measure_growth(quick: bool, directory: Path) -> Iterator[Point]:
    """Yield the seconds of a round over hospitals, over parameters and over actors."""
    small = num_parameters(SMALL)
    for count in COUNTS[: 3 if quick else None]:
        rounds = 5 if count <= 1000 else 1
        cores = min(2, count)
        yield Point("hospitals", count, small, cores, statistics.median(simulate(configure(count, rounds, directory))))
    for name in [*WIDTHS][: 2 if quick else None]:
        seconds = simulate(configure(16, 3, directory, WIDTHS[name]))
        yield Point("parameters", 16, num_parameters(WIDTHS[name]), 2, statistics.median(seconds))
    for count in ACTORS:
        seconds = simulate(configure(50 if quick else 300, 3, directory, num_actors=count))
        yield Point("actors", 50 if quick else 300, small, count, statistics.median(seconds))


def exponent_of(points: Sequence[Point]) -> float:
    """Fit seconds = c * hospitals ** exponent on a logarithmic scale, from 100 hospitals on."""
    fitted = [point for point in points if point.part == "hospitals" and point.num_hospitals >= FIT_FROM]
    if len(fitted) < 2:
        return float("nan")
    slope, _ = np.polyfit(
        np.log([point.num_hospitals for point in fitted]), np.log([point.round_s for point in fitted]), 1
    )
    return float(slope)


def aggregate_vs_readonly(quick: bool) -> float:
    """Compare the sum of updates with adding up their elements, which reads each once; the median of five turns."""
    from medfl_ray.aggregation.fixed_point import add_updates, empty_sum

    count = SUMMED // 10 if quick else SUMMED
    updates = np.empty((count, SUMMED_SIZE), np.float32)
    rng = np.random.default_rng(0)
    for row in updates:
        rng.standard_normal(out=row, dtype=np.float32)
    ratios = []
    for _ in range(5):
        started = time.perf_counter()
        for row in updates:
            row.sum()
        read = time.perf_counter()
        total = empty_sum(SUMMED_SIZE)
        for first in range(0, count, SUMMED_AT_ONCE):
            some = updates[first : first + SUMMED_AT_ONCE]
            total = add_updates(total, some, [20] * len(some))
        ratios.append((time.perf_counter() - read) / (read - started))
    return statistics.median(ratios)


def rss_slope(quick: bool, directory: Path) -> float:
    """Fit the resident memory, MB, of coordinator and actors over 200 rounds from round 20 on."""
    import psutil
    import ray

    rounds = SETTLED_ROUND + 20 if quick else 200
    used: list[float] = []

    def note(simulation: Simulation, number: int) -> None:
        ids = [os.getpid(), *ray.get([actor.process_id.remote() for actor in simulation.pool._actors])]
        used.append(sum(psutil.Process(one).memory_info().rss for one in ids) / 1e6)

    simulate(configure(24, rounds, directory), note)
    settled = used[SETTLED_ROUND:]
    return float(np.polyfit(range(len(settled)), settled, 1)[0])


def page(points: Sequence[Point], figures: dict[str, float], overheads: Sequence[tuple[float, float]]) -> str:
    """Return the tables."""
    lines = ["# How the cost of a simulation grows", "", describe_machine() + ".", ""]
    lines += ["| figure | value | goal |", "| --- | --- | --- |"]
    lines += [f"| `{goal.figure}` | {figures.get(goal.figure, float('nan')):.4g} | {goal} |" for goal in GOALS]
    lines += [f"| `overhead_in_one_process` | {figures['overhead_in_one_process']:.4g} | |"]
    lines += ["", "| over | hospitals | parameters | actors | s a round | ms a hospital |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {point.part} | {point.num_hospitals} | {point.num_parameters / 1e6:.2f}M | {point.num_actors} "
        f"| {point.round_s:.3f} | {1e3 * point.round_s / point.num_hospitals:.2f} |"
        for point in points
    ]
    lines += ["", "| pair of processes | over a bare loop in a fresh process | over one in the actor's own process |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {number} | {plain:.4f} | {own:.4f} |" for number, (plain, own) in enumerate(overheads, 1)]
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], target: Path) -> None:
    """Draw seconds over hospitals, parameters and actors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, part in zip(axes, ("hospitals", "parameters", "actors"), strict=True):
        some = [point for point in points if point.part == part]
        ax.plot([getattr(point, f"num_{part}") for point in some], [point.round_s for point in some], "o-")
        ax.set(xlabel=part, ylabel="seconds a round")
        if part != "actors":
            ax.set(xscale="log", yscale="log")
        else:
            ax.set(xticks=ACTORS, ylim=(0, None))
        ax.grid(alpha=0.3)
    figure.savefig(target, dpi=110)


def measure(options: Options) -> dict[str, float]:
    """Measure everything, write the page and the plot, and return the figures."""
    connect()
    try:
        runs = options.out / "runs"
        overheads = compare(options.quick, runs)
        figures = {
            "overhead_ratio": statistics.median(plain for plain, _ in overheads),
            "overhead_in_one_process": statistics.median(own for _, own in overheads),
        }
        figures["rss_slope_mb_per_round"] = rss_slope(options.quick, runs)
        points = list(measure_growth(options.quick, runs))
    finally:
        disconnect()
    figures["hospitals_exponent"] = exponent_of(points)
    figures["aggregate_vs_readonly"] = aggregate_vs_readonly(options.quick)
    beside = options.out if options.json in (None, STANDARD_OUTPUT) else Path(str(options.json)).parent
    (beside / "scaling.md").write_text(page(points, figures, overheads), encoding="utf-8")
    draw(points, beside / "scaling.png")
    return figures


def restart_as_an_actor_runs() -> None:
    """Start again with the allocator and threads of an actor, so that the bare loop has what the simulation has."""
    wanted = {**simulation_environment(), "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        os.environ.update(wanted, PYTHONPATH=os.pathsep.join(filter(None, paths)))
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    restart_as_an_actor_runs()
    with benchmark(__doc__) as options:
        report(options, measure(options), GOALS)
