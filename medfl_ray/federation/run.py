"""A run: gather the hospitals, repeat rounds until done or stopped, then baselines and a last evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from medfl_ray import params
from medfl_ray.aggregation.robust import combine
from medfl_ray.aggregation.strategies import ServerState, build_strategy, released_weights
from medfl_ray.aggregation.updates import Updates
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, FederationError, QuorumLost
from medfl_ray.federation.attacks import check_attack
from medfl_ray.federation.events import AccountsClosed, HospitalState, Notice, PhaseStarted, RoundClosed
from medfl_ray.federation.hospital_level import FEDERATION, HospitalLevel, HospitalLevelPlan, plan_hospital_level
from medfl_ray.federation.hospital_rules.failures import in_constant_words, start_failure
from medfl_ray.federation.planning import aggregation_weight, check_rule, mechanisms, steps_per_round
from medfl_ray.federation.policies import FailureHistory, RunHistory, can_start, pause_before
from medfl_ray.federation.ports import (
    FederationState,
)
from medfl_ray.federation.round_context import Combine, RoundContext, foreign_rows
from medfl_ray.federation.rounds import run_round
from medfl_ray.federation.run_parts import Ending, RunOutcome, RunParts, RunStore
from medfl_ray.federation.selection import select_evaluated, select_of_run
from medfl_ray.federation.stopping import stopping_record, why_stop
from medfl_ray.federation.studies.baselines import as_plain, check_baselines, run_baselines
from medfl_ray.federation.studies.cross_site import run_studies
from medfl_ray.messages import (
    ClientFailure,
    HospitalInfo,
    LedgerRows,
    Mechanism,
    PrivacySpent,
    SiteEvaluation,
)
from medfl_ray.params import Layout, Vector
from medfl_ray.study_records import STOPPING_FILE, STUDIES_FILE

__all__ = ["RunOutcome", "RunParts", "RunStore", "run_federation"]


def run_federation(parts: RunParts) -> RunOutcome:
    """Run all rounds, baselines and the last evaluation.

    Raises:
      QuorumLost: too few hospitals are present to start.
      FederationError: the hospitals' data do not fit one network.
      ConfigError, PrivacyConfigError: a baseline, a mechanism, a robust rule or a study of attacks is refused before
        anything is trained.
    """
    check_baselines(parts.run, parts.policies)
    check_attack(parts.run, parts.policies)
    hospital_dp, planned = plan_hospital_level(parts.run, parts.policies), mechanisms(parts.run, parts.policies)
    announce(parts)
    infos, absent = with_pinned_keys(parts, *gather(parts))
    check_rule(parts.run, len(infos))
    layout, initial = parts.initial_weights(*network_shape(parts.run, infos))
    check_layouts(infos, layout)
    parts.store.save_hospitals(infos, absent)
    parts.store.save_group_sizes(
        {info.hospital: info.patient_group_size for info in infos if info.patient_group_size is not None},
        next((info.hospitals_per_group for info in infos if info.hospitals_per_group is not None), None),
    )
    context = context_of(parts, infos, layout, planned, hospital_dp)
    resumed = parts.store.resume()
    history = RunHistory(FailureHistory(parts.store.receipts()))
    for problem in parts.store.problems:
        parts.emit(Notice(message=f"note: {problem}"))
    kept = resumed or FederationState(0, initial, context.strategy.init(layout.size))
    state = FederationState(kept.round, kept.weights, kept.server_state)
    if context.hospital_dp is not None:
        context.hospital_dp.restore(state.server_state)
    end = repeat_rounds(parts, context, state, history)
    outcome = RunOutcome(
        rounds_done=end.state.round,
        ending=end.ending,
        reason=end.reason,
        absent=tuple(sorted({p.hospital for p in parts.policies} - end.trained - never_asked(parts, context))),
        weights_checksum=checksum_of(end.state),
    )
    if not outcome.completed:
        return outcome
    return replace(outcome, weights_checksum=checksum_of(finish(parts, context, end.state, initial, absent)))


def checksum_of(state: FederationState) -> str:
    """Return the checksum of the weights that a state releases."""
    return params.checksum(released_weights(state.server_state, state.weights))


def context_of(
    parts: RunParts,
    infos: Sequence[HospitalInfo],
    layout: Layout,
    planned: Mapping[str, Mechanism],
    hospital_dp: HospitalLevelPlan | None,
) -> RoundContext:
    """Return what stays the same over the rounds of a run."""
    present = tuple(sorted(info.hospital for info in infos))
    policies = {policy.hospital: policy for policy in parts.policies}
    return RoundContext(
        run=parts.run,
        job=parts.job,
        attempt=parts.store.next_attempt(),
        layout=layout,
        strategy=build_strategy(parts.run.aggregation, len(parts.policies)),
        pool=parts.pool,
        store=parts.store,
        mirror=parts.mirror,
        available=present,
        num_steps={hospital: steps_per_round(parts.run, policies[hospital]) for hospital in present},
        aggregation_weights={hospital: aggregation_weight(parts.run, policies[hospital]) for hospital in present},
        mechanisms={hospital: planned[hospital] for hospital in present if hospital in planned},
        keys={info.hospital: info.public_key for info in infos if info.public_key is not None},
        is_signed=parts.is_signed,
        emit=parts.emit,
        evaluated=select_evaluated(present, parts.run.federation.eval_hospitals, parts.run.federation.seed),
        select=parts.select or partial(select_of_run, parts.run),
        hospital_dp=start_hospital_level(parts, hospital_dp, layout.size),
        combine=parts.combine or robust_combiner(parts.run),
    )


def never_asked(parts: RunParts, context: RoundContext) -> set[str]:
    """Return the hospitals that were present and that no round has drawn."""
    return set(context.available).difference(*(receipt.asked for receipt in parts.store.receipts()))


def announce(parts: RunParts) -> None:
    """Say that the run starts, and that it contains attackers where it does."""
    parts.emit(PhaseStarted(name="start", total_rounds=parts.run.federation.rounds))
    for note in notes_of_budgets(parts.run, parts.policies):
        parts.emit(Notice(message=note))
    if parts.run.attack is not None:
        parts.emit(Notice(message=f"WARNING: this run contains attackers: {parts.run.attack.words}"))


def notes_of_budgets(run: RunConfig, policies: Sequence[SitePolicy]) -> list[str]:
    """Say which budgets do not bind a run without patient-level privacy: those of data that are not private."""
    idle = sorted(p.hospital for p in policies if p.max_epsilon is not None and p.declared != "private")
    if run.privacy.patient_level or not idle:
        return []
    return [
        f"note: {', '.join(idle)} declared max_epsilon for data that are not private; this run has no patient-level "
        "differential privacy and charges nothing to it"
    ]


def robust_combiner(run: RunConfig) -> Combine | None:
    """Return the rule over all updates that a run configures, or None where it takes their mean."""
    if run.aggregation.mode != "robust":
        return None

    def rule(updates: Updates, state: ServerState, weights: Vector) -> tuple[Vector, ServerState]:
        return combine(run.aggregation.robust, updates, state)

    return rule


def start_hospital_level(parts: RunParts, plan: HospitalLevelPlan | None, num_parameters: int) -> HospitalLevel | None:
    """Open the federation's account and warn of a federation that is too small, under hospital-level DP."""
    if plan is None:
        return None
    if plan.warning is not None:
        parts.emit(Notice(message=f"WARNING: {plan.warning}"))
    return HospitalLevel(parts.run, plan, parts.open_federation_ledger(), num_parameters)


