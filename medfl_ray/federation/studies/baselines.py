"""What the same mechanism gives without a federation: each hospital alone, and all data in one place.

Both use the run's own sigma, q and learning rates. A local baseline takes its hospital's own steps; the
central one takes the sum of the hospitals' steps. Each is a release of its own: reserved and charged,
the central one in the ledger of every hospital whose data it pools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, PrivacyConfigError
from medfl_ray.federation.events import BaselineProgress, Event, Notice, PhaseStarted
from medfl_ray.federation.hospital_rules.failures import in_constant_words
from medfl_ray.federation.planning import (
    check_limits,
    extra_budget,
    mechanism_for,
    steps_in_round,
    steps_of_run,
    steps_per_round,
)
from medfl_ray.federation.ports import AlonePlan, AloneResult, StudyStore
from medfl_ray.federation.round_context import RoundContext, foreign_rows
from medfl_ray.federation.studies.checks import check_studies
from medfl_ray.messages import (
    ClientFailure,
    Mechanism,
    Metric,
    PrivacySpent,
    RoundPlan,
    SiteEvaluation,
    mean_over_hospitals,
)
from medfl_ray.params import Vector
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.study_records import SavedResult
from medfl_ray.training.schedules import learning_rate

CENTRAL = "central"


@dataclass(frozen=True)
class Baselines:
    """Held-out metrics per hospital of the local and central models, with what each cost."""

    local: dict[str, dict[str, Metric]] = field(default_factory=dict)
    local_spent: dict[str, PrivacySpent | None] = field(default_factory=dict)
    central: dict[str, dict[str, Metric]] = field(default_factory=dict)
    central_spent: PrivacySpent | None = None
    failures: tuple[ClientFailure, ...] = ()
    local_scores: dict[str, tuple[float, ...] | None] = field(default_factory=dict)
    central_scores: dict[str, tuple[float, ...] | None] = field(default_factory=dict)
    central_curve: dict[int, float] = field(default_factory=dict)
    local_weights: dict[str, Vector] = field(default_factory=dict)


def check_baselines(run: RunConfig, policies: Sequence[SitePolicy]) -> None:
    """Refuse a central baseline where the data may not be pooled, and what `check_studies` refuses.

    Raises:
      ConfigError: some data are private and the hospitals are separate trust domains, or a hospital has the
        name under which the central baseline runs.
      PrivacyConfigError: a hospital does not allow as many steps as the central baseline takes, or its task; or the
        baselines cost more than privacy.extra_epsilon.
    """
    check_studies(run, policies)
    check_extra_epsilon(run, policies)
    if any(policy.hospital == CENTRAL for policy in policies):
        raise ConfigError(f"a hospital is named {CENTRAL!r}, which is the name of the central baseline; rename it")
    if CENTRAL not in run.federation.baselines:
        return
    total = sum(steps_per_round(run, policy) for policy in policies)
    check_limits(central_policy(policies, run.data.name), run.data.task, total, None)
    if run.data.trust_domain == "single":
        return
    private = sorted(policy.hospital for policy in policies if policy.declared == "private")
    if private:
        raise ConfigError(
            f"the central baseline would pool the private data of {', '.join(private)}. Remove 'central' from "
            "federation.baselines, or set data.trust_domain: single where one institution may pool them."
        )


def check_extra_epsilon(run: RunConfig, policies: Sequence[SitePolicy]) -> None:
    """Refuse baselines that a hospital's extra epsilon does not cover, before anything of the run is charged.

    Raises:
      PrivacyConfigError: with what they cost and what is allowed.
    """
    has_local = "local" in run.federation.baselines or run.evaluation.cross_site
    has_central = CENTRAL in run.federation.baselines
    limits = {policy.hospital: extra_budget(run, policy) for policy in policies}
    if not run.privacy.patient_level or not (has_local or has_central) or set(limits.values()) == {None}:
        return
    planned = {policy.hospital: mechanism_for(run, policy) for policy in policies}
    charges = {name: charge_of_run(run, mechanism) for name, mechanism in planned.items() if mechanism is not None}
    central = pooled_charge(list(charges.values())) if has_central and charges else None
    for policy in policies:
        limit, mechanism = limits[policy.hospital], planned[policy.hospital]
        if limit is None or mechanism is None:
            continue
        own = [charges[policy.hospital]] if has_local else []
        cost = epsilon_spent([*own, *([central] if central is not None else [])], mechanism.delta)
        if cost > limit:
            raise PrivacyConfigError(
                f"the run's baselines would spend epsilon={cost:.2f} (patient-level, add/remove adjacency, "
                f"delta={mechanism.delta:g}) at hospital {policy.hospital!r} beside the run's own epsilon; "
                f"privacy.extra_epsilon allows {limit:g}. Set privacy.extra_epsilon to at least that, or leave "
                "federation.baselines and evaluation.cross_site out"
            )


def charge_of_run(run: RunConfig, mechanism: Mechanism) -> Segment:
    """Return what all rounds of a run cost at a hospital that has the mechanism in its first round."""
    steps = steps_of_run(run, mechanism.num_steps)
    return Segment(mechanism.noise_multiplier, mechanism.sample_rate, steps)


def pooled_charge(charges: Sequence[Segment]) -> Segment:
    """Return what the central baseline costs each hospital: everybody's steps at the largest noise and rate."""
    return Segment(
        max(charge.noise_multiplier for charge in charges),
        max(charge.sample_rate for charge in charges),
        sum(charge.num_steps for charge in charges),
    )


