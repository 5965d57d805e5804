"""What a search may cost, decided before its first trial: nothing, every trial composed, or the best one released."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import BudgetExceeded, ConfigError, PrivacyConfigError
from medfl_ray.federation.planning import account_delta, delta_of, mechanisms, steps_of_run
from medfl_ray.privacy.account import INFINITE, epsilon_words
from medfl_ray.privacy.accountant import Charge, Segment, epsilon_spent
from medfl_ray.privacy.search_cost import merge_kinds, selected_epsilon, worst_case_epsilon
from tune.accounts import Past
from tune.private_folders import refuse_private_folders
from tune.space import Parameters, SearchConfig, trial_run, with_parameters

TERMS = "unit patient, adjacency add/remove"


@dataclass(frozen=True)
class Terms:
    """How a search was accounted, and the sentences that its report says of it.

    worst_case: per hospital, the epsilon that was checked against its budget. selected: with accounting `select`, the
    epsilon of what is released.
    """

    accounting: str
    words: str
    delta: float
    worst_case: Mapping[str, float]
    selected: float | None = None


def with_noise(run: RunConfig, policies: Sequence[SitePolicy]) -> RunConfig:
    """Return a trial's run with its noise multiplier written out: the largest that any of its hospitals needs.

    A trial that is interrupted charges a round twice. With epsilon as a limit it would then lack its last round.

    Raises:
      PrivacyConfigError: a hospital does not allow what the trial asks.
    """
    if run.privacy.noise_multiplier is not None:
        sigma = run.privacy.noise_multiplier
    else:
        allowing = [policy.model_copy(update={"min_noise_multiplier": None}) for policy in policies]
        sigma = max(mechanism.noise_multiplier for mechanism in mechanisms(run, allowing).values())
    privacy = run.privacy.model_copy(update={"epsilon": None, "noise_multiplier": sigma})
    return run.model_copy(update={"privacy": privacy})


def trial_segments(run: RunConfig, policies: Sequence[SitePolicy]) -> dict[str, Segment]:
    """Return what a whole trial charges to each hospital.

    Raises:
      PrivacyConfigError: a hospital does not allow it.
    """
    return {
        hospital: Segment(m.noise_multiplier, m.sample_rate, steps_of_run(run, m.num_steps))
        for hospital, m in mechanisms(run, policies).items()
    }


def trial_epsilon(run: RunConfig, policies: Sequence[SitePolicy]) -> float:
    """Return the largest epsilon that a whole trial costs a hospital (patient, add/remove), at that run's delta."""
    by_name = {policy.hospital: policy for policy in policies}
    return max(
        epsilon_spent([segment], delta_of(run, by_name[name]))
        for name, segment in trial_segments(run, policies).items()
    )


def costly_runs(search: SearchConfig, raw: Mapping[str, Any], policies: Sequence[SitePolicy]) -> list[RunConfig]:
    """Return the costliest trial of every number of local steps that the search may draw."""
    fixed: dict[str, float | int | str] = {}
    if search.space.epsilon is not None:
        fixed["epsilon"] = search.space.epsilon.high
    if search.space.noise_multiplier is not None:
        fixed["noise_multiplier"] = search.space.noise_multiplier.low
    if search.space.clip_norm is not None:
        fixed["clip_norm"] = search.space.clip_norm.high
    steps = search.space.local_steps.values if search.space.local_steps is not None else (None,)
    points: list[Parameters] = [fixed if n is None else {**fixed, "local_steps": n} for n in steps]
    return [with_noise(trial_run(search, raw, point), policies) for point in points]


def check_terms(
    search: SearchConfig,
    raw: Mapping[str, Any],
    policies: Sequence[SitePolicy],
    history: Past,
    num_left: int,
) -> Terms:
    """Decide how a search is accounted, or refuse it.

    Args:
      past: what each hospital's ledger holds already, this search's earlier trials included.
      num_left: trials that are not finished yet; with none left only what there is already is said.

    Raises:
      ConfigError: the trials could not be judged, or are no private runs.
      PrivacyConfigError: the accounting that was asked for does not hold for these data.
      BudgetExceeded: the worst case of all trials passes a hospital's budget, or its account is infinite.
    """
    run = check_judgement(search, raw, policies)
    refuse_private_folders(run, with_parameters(search, raw, first_point(search)), search.score_data)
    deltas = {policy.hospital: account_delta(run, policy) for policy in policies}
    if search.accounting != "compose":
        refuse_own_accounts(run, policies)
    if search.accounting == "public":
        refuse_private([policy.hospital for policy in policies if policy.declared == "private"])
        return Terms("public", PUBLIC_WORDS, max(deltas.values()), {})
    if search.accounting == "select":
        refuse_cut_short(policies)
    else:
        refuse_undeclared(policies)
    segments = [trial_segments(costly, policies) for costly in costly_runs(search, raw, policies)]
    kinds = {policy.hospital: [each[policy.hospital] for each in segments] for policy in policies}
    if search.accounting == "select":
        return _selected(search, kinds, deltas)
    worst = {name: _worst_case(name, history, kinds[name], num_left, delta) for name, delta in deltas.items()}
    if num_left:
        refuse_unprotected(policies, history.unprotected)
        refuse_over_budget(policies, worst, deltas, num_left)
        refuse_too_many_steps(policies, kinds, history.charged, num_left)
    return Terms("compose", composed_words(history.unprotected), max(deltas.values()), worst)