def gather(parts: RunParts) -> tuple[list[HospitalInfo], list[ClientFailure]]:
    """Start every hospital; refuse to begin with too few.

    Raises:
      ConfigError: too few are present, and whoever is absent says that the configuration is to blame.
      QuorumLost: too few are present.
    """
    infos: list[HospitalInfo] = []
    absent: list[ClientFailure] = []
    for answer in parts.pool.describe():
        if isinstance(answer, ClientFailure):
            absent.append(answer)
            parts.emit(HospitalState(hospital=answer.hospital, state="failed", detail=answer.reason))
        else:
            infos.append(answer)
            parts.emit(HospitalState(hospital=answer.hospital, state="waiting"))
    decision = can_start(parts.run.federation, len(infos))
    if not decision.may_start:
        details = reasons(absent)
        why = f"{decision.reason}. {details}" if details else decision.reason
        if absent and all(failure.config_fault for failure in absent):
            raise ConfigError(why)
        raise QuorumLost(why)
    return infos, absent


def with_pinned_keys(
    parts: RunParts, infos: Sequence[HospitalInfo], absent: Sequence[ClientFailure]
) -> tuple[list[HospitalInfo], list[ClientFailure]]:
    """Pin the key of each hospital's ledger and mirror the rows that it shows at the start.

    One that shows another key than before, or rows that do not follow those kept, takes no part.

    Raises:
      QuorumLost: too few hospitals are left.
    """
    private = {policy.hospital for policy in parts.policies if policy.declared == "private"}
    keys = {
        info.hospital: info.public_key
        for info in infos
        if info.public_key is not None and (parts.run.privacy.patient_level or info.hospital in private)
    }
    problems = dict(parts.mirror.pin(keys))
    for info in infos:
        foreign = foreign_rows(info.hospital, info.spent)
        if foreign is not None:
            problems[info.hospital] = foreign
        elif info.spent is not None and info.hospital not in problems:
            problems |= parts.mirror.keep(info.spent.ledger_rows)
    infos = [_without_rows(info) for info in infos]
    refused = [start_failure(hospital, reason) for hospital, reason in problems.items()]
    for failure in refused:
        parts.emit(HospitalState(hospital=failure.hospital, state="failed", detail=failure.reason))
    left = [info for info in infos if info.hospital not in problems]
    decision = can_start(parts.run.federation, len(left))
    if refused and not decision.may_start:
        raise QuorumLost(f"{decision.reason}. {reasons([*absent, *refused])}")
    return left, [*absent, *refused]