def central_policy(policies: Sequence[SitePolicy], data_set: str) -> SitePolicy:
    """Return the policy of all hospitals' data in one place: patients add up, the strictest rule holds."""
    declared = {policy.declared for policy in policies}
    kind = "private" if "private" in declared else "public" if "public" in declared else "synthetic"
    budgets = [policy.max_epsilon for policy in policies if policy.max_epsilon is not None]
    deltas = [policy.delta for policy in policies if policy.delta is not None]
    norms = [policy.max_grad_norm for policy in policies if policy.max_grad_norm is not None]
    steps = [policy.max_steps_per_round for policy in policies if policy.max_steps_per_round is not None]
    tasks = [set(policy.allowed_tasks) for policy in policies if policy.allowed_tasks is not None]
    floors = [policy.min_noise_multiplier for policy in policies if policy.min_noise_multiplier is not None]
    return SitePolicy(
        hospital=CENTRAL,
        data_set=data_set,
        declared=kind,
        num_patients=sum(policy.num_patients for policy in policies),
        max_epsilon=min(budgets) if budgets else None,
        delta=min(deltas) if deltas else None,
        min_noise_multiplier=max(floors) if floors else None,
        max_grad_norm=min(norms) if norms else None,
        max_steps_per_round=min(steps) if steps else None,
        allowed_tasks=tuple(sorted(set.intersection(*tasks))) if tasks else None,
        require_dp=any(policy.require_dp for policy in policies),
        allow_unprotected=all(policy.allow_unprotected for policy in policies),
    )