def _worst_case(hospital: str, history: Past, kinds: Sequence[Segment], num_left: int, delta: float) -> float:
    if hospital in history.unprotected or not num_left:
        return history.epsilon(hospital, delta)
    return worst_case_epsilon(history.charged.get(hospital, ()), kinds, num_left, delta)


PUBLIC_WORDS = (
    "The trials ran on synthetic or public data. They charged nothing to any hospital's ledger; only the final run, "
    "with the recommended configuration, is charged."
)
COMPOSED_WORDS = (
    "The trials ran on private data. Each was a run of its own, reserved and charged in the hospitals' ledgers and "
    "composed by privacy loss distributions (PLD). The search began only because the worst case of all its trials "
    "fitted every budget{}."
)
SELECTED_WORDS = (
    "The best of a secret, random number of trials is released and nothing else: neither the other trials nor how "
    "many there were. Its epsilon is that of repeat-and-select (Renyi, dp-accounting), and holds for this release."
)


def composed_words(unprotected: Collection[str]) -> str:
    """Say how trials on private data were accounted, and of which hospitals no budget says anything any more."""
    if not unprotected:
        return COMPOSED_WORDS.format("")
    names = ", ".join(repr(name) for name in sorted(unprotected))
    return (
        COMPOSED_WORDS.format(" that still holds")
        + f" The epsilon of {names} is {INFINITE}: the data were used without patient-level differential privacy, so "
        "that no epsilon bounds what was revealed of a patient, whatever the trials themselves were charged."
    )


def check_judgement(search: SearchConfig, raw: Mapping[str, Any], policies: Sequence[SitePolicy]) -> RunConfig:
    """Return the trial at the lower corner of the space, after a look at whether the search can judge trials at all.

    Raises:
      ConfigError: it cannot, or they have no epsilon.
    """
    run = trial_run(search, raw, first_point(search))
    check_patient_level(run)
    if run.data.task != "segmentation":
        raise ConfigError("a search judges its trials by Dice; data.task is 'classification': use a segmentation run")
    shows = any(policy.declared != "private" for policy in policies)
    if not shows and search.score_data is None:
        raise ConfigError(
            "every hospital keeps its scores to itself, since they come from private patients; give score_data, "
            "a folder of public labelled images on which the trials are judged"
        )
    if not shows and search.stopping != "none":
        raise ConfigError(
            "no hospital shows its score of a round, so that no trial can be stopped early; stopping: none"
        )
    if search.pool == "virtual" and any(policy.declared != "synthetic" for policy in policies):
        raise ConfigError(
            "pool: virtual is for synthetic hospitals, which keep no ledger of their own; use pool: local"
        )
    return run


def check_patient_level(run: RunConfig) -> None:
    """Refuse a trial without patient-level differential privacy: it has no epsilon, and may leave an infinite one.

    Raises:
      ConfigError: that is so.
    """
    if not run.privacy.patient_level:
        raise ConfigError(
            "a search weighs patient-level epsilon against Dice; set privacy.enable_dp: true and privacy.unit: patient "
            "in the run's file"
        )


def first_point(search: SearchConfig) -> Parameters:
    """Return one point of the space, its lower corner."""
    return {
        name: value.choices[0] if hasattr(value, "choices") else value.low
        for name, value in search.space.ranges.items()
    }


def refuse_private(private: Sequence[str]) -> None:
    """Refuse private data to a search that charges nothing.

    Raises:
      PrivacyConfigError: a hospital's data are private.
    """
    if private:
        raise PrivacyConfigError(
            f"hospital {private[0]!r} has private data, and accounting: public charges no trial. Give the search "
            "phantoms or a public set under data, or set accounting: compose, with which every trial is charged"
        )


def refuse_own_accounts(run: RunConfig, policies: Iterable[SitePolicy]) -> None:
    """Refuse to call trials free, or their number a secret, where a ledger that outlives the search holds them.

    Where a hospital's own file says what it declares, the search cannot give it another ledger.

    Raises:
      PrivacyConfigError: a hospital has public data, and that of it or another one is said in such a file.
    """
    public = [policy.hospital for policy in policies if policy.declared == "public"]
    if public and any(hospital.site_config is not None for hospital in run.data.hospitals):
        raise PrivacyConfigError(
            f"hospital {public[0]!r} has public data and a ledger that outlives the search, in which every trial would "
            "be charged; set accounting: compose, or search on phantoms (data)"
        )