def _without_rows(info: HospitalInfo) -> HospitalInfo:
    if info.spent is None:
        return info
    return info.model_copy(update={"spent": info.spent.model_copy(update={"ledger_rows": ()})})


def reasons(failures: Sequence[ClientFailure]) -> str:
    """Return why hospitals failed, in one sentence; a reason that several share is said once."""
    by_reason: dict[str, list[str]] = {}
    for failure in failures:
        by_reason.setdefault(failure.reason, []).append(failure.hospital)
    return "; ".join(f"{', '.join(hospitals)}: {reason}" for reason, hospitals in by_reason.items())


def network_shape(run: RunConfig, infos: Sequence[HospitalInfo]) -> tuple[int, int]:
    """Return input and output channels, on which all hospitals must agree.

    Raises:
      FederationError: they do not.
    """
    shapes = {(info.num_channels, tuple(sorted(info.labels))) for info in infos}
    if len(shapes) > 1:
        details = "; ".join(f"{i.hospital}: {i.num_channels} channels, labels {sorted(i.labels)}" for i in infos)
        raise FederationError(
            f"the hospitals' data do not fit one network ({details}). Name data.channels and data.labels in the "
            "configuration, so that a hospital without a label agrees with the others."
        )
    channels, labels = next(iter(shapes))
    return run.model.in_channels or channels, run.model.out_channels or max(labels, default=1) + 1


def check_layouts(infos: Sequence[HospitalInfo], layout: Layout) -> None:
    """Check that every hospital built the coordinator's network.

    Raises:
      FederationError: one built another, which a different version of the software would explain.
    """
    for info in infos:
        if info.layout_checksum != layout.checksum:
            raise FederationError(
                f"hospital {info.hospital!r} built a network with another layout than the coordinator; "
                "install the same version of medfl-ray and its dependencies on both"
            )


@dataclass(frozen=True)
class RoundsEnd:
    """How the rounds of a run ended; `trained` are the hospitals whose update was in a sum."""

    state: FederationState
    ending: Ending
    reason: str
    trained: set[str]


def repeat_rounds(parts: RunParts, context: RoundContext, state: FederationState, history: RunHistory) -> RoundsEnd:
    """Run rounds until all are published, quorum is lost for good, or somebody asks to stop."""
    trained = {hospital for receipt in parts.store.receipts() for hospital in (*receipt.trained, *receipt.late)}
    if context.secret_cohorts:
        trained.update(context.available)  # who was drawn stays with the coordinator; these could be
    parts.emit(PhaseStarted(name="federated", total_rounds=parts.run.federation.rounds))
    while state.round < parts.run.federation.rounds:
        early = ends_early(parts, state)
        if early:
            return RoundsEnd(state, "ended_early", early, trained)
        if parts.stop.is_set():
            return RoundsEnd(state, "stopped", f"stopped on request after round {state.round}", trained)
        end = run_round(context, state, history)
        state, history, receipt = end.state, end.history, end.result.receipt
        trained.update((*receipt.trained, *receipt.late))
        parts.emit(RoundClosed(result=end.result))
        if end.decision.verdict == "stop":
            why = reasons(receipt.failures)
            lost = f"round {state.round + 1} was not published: {end.decision.reason}"
            return RoundsEnd(state, "quorum_lost", f"{lost}. {why}" if why else lost, trained)
        if end.decision.verdict == "skip":
            if any(failure.transient for failure in receipt.failures):
                # Processes that are starting again need longer than a round that nobody answers.
                parts.stop.wait(pause_before(history.failed_before + 3))
            context = replace(context, attempt=parts.store.next_attempt())
    return RoundsEnd(state, "all_rounds", f"all {parts.run.federation.rounds} rounds were published", trained)


