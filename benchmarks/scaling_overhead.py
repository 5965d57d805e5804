"""What a round costs above the training engine in a bare loop: in a process of its own, and in the actor's own process.

The same loop takes one process a few per cent longer than another, by the chance of where their memory lies. So the
round is compared with loops of several fresh processes, and once more in the process in which it is trained itself.
Neighbours on a shared machine slow one core more than another: both train on the same core, in turns, and another pair
takes the next core. All that trains nothing (coordinator, Ray) runs where the system puts it.

    scaling_overhead.py HOSPITALS GROUP CORE    trains everybody once for each line of its input, writes the seconds
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import scaling_hospitals as hospitals
from scaling_runs import SMALL, configure, make_trainer, simulate

from actors.simulation.run import Simulation

HOSPITALS, ROUNDS, PAIRS = 200, 8, 9


class BareLoop:
    """The training engine and the sums, without rounds, receipts, Ray or a second process."""

    def __init__(self, count: int, group_size: int) -> None:
        """Open the data of `count` hospitals."""
        from medfl_ray.training.grouped.group_forming import form_groups
        from medfl_ray.training.grouped.trainer import GroupedTrainer, HospitalTask
        from medfl_ray.training.rules.local_job import LocalJob

        self._trainer = make_trainer(SMALL)
        self._many = GroupedTrainer(self._trainer, group_size)
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

    def timed_round(self) -> float:
        """Return the seconds of a round."""
        started = time.perf_counter()
        self.round()
        return time.perf_counter() - started


class PlainProcess:
    """A bare loop in a fresh process that has neither Ray nor rounds."""

    def __init__(self, count: int, group_size: int, core: int) -> None:
        """Start it on `core`; its first round, in which it warms up, is over when this returns."""
        command = [sys.executable, __file__, str(count), str(group_size), str(core)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.timed_round()

    def timed_round(self) -> float:
        """Return the seconds of a round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def stay_on(_actor: Any, core: int) -> None:
    """Have the thread in which an actor trains stay on one core."""
    os.sched_setaffinity(0, {core})


def round_in_the_actor(actor: Any, count: int, group_size: int) -> float:
    """Return the seconds of a bare round in the process of an actor, which keeps the loop."""
    if not hasattr(actor, "bare_loop"):
        actor.bare_loop = BareLoop(count, group_size)
    seconds: float = actor.bare_loop.timed_round()
    return seconds


def compare_once(count: int, rounds: int, core: int, directory: Path) -> tuple[float, float]:
    """Compare rounds on a fresh actor with bare loops in turns: in a fresh process, and in the actor's own."""
    import ray

    plain_s: list[float] = []
    own_s: list[float] = []
    turns: list[tuple[list[float], Callable[[], float]]] = []

    with ExitStack() as stack:

        def bare(simulation: Simulation, number: int) -> None:
            if not turns:
                size = int(simulation.pool.describe()[0].hospitals_per_group or 1)  # type: ignore[union-attr]
                call = simulation.pool._actors[0].__ray_call__.remote
                ray.get(call(stay_on, core))
                ask = partial(call, round_in_the_actor, count, size)
                ray.get(ask())  # warms it up, as `PlainProcess` is when it has started
                plain = stack.enter_context(PlainProcess(count, size, core))
                turns.extend([(plain_s, plain.timed_round), (own_s, lambda: ray.get(ask()))])
            for seconds, timed_round in turns if number % 2 else turns[::-1]:
                seconds.append(timed_round())

        round_s = simulate(configure(count, rounds, directory, num_actors=1), bare)
    return ratio(round_s, plain_s), ratio(round_s, own_s)


def ratio(round_s: Sequence[float], bare_s: Sequence[float]) -> float:
    """Compare each round but the first and last with the loop before it and the one after it, near in time."""
    return statistics.median(
        ours / ((before + after) / 2)
        for ours, before, after in zip(round_s[1:-1], bare_s[:-1], bare_s[1:], strict=False)
    )


def compare(quick: bool, directory: Path) -> list[tuple[float, float]]:
    """Return what each pair of processes gave: a round over a plain process's loop, and over the actor's own."""
    count, rounds, pairs = (60, 4, 2) if quick else (HOSPITALS, ROUNDS, PAIRS)
    cores = sorted(os.sched_getaffinity(0))
    return [compare_once(count, rounds, cores[pair % len(cores)], directory) for pair in range(pairs)]


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[3])})
    loop = BareLoop(int(sys.argv[1]), int(sys.argv[2]))
    for _ in sys.stdin:
        print(loop.timed_round(), flush=True)
