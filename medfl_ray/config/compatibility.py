"""Whether a run's sections go with one another: for each pair that does not, one sentence with what to do."""

from __future__ import annotations

from medfl_ray.config.aggregation import AggregationConfig, AttackConfig
from medfl_ray.config.data import DataConfig
from medfl_ray.config.evaluation import EvaluationConfig
from medfl_ray.config.federation import FederationConfig
from medfl_ray.config.privacy import PrivacyConfig
from medfl_ray.config.strategies import strategies_with


def strategy_problem(
    aggregation: AggregationConfig, federation: FederationConfig, privacy: PrivacyConfig, optimizer: str
) -> str | None:
    """Return why a run's strategy does not go with its other sections, or None where it does."""
    return (
        _settings_problem(aggregation)
        or _optimizer_problem(aggregation, optimizer)
        or _federation_problem(aggregation, federation)
        or _privacy_problem(aggregation, privacy)
    )


def _settings_problem(aggregation: AggregationConfig) -> str | None:
    strategy, traits = aggregation.strategy, aggregation.traits
    if aggregation.local_parameters and not traits.partial:
        return (
            f"aggregation.local_parameters does not go with strategy {strategy!r}; use {strategies_with('partial')}, "
            "which keep parameters in the hospital"
        )
    if aggregation.head_steps is not None and not traits.head_first:
        return f"aggregation.head_steps belongs to strategy '{strategies_with('head_first')}'; leave it out"
    if aggregation.proximal_mu and traits.drift_corrected:
        return (
            f"aggregation.proximal_mu does not go with strategy {strategy!r}, which has a correction of its own that "
            "assumes no other pull; leave it out"
        )
    return None


def _optimizer_problem(aggregation: AggregationConfig, optimizer: str) -> str | None:
    if aggregation.traits.needs_sgd and optimizer != "sgd":
        return (
            f"aggregation.strategy {aggregation.strategy!r} counts how far a unit of gradient has led, which "
            f"{optimizer} does not say; set training.optimizer: sgd, with momentum if you like"
        )
    return None


def _federation_problem(aggregation: AggregationConfig, federation: FederationConfig) -> str | None:
    strategy, traits = aggregation.strategy, aggregation.traits
    if federation.stragglers == "keep" and traits.tied_to_its_round:
        return (
            f"federation.stragglers: keep does not go with aggregation.strategy {strategy!r}, whose updates only fit "
            "the round that asked for them; set stragglers: drop"
        )
    if federation.keep == "best" and traits.personal:
        return (
            f"federation.keep: best does not go with aggregation.strategy {strategy!r}, with which every hospital goes "
            "on with a model of its own from the last round; leave it out"
        )
    if federation.over_selection and traits.drift_corrected:
        return (
            f"federation.over_selection does not go with aggregation.strategy {strategy!r}: a hospital that was not "
            "needed would remember a round that the server does not know of; leave it out"
        )
    return None


def _privacy_problem(aggregation: AggregationConfig, privacy: PrivacyConfig) -> str | None:
    strategy, traits = aggregation.strategy, aggregation.traits
    if privacy.enable_dp and traits.sends_loss:
        return (
            f"aggregation.strategy {strategy!r} sends the loss of a hospital's patients, which no noise covers; switch "
            "privacy.enable_dp off, or use another strategy"
        )
    if privacy.patient_level and not traits.patient_dp_ok:
        return (
            f"aggregation.strategy {strategy!r} is not known to send only what the noise of patient-level differential "
            "privacy covers; switch privacy.enable_dp off, or use another strategy"
        )
    if privacy.hospital_dp and not traits.hospital_level_dp_ok:
        return (
            f"aggregation.strategy {strategy!r} does not go with privacy.unit: hospital, which noises the change of "
            "the weights alone and knows no hospital from round to round; use fedavg, a server optimizer or fedprox"
        )
    return None


def attack_problem(attack: AttackConfig | None, federation: FederationConfig, privacy: PrivacyConfig) -> str | None:
    """Return why a study of attacks does not go with a run's other sections, or None where it does."""
    if attack is None:
        return None
    if privacy.hospital_dp:
        return "attack does not go with privacy.unit: hospital, whose cohorts are secret; study it without"
    if federation.baselines:
        return (
            "attack does not go with federation.baselines, which the attackers would train on altered data; train "
            "them in a run without attack"
        )
    if federation.stragglers == "keep":
        return "attack does not go with federation.stragglers: keep; use drop"
    return None


def rule_problem(aggregation: AggregationConfig, federation: FederationConfig) -> str | None:
    """Return why a rule over all updates does not go with a run's other sections, or None where it does."""
    if not aggregation.needs_every_update:
        return None
    if federation.stragglers == "keep":
        return (
            "aggregation.mode 'robust' and strategy 'flower' do not go with federation.stragglers: keep, with which a "
            "hospital would count twice in a round: once with its late update, once with its new one; use drop"
        )
    return None