def ends_early(parts: RunParts, state: FederationState) -> str:
    """Say why no further round is run, empty where there is no such reason; a resumed run finds the same."""
    if parts.run.federation.patience is None:
        return ""
    return why_stop(parts.run, parts.store.results(), state.round)


def kept_state(parts: RunParts, state: FederationState) -> FederationState:
    """Return the round whose weights are exported, and write down which that is."""
    federation = parts.run.federation
    best = parts.store.best() if federation.keep == "best" else None
    kept = FederationState(best.round, best.weights, best.server_state) if best is not None else state
    if federation.patience is not None or federation.keep == "best":
        parts.store.save_record(
            STOPPING_FILE, stopping_record(parts.run, parts.store.results(), state.round, kept.round)
        )
    return kept


def finish(
    parts: RunParts,
    context: RoundContext,
    state: FederationState,
    initial: Vector,
    absent: Sequence[ClientFailure],
) -> FederationState:
    """Evaluate the kept weights with pictures, write them, then train baselines and studies and export the ledgers."""
    parts.emit(PhaseStarted(name="evaluate"))
    state = kept_state(parts, state)
    weights = released_weights(state.server_state, state.weights)
    deadline_s = parts.run.federation.deadline_s
    answers = list(parts.pool.evaluate(state.round, context.evaluated, weights, pictures=True, deadline_s=deadline_s))
    evaluations = [answer for answer in answers if isinstance(answer, SiteEvaluation)]
    unscored = [answer for answer in answers if isinstance(answer, ClientFailure)]
    failures = [*absent, *(map(in_constant_words, unscored) if context.secret_cohorts else unscored)]
    parts.store.save_final(weights, context.layout, evaluations, failures)
    follow_up(parts, context, initial)
    ledgers = parts.pool.export_ledgers()
    federation = {} if context.hospital_dp is None else {FEDERATION: context.hospital_dp.export()}
    own = {name: export for name, export in ledgers.items() if export and export.get("hospital") == name}
    for name in sorted(name for name, export in ledgers.items() if export and name not in own):
        parts.emit(Notice(message=f"note: {name} exported a ledger of another hospital, which is not kept"))
    exports = [*own.values(), *(export for export in federation.values() if export)]
    parts.store.save_ledgers({**own, **federation})
    spent = {export["hospital"]: PrivacySpent.model_validate(export["spent"]) for export in exports}
    parts.emit(AccountsClosed(spent=spent))
    for reason in parts.mirror.keep(rows_of(export) for export in exports).values():
        parts.emit(Notice(message=f"note: {reason}"))
    return state


def follow_up(parts: RunParts, context: RoundContext, initial: Vector) -> None:
    """Train the baselines, then the studies that need them; what an earlier attempt finished stands."""
    run, saved = parts.run, parts.store.saved
    local_weights: Mapping[str, Vector] = {}
    if run.federation.baselines or run.evaluation.cross_site:
        baselines = run_baselines(run, context, parts.policies, initial, parts.emit, saved)
        parts.store.save_baselines(as_plain(baselines))
        local_weights = baselines.local_weights
    if run.evaluation.has_studies:
        record = run_studies(context, initial, local_weights, saved, parts.emit, parts.train_coalitions)
        for problem in record.problems:
            parts.emit(Notice(message=f"note: a study was not finished: {problem}"))
        parts.store.save_record(STUDIES_FILE, record)


def rows_of(export: Mapping[str, Any]) -> LedgerRows:
    """Return a ledger's export as the mirror takes it."""
    return LedgerRows(
        hospital=export["hospital"],
        data_set=export["data_set"],
        public_key=export["public_key"],
        events=tuple(export["events"]),
    )
