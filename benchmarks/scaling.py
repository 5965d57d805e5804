"""How a simulation's cost grows: with hospitals, parameters and actors; its overhead, its sums and its memory.

Hospitals have 8 to 32 random images of 32 x 32 pixels and train one epoch of a two-dimensional U-Net with batches of
8; no evaluation on the way. Seconds are those of this machine; exponents and ratios are what counts.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scaling_hospitals as hospitals
from harness import STANDARD_OUTPUT, Goal, Options, benchmark, describe_machine, report

from actors.cluster import connect, disconnect, simulation_environment
from actors.simulate import Simulation
from medfl_ray.config import RunConfig
from medfl_ray.federation.events import Event, PhaseStarted, RoundClosed, RoundTimed
from medfl_ray.store.run_folder import RunFolder

GOALS = (
    Goal("hospitals_exponent", at_least=0.97, at_most=1.03),
    Goal("overhead_ratio", at_most=1.02),
    Goal("aggregate_vs_readonly", at_most=4.0),
    Goal("rss_slope_mb_per_round", at_most=0.5),
)
SMALL = (12, 24, 48, 96)
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


def configure(
    count: int, rounds: int, directory: Path, features: Sequence[int] = SMALL, **federation: Any
) -> RunConfig:
    """Return a run in which all of `count` hospitals train in every round."""
    return RunConfig.model_validate(
        {
            "name": "scaling",
            "data": {"phantom": {"num_hospitals": count}, "spatial_dims": 2},
            "model": {"type": "unet2d", "features": list(features)},
            "training": {
                "batch_size": 8,
                "learning_rate": 0.01,
                "optimizer": "sgd",
                "momentum": 0.0,
                "loss": "cross_entropy",
                "patch_size_voxels": hospitals.SIZE,
                "augment": False,
                "device": "cpu",
            },
            "federation": {
                "pool": "virtual",
                "rounds": rounds,
                "local_epochs": 1,
                "eval_every": rounds,
                "eval_hospitals": 1,
                **federation,
            },
            "privacy": {"enable_dp": False},
            "output": {"directory": str(directory), "report": False, "export": False},
        }
    )


def simulate(run: RunConfig, after_round: Callable[[Simulation, int], None] | None = None) -> list[float]:
    """Return the seconds of each round, from its plan to its receipt on the disk, evaluation left out; warm before."""
    seconds: list[float] = []
    began = 0.0
    policies = hospitals.policies(run.data.phantom.num_hospitals if run.data.phantom else 0)

    def follow(event: Event) -> None:
        nonlocal began
        if isinstance(event, PhaseStarted) and event.name == "federated":
            began = time.perf_counter()
        if isinstance(event, RoundClosed):
            seconds.append(time.perf_counter() - began)
            assert not event.result.receipt.failures, event.result.receipt.failures[0]
            if after_round is not None:
                after_round(simulation, event.result.round)
        if isinstance(event, RoundTimed):
            seconds[-1] -= event.seconds["evaluate"]
            began = time.perf_counter()

    with Simulation(run, policies, RunFolder.create(run).path, follow, open_data=hospitals.open_data) as simulation:
        simulation.warm_up([policy.hospital for policy in policies[:64]])
        outcome = simulation.run()
    assert outcome.completed, outcome.reason
    return seconds


def num_parameters(features: Sequence[int]) -> int:
    """Count the parameters of the network."""
    return sum(parameter.numel() for parameter in make_trainer(features).network.parameters())


def make_trainer(features: Sequence[int]) -> Any:
    """Return the trainer of such a network, as an actor makes it."""
    from medfl_ray.training.trainer import Trainer

    run = configure(1, 1, Path("unused"), features)
    return Trainer(run.model, run.training, run.data.task, 2, 1, 2, run.patch_size, False)


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


def overhead_ratio(quick: bool, directory: Path) -> float:
    """Compare a round on one actor with the same engine in a bare loop here, in turns."""
    count, rounds = (60, 4) if quick else (200, 25)
    bare_s: list[float] = []
    loop: list[BareLoop] = []

    def bare(simulation: Simulation, number: int) -> None:
        if not loop:
            group_size = int(simulation.pool.describe()[0].hospitals_per_group or 1)  # type: ignore[union-attr]
            loop.append(BareLoop(count, group_size))
            loop[0].round()
        started = time.perf_counter()
        loop[0].round()
        bare_s.append(time.perf_counter() - started)

    run = configure(count, rounds, directory, num_actors=1)
    round_s = simulate(run, bare)
    # A round beside the loop before it and the one after it, which are as near in time as can be.
    return statistics.median(
        ours / ((before + after) / 2)
        for ours, before, after in zip(round_s[1:-1], bare_s[:-1], bare_s[1:], strict=False)
    )


class BareLoop:
    """The training engine and the sums, without rounds, receipts, Ray or a second process."""

    def __init__(self, count: int, group_size: int) -> None:
        """Open the data of `count` hospitals."""
        from medfl_ray.training.group_forming import form_groups
        from medfl_ray.training.many_hospitals import HospitalTask, ManyHospitals
        from medfl_ray.training.trainer import LocalJob

        self._trainer = make_trainer(SMALL)
        self._many = ManyHospitals(self._trainer, group_size)
        self._weights = self._trainer.initial_weights(1)
        data = [hospitals.RandomHospital(number) for number in range(count)]
        sizes = [(-(-one.num_train_patients // 8), one.num_train_patients) for one in data]
        self._groups = [
            [HospitalTask(data[i], LocalJob(sizes[i][0], 0.01, None, (1, 1, i))) for i in group]
            for group in form_groups(sizes, group_size, 8)[::-1]
        ]

    def round(self) -> None:
        """Train everybody once and take the mean."""
        from medfl_ray.aggregation.fixed_point import add_updates, empty_sum, weighted_mean

        total = empty_sum(self._weights.size)
        for group in self._groups:
            outcomes = list(self._many.train(self._weights, group))
            deltas = np.stack([outcome.delta for _, outcome in outcomes])
            total = add_updates(total, deltas, [group[i].data.num_train_patients for i, _ in outcomes])
        self._weights = self._weights + weighted_mean(total)


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


def page(points: Sequence[Point], figures: dict[str, float]) -> str:
    """Return the tables."""
    lines = ["# How the cost of a simulation grows", "", describe_machine() + ".", ""]
    lines += ["| figure | value | goal |", "| --- | --- | --- |"]
    lines += [f"| `{goal.figure}` | {figures.get(goal.figure, float('nan')):.3g} | {goal} |" for goal in GOALS]
    lines += ["", "| over | hospitals | parameters | actors | s a round | ms a hospital |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {point.part} | {point.num_hospitals} | {point.num_parameters / 1e6:.2f}M | {point.num_actors} "
        f"| {point.round_s:.3f} | {1e3 * point.round_s / point.num_hospitals:.2f} |"
        for point in points
    ]
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
        figures = {"overhead_ratio": overhead_ratio(options.quick, runs)}
        figures["rss_slope_mb_per_round"] = rss_slope(options.quick, runs)
        points = list(measure_growth(options.quick, runs))
    finally:
        disconnect()
    figures["hospitals_exponent"] = exponent_of(points)
    figures["aggregate_vs_readonly"] = aggregate_vs_readonly(options.quick)
    beside = options.out if options.json in (None, STANDARD_OUTPUT) else Path(str(options.json)).parent
    (beside / "scaling.md").write_text(page(points, figures), encoding="utf-8")
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