def hospital_level_problem(
    aggregation: AggregationConfig, federation: FederationConfig, privacy: PrivacyConfig
) -> str | None:
    """Return why a run's other sections do not fit hospital-level differential privacy, or None where they do."""
    if aggregation.needs_every_update:
        return (
            "privacy.unit: hospital needs the plain mean, aggregation.mode: plain: its noise covers what one hospital "
            "can change a mean of clipped updates by, and no such bound holds for a rule that looks at all of them"
        )
    if aggregation.weighting != "uniform":
        return (
            "privacy.unit: hospital needs aggregation.weighting: uniform, because a hospital's weight would multiply "
            "what the noise has to cover"
        )
    if federation.over_selection or federation.stragglers == "keep":
        return (
            "federation.over_selection and stragglers: keep do not go with privacy.unit: hospital, where whose update "
            "is in which round must not depend on who was in time; leave both out"
        )
    if federation.deadline_s is not None and federation.fraction < 1:
        return (
            "federation.deadline_s does not go with privacy.unit: hospital and federation.fraction below 1: who was "
            "asked is secret there, and who is still busy after a deadline would tell. Leave deadline_s out"
        )
    if federation.min_clients != 1:
        return (
            "federation.min_clients must be 1 with privacy.unit: hospital: every round is noised and published, since "
            "giving one up for too few updates would tell who was asked. Use min_available_clients for the start"
        )
    if federation.baselines:
        return (
            "federation.baselines are not covered by hospital-level differential privacy; leave them out, or train "
            "them in a run of their own"
        )
    if privacy.hospital_level.mechanism == "tree" and federation.fraction != 1:
        return (
            "privacy.hospital_level.mechanism: tree deals every hospital into one round of each tree; leave "
            "federation.fraction out and set privacy.hospital_level.rounds_per_tree"
        )
    return None


def study_problem(
    evaluation: EvaluationConfig,
    federation: FederationConfig,
    privacy: PrivacyConfig,
    aggregation: AggregationConfig,
    attack: AttackConfig | None,
    task: str,
) -> str | None:
    """Return why a run's evaluation does not go with its other sections, or None where it does."""
    more = [*evaluation.more_metrics, *(["calibration"] if evaluation.calibration else [])]
    if federation.pool == "virtual" and (more or evaluation.has_studies):
        return (
            "evaluation beyond Dice, and its studies, do not go with federation.pool: virtual, which scores many "
            "hospitals in one pass; use pool ray or local"
        )
    if task == "classification" and (evaluation.more_metrics or evaluation.target_dice is not None):
        return "evaluation.metrics and target_dice are of segmentations; data.task is classification: leave them out"
    if privacy.hospital_dp and evaluation.has_studies:
        return (
            "evaluation.cross_site, leave_one_out and contributions train models that hospital-level differential "
            "privacy does not cover; leave them out"
        )
    if attack is not None and evaluation.has_studies:
        return (
            "evaluation.cross_site, leave_one_out and contributions do not go with attack: the attackers would train "
            "their models on altered data; leave them out"
        )
    return _coalition_problem(evaluation, aggregation)


def _coalition_problem(evaluation: EvaluationConfig, aggregation: AggregationConfig) -> str | None:
    """Return why federations of fewer hospitals cannot be trained by a run's strategy, or None where they can."""
    if not evaluation.leave_one_out and evaluation.contributions is None:
        return None
    if not aggregation.traits.coalitions_ok:
        return (
            "evaluation.leave_one_out and contributions do not go with aggregation.strategy "
            f"{aggregation.strategy!r}, which remembers things of the whole federation that its parts must not see; "
            "leave them out"
        )
    if aggregation.mode == "robust" and evaluation.contributions == "shapley":
        return (
            "evaluation.contributions: shapley does not go with aggregation.mode: robust, whose rules need more "
            "updates than small federations have; use contributions: leave_one_out"
        )
    return None


def client_algo_problem(
    data: DataConfig, federation: FederationConfig, privacy: PrivacyConfig, aggregation: AggregationConfig
) -> str | None:
    """Return why hospitals that are MONAI ClientAlgos do not go with the other sections, or None where they do."""
    if privacy.patient_level:
        return (
            "training.client_algo does not go with patient-level differential privacy: its steps are not ours to "
            "bound. Leave it out, set privacy.enable_dp to false, or use privacy.unit: hospital"
        )
    if not data.labels or not data.channels:
        return "training.client_algo reads its own data, so data.labels and data.channels must be named"
    if federation.pool == "virtual":
        return "training.client_algo needs a process per hospital; use federation.pool: local or ray"
    if not aggregation.traits.client_algo_ok:
        return (
            f"training.client_algo does not go with aggregation.strategy {aggregation.strategy!r}, which asks for more "
            f"than weights; use one of {strategies_with('client_algo_ok')}"
        )
    return None
