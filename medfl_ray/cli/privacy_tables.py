"""What the privacy commands print: plans and ledgers, always with unit, delta and adjacency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from medfl_ray.config import RunConfig
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.privacy.planner import solve_epsilon, solve_noise_multiplier, solve_num_steps, solve_sample_rate

BAR_WIDTH = 40
CURVE_POINTS = 10


@dataclass(frozen=True)
class Question:
    """Figures of a run at one hospital, of which exactly one is None and asked for."""

    epsilon: float | None
    delta: float
    noise_multiplier: float | None
    sample_rate: float | None
    rounds: int | None
    steps_per_round: int


def answer(question: Question) -> Question:
    """Return the question with the figure that was left out, and the epsilon that the whole then costs.

    Raises:
      PrivacyConfigError: not exactly one figure is left out, or nothing satisfies the others.
    """
    epsilon, delta, sigma, q = question.epsilon, question.delta, question.noise_multiplier, question.sample_rate
    steps = question.rounds * question.steps_per_round if question.rounds is not None else None
    names = {"--epsilon": epsilon, "--noise-multiplier": sigma, "--sample-rate": q, "--rounds": steps}
    absent = [name for name, value in names.items() if value is None]
    if len(absent) != 1:
        raise PrivacyConfigError(
            f"leave out exactly one of {', '.join(names)}; it is solved from the others "
            f"(left out: {', '.join(absent) or 'none'})"
        )
    if sigma is None and epsilon is not None and q is not None and steps is not None:
        sigma = solve_noise_multiplier(epsilon, delta, q, steps)
    elif q is None and epsilon is not None and sigma is not None and steps is not None:
        q = solve_sample_rate(epsilon, delta, sigma, steps)
    elif steps is None and epsilon is not None and sigma is not None and q is not None:
        steps = _whole_rounds(solve_num_steps(epsilon, delta, q, sigma), question)
    assert sigma is not None
    assert q is not None
    assert steps is not None
    reached = solve_epsilon(sigma, delta, q, steps)
    rounds = steps // question.steps_per_round
    return replace(question, epsilon=reached, noise_multiplier=sigma, sample_rate=q, rounds=rounds)


def print_plan(question: Question) -> None:
    """Print the answer to a question, and how epsilon grows over its rounds."""
    solved = answer(question)
    console = Console()
    table = Table(title="One hospital's run", show_header=False)
    for name, value in (
        ("epsilon", f"{_up(solved.epsilon)}  ({labels(solved.delta)})"),
        ("noise multiplier", f"{solved.noise_multiplier:g}"),
        ("sample rate q", f"{solved.sample_rate:g}"),
        ("rounds x steps", f"{solved.rounds} x {solved.steps_per_round}"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(_curve(solved))


def print_run_plan(run: RunConfig) -> None:
    """Print each hospital's mechanism and what the whole run costs it.

    Raises:
      PrivacyConfigError: differential privacy is off, or a hospital's policy forbids the plan.
    """
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.federation.planning import budget_of, mechanism_for, steps_of_run

    if not run.privacy.enable_dp:
        raise PrivacyConfigError("privacy.enable_dp is off in this configuration: there is no epsilon to plan")
    table = Table(title=f"{run.name}: {run.federation.rounds} rounds, unit patient, adjacency add/remove")
    for name in ("hospital", "patients", "q", "steps/round", "noise multiplier", "epsilon", "delta", "budget"):
        table.add_column(name, justify="left" if name == "hospital" else "right")
    for policy in list_hospitals(run):
        mechanism = mechanism_for(run, policy)
        assert mechanism is not None
        steps = steps_of_run(run, mechanism.num_steps)
        epsilon = solve_epsilon(mechanism.noise_multiplier, mechanism.delta, mechanism.sample_rate, steps)
        budget = budget_of(run, policy)
        table.add_row(
            policy.hospital,
            str(policy.num_patients),
            f"{mechanism.sample_rate:.4g}",
            str(mechanism.num_steps),
            f"{mechanism.noise_multiplier:g}",
            _up(epsilon),
            f"{mechanism.delta:g}",
            "none" if budget is None else f"{budget:g}",
        )
    Console().print(table)


def print_ledger(export: Mapping[str, Any]) -> None:
    """Print an account's charges and what they cost together."""
    console = Console()
    console.print(f"hospital {export['hospital']}, data set {export['data_set']}", highlight=False)
    table = Table()
    for name in ("row", "at", "event", "job", "round", "attempt", "noise multiplier", "q", "steps", "clip norm"):
        table.add_column(name)
    for row in export["events"]:
        table.add_row(*_cells(row))
    console.print(table)
    spent = export["spent"]
    budget = "no budget" if spent["budget"] is None else f"budget {spent['budget']:g}"
    console.print(f"spent: epsilon {_up(spent['epsilon'])} ({labels(spent['delta'])}; {budget})", highlight=False)


def labels(delta: float) -> str:
    """Return the words that stand beside every epsilon."""
    return f"unit patient, delta {delta:g}, adjacency add/remove"


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    keys = ("sequence", "at", "kind", "job", "round", "attempt", "noise_multiplier", "sample_rate", "num_steps")
    return [_text(row[key]) for key in (*keys, "max_grad_norm")]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _whole_rounds(num_steps: int, question: Question) -> int:
    rounds = num_steps // question.steps_per_round
    if rounds < 1:
        raise PrivacyConfigError(
            f"only {num_steps} steps fit epsilon={question.epsilon:g} ({labels(question.delta)}); one round has "
            f"{question.steps_per_round}. Raise the noise or lower the steps."
        )
    return rounds * question.steps_per_round


def curve_of(solved: Question) -> tuple[tuple[int, float], ...]:
    """Return (round, epsilon) at ten rounds spread evenly over a plan of which nothing is left out."""
    assert solved.rounds is not None
    assert solved.noise_multiplier is not None
    assert solved.sample_rate is not None
    points = sorted({math.ceil(solved.rounds * part / CURVE_POINTS) for part in range(1, CURVE_POINTS + 1)})
    steps = [rounds * solved.steps_per_round for rounds in points]
    epsilons = [solve_epsilon(solved.noise_multiplier, solved.delta, solved.sample_rate, count) for count in steps]
    return tuple(zip(points, epsilons, strict=True))


def _curve(solved: Question) -> Table:
    table = Table(title=f"epsilon over rounds ({labels(solved.delta)})", show_header=False, box=None)
    for rounds, epsilon in curve_of(solved):
        bar = "█" * max(1, round(BAR_WIDTH * epsilon / solved.epsilon)) if solved.epsilon else ""
        table.add_row(f"round {rounds}", _up(epsilon), bar)
    return table


def _up(epsilon: float | None) -> str:
    assert epsilon is not None
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}"