def run_baselines(
    run: RunConfig,
    context: RoundContext,
    policies: Sequence[SitePolicy],
    initial: Vector,
    emit: Callable[[Event], None],
    saved: StudyStore,
) -> Baselines:
    """Train the baselines that the run names, all at the same time where the pool can, and evaluate them.

    The cross-site matrix needs the local ones, weights included. One that an earlier attempt finished is not trained,
    and so not charged, a second time.
    """
    plans = plan_baselines(run, context, policies)
    emit(PhaseStarted(name="baselines", total_rounds=len(plans)))
    results = {name: kept for name, plan in plans.items() if (kept := kept_result(saved, name, plan)) is not None}
    failures: list[ClientFailure] = []
    missing = {name: plan for name, plan in plans.items() if name not in results}
    for answer in context.pool.train_alone(missing, initial) if missing else ():
        if isinstance(answer, ClientFailure):
            failures.append(answer)
        else:
            results[answer.hospital] = _mirrored(context, answer)
            saved.save(result_name(answer.hospital), as_saved_result(results[answer.hospital]))
        done = len(results) + len(failures)
        emit(BaselineProgress(baseline=answer.hospital, done=done, total=len(plans)))
    central = results.pop(CENTRAL, None)
    sites, problems = _score_central(run, context, central)
    return Baselines(
        local={hospital: result.metrics for hospital, result in results.items()},
        local_spent={hospital: result.spent for hospital, result in results.items()},
        central={hospital: dict(site.metrics) for hospital, site in sites.items()},
        central_spent=central.spent if central is not None else None,
        failures=(*failures, *problems),
        local_scores={hospital: result.patient_scores for hospital, result in results.items()},
        central_scores={hospital: site.patient_scores for hospital, site in sites.items()},
        central_curve=_curve(central),
        local_weights={h: result.weights for h, result in results.items() if result.weights is not None},
    )


def plan_baselines(run: RunConfig, context: RoundContext, policies: Sequence[SitePolicy]) -> dict[str, AlonePlan]:
    """Return what each baseline does: the local ones by hospital, and the central one."""
    plans: dict[str, AlonePlan] = {}
    if "local" in run.federation.baselines or run.evaluation.cross_site:
        # With their weights, so that a later study need not train, and charge, them again.
        plans.update(
            {
                h: _alone(context, h, [context.num_steps[h]], context.mechanisms.get(h), returns_weights=True)
                for h in context.available
            }
        )
    if CENTRAL in run.federation.baselines:
        plans[CENTRAL] = _central(run, context, policies)
    return plans


def result_name(baseline: str) -> str:
    """Return the name under which a finished baseline is kept."""
    return "central" if baseline == CENTRAL else f"local-{baseline}"


def as_saved_result(result: AloneResult) -> SavedResult:
    """Return a finished baseline as it is kept."""
    document = {
        "hospital": result.hospital,
        "metrics": {name: metric.model_dump() for name, metric in result.metrics.items()},
        "spent": result.spent.to_json() if result.spent is not None else None,
        "patient_scores": result.patient_scores,
        "curve": {
            number: {name: metric.model_dump() for name, metric in table.items()}
            for number, table in result.curve.items()
        },
    }
    return SavedResult(document, result.weights)


def kept_result(saved: StudyStore, baseline: str, plan: AlonePlan) -> AloneResult | None:
    """Return a baseline that an earlier attempt finished; None where it lacks the weights that are needed now."""
    piece = saved.load(result_name(baseline))
    if piece is None or (plan.returns_weights and piece.weights is None):
        return None
    raw = piece.document

    def metrics(table: Mapping[str, object]) -> dict[str, Metric]:
        return {name: Metric.model_validate(value) for name, value in table.items()}

    return AloneResult(
        hospital=raw["hospital"],
        metrics=metrics(raw["metrics"]),
        spent=PrivacySpent.model_validate(raw["spent"]) if raw["spent"] is not None else None,
        weights=piece.weights,
        patient_scores=tuple(raw["patient_scores"]) if raw["patient_scores"] is not None else None,
        curve={int(number): metrics(table) for number, table in raw["curve"].items()},
    )


def _curve(central: AloneResult | None) -> dict[int, float]:
    """Return the central model's score per evaluated round, where it may be shown."""
    tables = central.curve if central is not None else {}
    scores = {number: mean_over_hospitals({CENTRAL: table}) for number, table in sorted(tables.items())}
    return {number: score for number, score in scores.items() if score is not None}


def _mirrored(context: RoundContext, result: AloneResult) -> AloneResult:
    """Keep the ledger rows that a baseline wrote, and take them off its result."""
    if result.spent is None:
        return result
    foreign = foreign_rows(result.hospital, result.spent, context.available if result.hospital == CENTRAL else ())
    if foreign is not None:
        context.emit(Notice(message=f"note: the baseline of {result.hospital}: {foreign}; none of its rows was taken"))
    problems = context.mirror.keep(result.spent.ledger_rows if foreign is None else ())
    for reason in problems.values():
        context.emit(Notice(message=f"note: {reason}"))
    return replace(result, spent=result.spent.model_copy(update={"ledger_rows": ()}))


