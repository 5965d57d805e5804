"""One data set's privacy account as everything shows it: this run, its baselines and studies, all ever charged.

Card, registry, gate, report, MLflow, `ledger show` and the last lines of a run read `account_of` and nothing else, so
that no two of them can differ. Pure: rows of a ledger and budgets in, figures out; `run_accounts.py` reads the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medfl_ray.config.run import RunConfig
from medfl_ray.messages import Adjacency, Message, PrivacySpent, PrivacyUnit
from medfl_ray.privacy.accountant import Charge, Segment, TreeSegment, epsilon_spent

INFINITE = "infinite (unprotected)"
ROUNDING = 1e-9
Row = Mapping[str, Any]


class Spending(Message):
    """The epsilon of one part of an account and the budget that bounds this part, both at the same delta.

    epsilon: infinite where something of the part left without patient-level protection. budget: None where there is
    none, or none is known.
    """

    epsilon: float
    delta: float
    budget: float | None = None

    @property
    def remaining(self) -> float | None:
        """Budget minus epsilon, 0 where it is exceeded; None without a budget.

        A lower bound of what may still be spent: under composition epsilons add up to less than their sum.
        """
        return None if self.budget is None else max(0.0, self.budget - self.epsilon)


class PrivacyAccount(Message):
    """What the data set of one hospital has spent, or under hospital-level privacy the federation.

    total: everything ever charged to it, earlier runs included, against its lifetime budget (max_epsilon). run: of that
    the federated rounds of one run, against privacy.epsilon. extra: the baselines and studies of that run, against
    privacy.extra_epsilon. Both are None where only a receipt is left, which has the total alone.
    moment: the total is that of the ledger when all of the run had been charged, or of the run's last receipt.
    ledger_head: the last row that is counted.
    """

    hospital: str
    data_set: str
    unit: PrivacyUnit
    adjacency: Adjacency
    total: Spending
    run: Spending | None = None
    extra: Spending | None = None
    moment: Literal["ledger", "receipt"] = "ledger"
    ledger_head: str | None = None

    @property
    def is_unprotected(self) -> bool:
        """Whether data were used without patient-level protection, so that no epsilon bounds what was revealed."""
        return math.isinf(self.total.epsilon)

    @property
    def terms(self) -> str:
        """What is shown with every epsilon: unit, delta, adjacency."""
        return terms(self.unit, self.total.delta, self.adjacency)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a JSON document, in which an infinite epsilon is the string "Infinity"."""
        plain: dict[str, Any] = json.loads(self.model_dump_json())
        return plain


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What bounds an account, each as epsilon: a run's rounds, its baselines and studies, a data set's whole life.

    None for no limit; all three of `PrivacyAccount.unit`.
    """

    run: float | None = None
    extra: float | None = None
    lifetime: float | None = None


def budgets_of(run: RunConfig, unit: PrivacyUnit, declared: str | None, lifetime: float | None) -> Budgets:
    """Return what bounds an account in a run; the run's own budgets count in its own unit alone.

    Args:
      declared: what the hospital's data are; None for the federation's account.
      lifetime: the budget with which the account was opened.
    """
    privacy = run.privacy
    if not privacy.enable_dp or privacy.unit != unit:
        return Budgets(lifetime=lifetime)
    extra = extra_limit(run, declared) if unit == "patient" else None
    return Budgets(run=privacy.epsilon, extra=extra, lifetime=lifetime)


def extra_limit(run: RunConfig, declared: str | None) -> float | None:
    """Return the epsilon that a run's baselines and studies may spend together at a hospital; None for no limit."""
    if run.privacy.extra_epsilon is not None or declared != "private":
        return run.privacy.extra_epsilon
    return 0.0