def refuse_unprotected(policies: Iterable[SitePolicy], unprotected: Collection[str]) -> None:
    """Refuse data whose account is infinite, unless the hospital's own policy gives the protection up.

    Raises:
      BudgetExceeded: names the first such hospital.
    """
    for policy in policies:
        bound = policy.declared == "private" or policy.max_epsilon is not None
        if bound and policy.hospital in unprotected and not policy.allow_unprotected:
            raise BudgetExceeded(
                f"the epsilon of hospital {policy.hospital!r} on data set {policy.data_set!r} is {INFINITE}: it was "
                "used without patient-level differential privacy, and no trial fits any budget. Only the hospital's "
                "own policy can allow more: privacy.allow_unprotected. Else search on phantoms (data)"
            )


def refuse_cut_short(policies: Iterable[SitePolicy]) -> None:
    """Refuse repeat-and-select accounting where a budget could end the search early.

    Raises:
      PrivacyConfigError: a hospital has a budget, or private data, which always have one.
    """
    limited = [p.hospital for p in policies if p.declared == "private" or p.max_epsilon or p.max_total_steps]
    if limited:
        raise PrivacyConfigError(
            f"hospital {limited[0]!r} has a budget, whose ledger charges every trial in full and may refuse one: the "
            "number of trials would no longer have the distribution that accounting: select accounts for. Use "
            "accounting: compose"
        )


def refuse_undeclared(policies: Iterable[SitePolicy]) -> None:
    """Refuse private data without a declared budget: such data are for one run, and a search is many.

    Raises:
      PrivacyConfigError: a hospital has private data and no max_epsilon.
    """
    loose = [p.hospital for p in policies if p.declared == "private" and p.max_epsilon is None]
    if loose:
        raise PrivacyConfigError(
            f"hospital {loose[0]!r} has private data and no max_epsilon; a search is many runs, so let the hospital "
            "declare its lifetime budget, or search on phantoms (data) first"
        )


def refuse_over_budget(
    policies: Iterable[SitePolicy], worst: Mapping[str, float], deltas: Mapping[str, float], num_left: int
) -> None:
    """Refuse a search whose worst case passes a budget.

    Raises:
      BudgetExceeded: names the first hospital, the worst case and the budget.
    """
    for policy in policies:
        after, limit = worst.get(policy.hospital, 0.0), policy.max_epsilon
        if math.isinf(after) and policy.allow_unprotected:
            continue  # the hospital's ledger no longer asks for its lifetime budget either
        if limit is not None and after > limit:
            raise BudgetExceeded(
                f"{num_left} trials could bring hospital {policy.hospital!r} to epsilon={epsilon_words(after)}; "
                f"its budget is {limit:g} ({TERMS}, delta={deltas[policy.hospital]:g}, what it has spent included). "
                "Lower trials or space.epsilon, raise space.noise_multiplier, or search on phantoms (data)"
            )


def refuse_too_many_steps(
    policies: Iterable[SitePolicy],
    kinds: Mapping[str, Sequence[Segment]],
    charged: Mapping[str, Sequence[Charge]],
    num_left: int,
) -> None:
    """Refuse a search whose worst case passes the number of private steps that a hospital allows in all.

    Raises:
      BudgetExceeded: names the first hospital and both numbers.
    """
    for policy in policies:
        before = sum(charge.num_steps for charge in charged.get(policy.hospital, ()))
        total = before + num_left * max(kind.num_steps for kind in kinds[policy.hospital])
        if policy.max_total_steps is not None and total > policy.max_total_steps:
            raise BudgetExceeded(
                f"{num_left} trials could bring hospital {policy.hospital!r} to {total} private steps; it allows "
                f"{policy.max_total_steps} in all. Lower trials, federation.rounds or space.local_steps"
            )


def _selected(search: SearchConfig, kinds: Mapping[str, Sequence[Segment]], deltas: Mapping[str, float]) -> Terms:
    assert search.num_trials is not None
    drawn = search.num_trials
    shape = math.inf if drawn.distribution == "poisson" else drawn.shape
    found = {}
    for hospital, own in kinds.items():
        each = merge_kinds(own)
        worst = Segment(
            min(k.noise_multiplier for k in each), max(k.sample_rate for k in each), max(k.num_steps for k in each)
        )
        found[hospital] = selected_epsilon(worst, deltas[hospital], drawn.mean, shape)
    return Terms("select", SELECTED_WORDS, max(deltas.values()), found, max(found.values()))