def _central(run: RunConfig, context: RoundContext, policies: Sequence[SitePolicy]) -> AlonePlan:
    present = [policy for policy in policies if policy.hospital in context.available]
    steps = [context.num_steps[policy.hospital] for policy in present]
    policy = central_policy(present, run.data.name)
    mechanism = mechanism_for(run, policy)
    if mechanism is not None:
        own = [context.mechanisms[p.hospital] for p in present]
        mechanism = mechanism.model_copy(
            update={
                "num_steps": sum(steps),
                "noise_multiplier": max(m.noise_multiplier for m in own),
                "sample_rate": max(m.sample_rate for m in own),
            }
        )
    return _alone(context, CENTRAL, steps, mechanism, returns_weights=True)


def _alone(
    context: RoundContext,
    hospital: str,
    steps: Sequence[int],
    mechanism: Mechanism | None,
    returns_weights: bool,
) -> AlonePlan:
    """Plan the rounds of a baseline that takes the steps of one or several hospitals, as many as they in each."""
    run = context.run
    kind = CENTRAL if hospital == CENTRAL else "local"
    charged = context.available if hospital == CENTRAL else (hospital,)
    heads = context.mirror.heads(charged) if mechanism is not None else {}
    totals = [
        sum(steps_in_round(run, first, number) for first in steps) for number in range(1, run.federation.rounds + 1)
    ]
    rounds = tuple(
        RoundPlan(
            job=f"{context.job}/{kind}",
            round=number,
            attempt=context.attempt,
            config_hash=run.config_hash,
            weights_checksum="",
            hospitals=(hospital,),
            num_steps={hospital: total},
            learning_rate=learning_rate(run.training, number, run.federation.rounds),
            mechanisms={} if mechanism is None else {hospital: mechanism.model_copy(update={"num_steps": total})},
            ledger_heads=heads,
        )
        for number, total in enumerate(totals, 1)
    )
    return AlonePlan(rounds, returns_weights, evaluates=hospital == CENTRAL and run.evaluation.target_dice is not None)


def _score_central(
    run: RunConfig, context: RoundContext, central: AloneResult | None
) -> tuple[dict[str, SiteEvaluation], list[ClientFailure]]:
    scores: dict[str, SiteEvaluation] = {}
    failures: list[ClientFailure] = []
    if central is not None and central.weights is not None:
        for answer in context.pool.evaluate(0, context.available, central.weights, pictures=False, deadline_s=None):
            if isinstance(answer, SiteEvaluation):
                scores[answer.hospital] = answer
            else:
                failures.append(in_constant_words(answer) if context.secret_cohorts else answer)
    return scores, failures


def as_plain(baselines: Baselines) -> Mapping[str, object]:
    """Return the baselines as JSON-able data, in the form that the report reads."""

    def plain(metrics: Mapping[str, Metric]) -> dict[str, object]:
        return {name: metric.model_dump() for name, metric in metrics.items()}

    def spent(value: PrivacySpent | None) -> object:
        return value.to_json() if value is not None else None

    document: dict[str, object] = {}
    if baselines.local:
        document["local"] = {
            hospital: {
                "metrics": plain(metrics),
                "spent": spent(baselines.local_spent.get(hospital)),
                "patient_scores": baselines.local_scores.get(hospital),
            }
            for hospital, metrics in sorted(baselines.local.items())
        }
    if baselines.central:
        document["central"] = {
            "metrics": {hospital: plain(metrics) for hospital, metrics in sorted(baselines.central.items())},
            "spent": spent(baselines.central_spent),
            "patient_scores": baselines.central_scores,
            "curve": baselines.central_curve,
        }
    document["failures"] = [failure.model_dump() for failure in baselines.failures]
    return document
