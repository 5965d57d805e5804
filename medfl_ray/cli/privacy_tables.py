"""What the privacy commands print: plans and ledgers, always with unit, delta and adjacency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from medfl_ray.config.files import load_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.messages import Mechanism, PrivacySpent
from medfl_ray.privacy.account import Budgets, PrivacyAccount, account_of, epsilon_words, parts_words
from medfl_ray.privacy.accountant import epsilon_spent
from medfl_ray.privacy.planner import solve_epsilon, solve_noise_multiplier, solve_num_steps, solve_sample_rate
from medfl_ray.privacy.run_accounts import accounts_of_run

COLUMNS = (
    "hospital",
    "the run's rounds",
    "budget of the run",
    "baselines",
    "extra budget",
    "all of it",
    "lifetime budget",
)
BUDGET_WORDS = (
    "budget of the run (privacy.epsilon): bounds the run's rounds\n"
    "extra budget (privacy.extra_epsilon): bounds baselines and studies; what studies cost is not planned here\n"
    "lifetime budget (the data set's max_epsilon): bounds all of it and what the ledger holds of earlier runs"
)
NO_BUDGET_HERE = "lifetime budget: max_epsilon in the hospital's policy, which a ledger does not hold"
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
    """Print each hospital's mechanism, what the whole run costs it, and which budget bounds what.

    Raises:
      PrivacyConfigError: patient-level privacy is off, or a hospital's policy forbids the plan.
    """
    from medfl_ray.data.sources import list_hospitals

    if not run.privacy.enable_dp:
        raise PrivacyConfigError("privacy.enable_dp is off in this configuration: there is no epsilon to plan")
    if not run.privacy.patient_level:
        raise PrivacyConfigError(
            "privacy.unit is 'hospital' in this configuration: its hospitals' patients have no epsilon to plan"
        )
    policies = list_hospitals(run)
    planned = {policy.hospital: _planned(run, policy) for policy in policies}
    console = Console()
    console.print(_mechanism_table(run, policies, planned))
    console.print(_budget_table(run, policies, planned))
    console.print(BUDGET_WORDS, highlight=False)


def _planned(run: RunConfig, policy: SitePolicy) -> Mechanism:
    from medfl_ray.federation.planning import mechanism_for

    mechanism = mechanism_for(run, policy)
    assert mechanism is not None
    return mechanism


def _mechanism_table(run: RunConfig, policies: Sequence[SitePolicy], planned: Mapping[str, Mechanism]) -> Table:
    table = Table(title=f"{run.name}: {run.federation.rounds} rounds", title_justify="left")
    for name in ("hospital", "patients", "q", "steps/round", "noise multiplier", "delta"):
        table.add_column(name, justify="left" if name == "hospital" else "right")
    for policy in policies:
        mechanism = planned[policy.hospital]
        figures = (f"{mechanism.sample_rate:.4g}", str(mechanism.num_steps), f"{mechanism.noise_multiplier:g}")
        table.add_row(policy.hospital, str(policy.num_patients), *figures, f"{mechanism.delta:g}")
    return table


def _budget_table(run: RunConfig, policies: Sequence[SitePolicy], planned: Mapping[str, Mechanism]) -> Table:
    from medfl_ray.federation.planning import account_delta, budget_of, extra_budget, is_for_one_run
    from medfl_ray.federation.studies.baselines import charge_of_run, pooled_charge

    charges = {name: charge_of_run(run, mechanism) for name, mechanism in planned.items()}
    central = [pooled_charge(list(charges.values()))] if "central" in run.federation.baselines else []
    has_local = "local" in run.federation.baselines or run.evaluation.cross_site
    deltas = sorted({account_delta(run, policy) for policy in policies} | {m.delta for m in planned.values()})
    shown = f"{deltas[0]:g}" if len(deltas) == 1 else f"{deltas[0]:g} to {deltas[-1]:g}"
    table = Table(title=f"epsilon (unit patient, delta {shown}, adjacency add/remove)", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "hospital" else "right", overflow="fold")
    for policy in policies:
        own, at = charges[policy.hospital], planned[policy.hospital].delta
        beside = [*([own] if has_local else []), *central]
        table.add_row(
            policy.hospital,
            epsilon_words(epsilon_spent([own], at), 3),
            _budget(run.privacy.epsilon),
            epsilon_words(epsilon_spent(beside, at), 3),
            _budget(extra_budget(run, policy)),
            epsilon_words(epsilon_spent([own, *beside], account_delta(run, policy)), 3),
            _budget(budget_of(run, policy)) + ("" if not is_for_one_run(policy) else " (one run)"),
        )
    return table


def print_ledgers(exports: Sequence[Mapping[str, Any]], run_dir: Path | None = None) -> None:
    """Print accounts' charges and what they cost together.

    Args:
      run_dir: the run whose folder the exports are of: its own part and its budgets are then named.
    """
    accounts: dict[str, PrivacyAccount] = {}
    if run_dir is not None and (run_dir / "config.yaml").is_file():
        accounts = accounts_of_run(run_dir, load_run_config(run_dir / "config.yaml"))
    for export in exports:
        print_ledger(export, accounts.get(export["hospital"]))


def print_ledger(export: Mapping[str, Any], account: PrivacyAccount | None = None) -> None:
    """Print an account's charges and what they cost together; with `account` also what of it is one run's."""
    console = Console()
    console.print(f"hospital {export['hospital']}, data set {export['data_set']}", highlight=False)
    table = Table()
    for name in ("row", "at", "event", "job", "round", "attempt", "noise multiplier", "q", "steps", "clip norm"):
        table.add_column(name)
    for row in export["events"]:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(spent_line(export, account), highlight=False)


def spent_line(export: Mapping[str, Any], account: PrivacyAccount | None) -> str:
    """Return what an account has spent, with its terms and with what bounds it, as far as the export says."""
    if account is not None:
        total = epsilon_words(account.total.epsilon, 3)
        return f"spent: epsilon {total} ({labels_of(account)}): {parts_words(account, 3)}"
    spent = PrivacySpent.model_validate(export["spent"])
    budgets = Budgets(lifetime=spent.budget)
    account = account_of((export["hospital"], export["data_set"]), export["events"], "", spent.delta, budgets)
    bound = NO_BUDGET_HERE if spent.budget is None else f"lifetime budget {spent.budget:g}"
    return f"spent: epsilon {epsilon_words(account.total.epsilon, 3)} ({labels_of(account)}; {bound})"


def labels_of(account: PrivacyAccount) -> str:
    """Return the words that are shown with an account's epsilon."""
    return labels(account.total.delta, account.unit, account.adjacency)


def labels(delta: float, unit: str = "patient", adjacency: str = "add_remove") -> str:
    """Return the words that are shown with every epsilon."""
    return f"unit {unit}, delta {delta:g}, adjacency {adjacency.replace('_', '/')}"


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
    return epsilon_words(epsilon, 3)


def _budget(budget: float | None) -> str:
    return "none" if budget is None else f"{budget:g}"