def account_of(
    account: tuple[str, str], rows: Sequence[Row], job: str, delta: float, budgets: Budgets, head: str | None = None
) -> PrivacyAccount:
    """Return what the rows of a ledger amount to, for one run and in all.

    Args:
      account: hospital and data set.
      rows: of the ledger, in order, as its export holds them; checked elsewhere.
      job: the run's name in the ledger; its baselines and studies are `job/...`.
      delta: of the account; the run's part has the delta of its own charges.

    Raises:
      PrivacyConfigError: a row charges what no accountant can account.
    """
    charged = charged_rows(rows)
    exposed = {str(row.get("job") or "") for row in rows if row.get("kind") == "unprotected"}
    of_run = [row for row in charged if row.get("job") == job]
    beside = [row for row in charged if str(row.get("job")).startswith(f"{job}/")]
    run_delta = min((row["delta"] for row in (*of_run, *beside) if row.get("delta")), default=delta)
    # Such a row names the run, whatever of it left without protection.
    run_is_exposed = any(name == job or name.startswith(f"{job}/") for name in exposed)

    def spending(part: Sequence[Row], at: float, budget: float | None, is_exposed: bool) -> Spending:
        epsilon = math.inf if is_exposed else epsilon_spent(map(charge_of_row, part), at)
        return Spending(epsilon=epsilon, delta=at, budget=budget)

    units = sorted({row["unit"] for row in charged if row.get("unit")}) or ["patient"]
    by_tree = any(row.get("adjacency") == "zero_out" for row in charged)
    return PrivacyAccount(
        hospital=account[0],
        data_set=account[1],
        unit=units[0],
        adjacency="zero_out" if by_tree else "add_remove",
        total=spending(charged, delta, budgets.lifetime, bool(exposed)),
        run=spending(of_run, run_delta, budgets.run, run_is_exposed),
        extra=spending(beside, run_delta, budgets.extra, run_is_exposed),
        ledger_head=head,
    )


def account_of_receipt(hospital: str, spent: PrivacySpent) -> PrivacyAccount:
    """Return what the last receipt says of an account of which no ledger's export is left."""
    return PrivacyAccount(
        hospital=hospital,
        data_set="",
        unit=spent.unit,
        adjacency=spent.adjacency,
        total=Spending(epsilon=spent.epsilon, delta=spent.delta, budget=spent.budget),
        moment="receipt",
        ledger_head=spent.ledger_head,
    )


def charged_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the reservations of a ledger that have not been released, in order."""
    charged: dict[Any, Row] = {}
    for row in rows:
        if row.get("kind") == "reserve":
            charged[row.get("reservation")] = row
        elif row.get("kind") == "release":
            charged.pop(row.get("closes"), None)
    return tuple(charged.values())


def charge_of_row(row: Row) -> Charge:
    """Return what the accountant is to charge for a reservation."""
    sigma, steps = float(row["noise_multiplier"]), int(row["num_steps"])
    if row.get("adjacency") == "zero_out":
        return TreeSegment(sigma, steps)
    return Segment(sigma, float(row["sample_rate"]), steps)


def rounded_up(value: float, digits: int = 2) -> float:
    """Return an epsilon rounded up to so many digits, so that it never reads as less than it is."""
    scale = 10.0**digits
    return math.ceil(value * scale - ROUNDING * scale) / scale


def epsilon_words(epsilon: float, digits: int = 2) -> str:
    """Return an epsilon as people read it: rounded up, or that it is infinite."""
    return INFINITE if math.isinf(epsilon) else f"{rounded_up(epsilon, digits):.{digits}f}"


def terms(unit: str, delta: float, adjacency: str) -> str:
    """Return what is shown with every epsilon: unit, adjacency, delta."""
    return f"{unit}-level, {adjacency.replace('_', '/')}, delta {delta:g}"


def parts_words(account: PrivacyAccount, digits: int = 2) -> str:
    """Say which part of an account's total is whose, and which budget bounds which part."""
    return split_words(account.total, account.run, account.extra, digits)


def split_words(total: Spending, run: Spending | None, extra: Spending | None, digits: int = 2) -> str:
    """Say it of a total and its parts; see `parts_words`."""
    if run is None or extra is None:
        return "as of the last receipt" + ("" if total.budget is None else f"; budget {total.budget:g}")
    lifetime = "no lifetime budget" if total.budget is None else f"lifetime budget {total.budget:g}"
    if total.budget is not None:
        lifetime += f", of which {remaining_words(total, digits)} remains"
    words = [
        f"{name} {_of_budget(part, total.delta, digits)}"
        for name, part in (("the run's rounds", run), ("its baselines and studies", extra))
        if part.epsilon or part is run
    ]
    return "; ".join([*words, lifetime])


def remaining_words(spending: Spending, digits: int = 2) -> str:
    """Return what is left of a budget, rounded down; a dash without a budget."""
    if spending.remaining is None:
        return "-"
    scale = 10**digits
    return f"{math.floor(spending.remaining * scale + ROUNDING * scale) / scale:.{digits}f}"


def _of_budget(part: Spending, delta: float, digits: int) -> str:
    at = "" if part.delta == delta else f" at delta {part.delta:g}"
    budget = "" if part.budget is None else f" of their budget {part.budget:g}"
    return f"{epsilon_words(part.epsilon, digits)}{at}{budget}"


def largest(accounts: Iterable[PrivacyAccount]) -> PrivacyAccount | None:
    """Return the account with the largest total; None for none."""
    return max(accounts, key=lambda account: account.total.epsilon, default=None)
