"""Hospital-level differential privacy in a run: what is planned, who is asked, what is charged and what is shown.

The coordinator is trusted: it sees each clipped update and who was asked. Whoever sees only what the run publishes
(weights, receipts, events, report) is covered by the epsilon. Whatever arrives is noised and published, an empty
cohort too: a round that is given up for too few updates would tell something about the cohort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.fixed_point import PartialSum, plain_sum
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy, default_delta
from medfl_ray.errors import PrivacyConfigError
from medfl_ray.federation.ports import Ledger
from medfl_ray.messages import ClientUpdate, LedgerRows, Mechanism, PrivacySpent, RoundPlan
from medfl_ray.params import Vector
from medfl_ray.privacy.hospital_level import (
    SMALL_FEDERATION,
    AdaptiveClip,
    CentralMechanism,
    clip_update,
    sample_cohort,
    split_noise,
    tree_cohort,
)
from medfl_ray.privacy.planner import (
    solve_epsilon,
    solve_noise_multiplier,
    solve_tree_epsilon,
    solve_tree_noise_multiplier,
)
from medfl_ray.round_times import has_secret_cohorts

FEDERATION = "federation"
CLIP_NORM = "hospital_level/clip_norm"
ServerState = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class HospitalLevelPlan:
    """What a run with hospital-level differential privacy is going to do.

    sample_rate: Poisson rate q of a hospital per round; 1 for a tree. rounds_per_tree: None without trees.
    expected_cohort: public, expected number of hospitals in a round.
    """

    noise_multiplier: float
    sample_rate: float
    num_rounds: int
    num_hospitals: int
    delta: float
    expected_cohort: float
    rounds_per_tree: int | None
    adaptive: AdaptiveClip | None

    @property
    def epsilon(self) -> float:
        """Hospital-level epsilon of all rounds together, without restarts."""
        if self.rounds_per_tree is not None:
            return solve_tree_epsilon(self.noise_multiplier, self.delta, self.num_rounds, self.rounds_per_tree)
        return solve_epsilon(self.noise_multiplier, self.delta, self.sample_rate, self.num_rounds)

    @property
    def terms(self) -> str:
        """The words that stand beside its epsilon."""
        adjacency = "add/remove" if self.rounds_per_tree is None else "zero-out"
        return f"unit hospital, delta {self.delta:g}, adjacency {adjacency}"

    @property
    def warning(self) -> str | None:
        """What is to be said of a federation too small for its noise, with the figures; None for a large one."""
        if self.num_hospitals >= SMALL_FEDERATION:
            return None
        noise = self.noise_multiplier / self.expected_cohort
        return (
            f"hospital-level differential privacy with {self.num_hospitals} hospitals: epsilon {self.epsilon:.2f} "
            f"({self.terms}) needs noise of {noise:.2g} clip norms per parameter on the mean update, and a hospital "
            f"moves that mean by at most {1 / self.expected_cohort:.2g}. Below about {SMALL_FEDERATION} hospitals the "
            "model learns little; use privacy.unit: patient, or more hospitals"
        )


def plan_hospital_level(run: RunConfig, policies: Sequence[SitePolicy]) -> HospitalLevelPlan | None:
    """Return what a run with privacy.unit: hospital does, or None for any other run.

    Raises:
      PrivacyConfigError: a hospital demands patient-level DP or bears a reserved name, or the figures do not fit.
    """
    if not run.privacy.hospital_dp:
        return None
    settings, rounds = run.privacy.hospital_level, run.federation.rounds
    _check_policies(run, policies)
    num_hospitals = settings.num_hospitals or len(policies)
    if num_hospitals < len(policies):
        raise PrivacyConfigError(
            f"privacy.hospital_level.num_hospitals is {num_hospitals}; the run has {len(policies)} hospitals: raise it"
        )
    delta = run.privacy.delta if run.privacy.delta is not None else default_delta(num_hospitals)
    if delta >= 1 / num_hospitals:
        raise PrivacyConfigError(
            f"delta={delta:g} is not below 1 / num_hospitals = {1 / num_hospitals:g}; lower privacy.delta"
        )
    per_tree = min(settings.rounds_per_tree or rounds, rounds) if settings.mechanism == "tree" else None
    if per_tree is not None and per_tree > num_hospitals:
        raise PrivacyConfigError(
            f"a tree of {per_tree} rounds asks each of {num_hospitals} hospitals once, so that some rounds would ask "
            "nobody; lower privacy.hospital_level.rounds_per_tree or federation.rounds"
        )
    q = 1.0 if per_tree is not None else run.federation.fraction
    sigma = run.privacy.noise_multiplier
    if sigma is None:
        assert run.privacy.epsilon is not None  # the schema asks for one of the two
        if per_tree is not None:
            sigma = solve_tree_noise_multiplier(run.privacy.epsilon, delta, rounds, per_tree)
        else:
            sigma = solve_noise_multiplier(run.privacy.epsilon, delta, q, rounds)
    expected = num_hospitals / per_tree if per_tree is not None else q * num_hospitals
    return HospitalLevelPlan(
        sigma, q, rounds, num_hospitals, delta, expected, per_tree, _adaptive(run, sigma, expected)
    )


def _adaptive(run: RunConfig, sigma: float, expected_cohort: float) -> AdaptiveClip | None:
    settings = run.privacy.hospital_level
    if not settings.adaptive_clip:
        return None
    count_std = settings.count_noise or max(expected_cohort / 20, sigma)
    split_noise(sigma, count_std)
    return AdaptiveClip(settings.target_quantile, settings.clip_learning_rate, count_std)


def _check_policies(run: RunConfig, policies: Sequence[SitePolicy]) -> None:
    refusing = sorted(policy.hospital for policy in policies if policy.require_dp)
    if refusing:
        raise PrivacyConfigError(
            f"{', '.join(refusing)} trains only with patient-level differential privacy, which privacy.unit: hospital "
            "does not give against the coordinator; set privacy.unit: patient, or leave the hospital out"
        )
    if any(policy.hospital == FEDERATION for policy in policies):
        raise PrivacyConfigError(f"a hospital is named {FEDERATION!r}, which is the federation's account; rename it")


def federation_budget(run: RunConfig, policies: Sequence[SitePolicy]) -> tuple[float | None, bool]:
    """Return the lifetime epsilon of the federation's account, and whether only its first run may spend.

    As for a hospital's data set: with private data and no declared budget, the run's epsilon is the budget and a
    second run waits until somebody has declared one.

    Raises:
      PrivacyConfigError: there is neither.
    """
    declared = run.privacy.hospital_level.max_epsilon
    if declared is not None or all(policy.declared != "private" for policy in policies):
        return declared, False
    if run.privacy.epsilon is None:
        raise PrivacyConfigError(
            "the hospitals have private data and the federation no budget; declare privacy.hospital_level.max_epsilon "
            "or privacy.epsilon"
        )
    return run.privacy.epsilon, True


class HospitalLevel:
    """The coordinator's part in each round: cohort, clip norm, charge and noise; see rounds.py for the order.

    It holds the noise of a tree and is never stored: a run that is resumed starts a new tree and charges it anew.
    """

    def __init__(self, run: RunConfig, plan: HospitalLevelPlan, ledger: Ledger, size: int) -> None:
        """Take the run, its plan, the federation's account and the number of parameters P."""
        self._run, self._plan, self._ledger = run, plan, ledger
        settings = run.privacy.hospital_level
        self._mechanism = CentralMechanism(
            size, plan.noise_multiplier, settings.clip_norm, plan.expected_cohort, plan.adaptive
        )
        self._tree_first, self._tree_rounds = 0, 0
        self._reservation: str | None = None
        self._num_within = 0
        self.secret_cohorts = has_secret_cohorts(run)

    def restore(self, server_state: ServerState) -> None:
        """Take over the clip norm of a checkpoint, where it adapts."""
        if CLIP_NORM in server_state:
            self._mechanism.clip_norm = float(server_state[CLIP_NORM][0])

    def server_state(self) -> ServerState:
        """Return what a checkpoint keeps: the adapted clip norm, which the charge has paid for; no noise."""
        if self._plan.adaptive is None:
            return {}
        return {CLIP_NORM: np.array([self._mechanism.clip_norm], np.float32)}

    def rows_after(self, heads: Mapping[str, str]) -> tuple[LedgerRows, ...]:
        """Return the account's rows that the mirror has not seen."""
        return self._ledger.rows_after(heads)

    def export(self) -> dict[str, Any]:
        """Return the federation's account as plain data."""
        return self._ledger.export()

    @property
    def clip_norm(self) -> float:
        """Clip norm C of this round."""
        return self._mechanism.clip_norm

    def cohort(self, available: Sequence[str], round: int) -> tuple[str, ...]:
        """Draw who is asked: by chance and in secret, or by the tree's public deal."""
        if self._plan.rounds_per_tree is None:
            return sample_cohort(available, self._plan.sample_rate)
        if not self._tree_first <= round < self._tree_first + self._tree_rounds:
            self._start_tree(round, self._plan.rounds_per_tree)
        step = round - self._tree_first + 1
        return tree_cohort(available, self._tree_first, step, self._tree_rounds, self._run.federation.seed)

    def reserve(self, plan: RoundPlan) -> PrivacySpent:
        """Charge the round, or at a tree's first round the whole tree, before any hospital trains.

        Raises:
          BudgetExceeded: the federation's budget does not reach; the run ends with its last checkpoint.
        """
        self._num_within = 0
        if self._plan.rounds_per_tree is None or self._tree_first == plan.round:
            self._reservation = self._ledger.reserve(
                plan.job, plan.round, plan.attempt, self._charge(), self._run.privacy.epsilon
            )
        return self._spent()

    def settle(self) -> PrivacySpent:
        """Mark the charge as used up, before any noised sum exists."""
        if self._reservation is not None:
            self._ledger.settle(self._reservation)
            self._reservation = None
        return self._spent()

    def admit(self, update: ClientUpdate) -> Vector:
        """Clip an update on arrival, whatever the hospital did, and count whether it fitted."""
        clipped, within = clip_update(update.delta, self.clip_norm)
        self._num_within += within and update.within_clip is not False
        return clipped

    def release(self, total: PartialSum) -> Vector:
        """Return the noised sum over the expected cohort, shape [P]."""
        return self._mechanism.release(plain_sum(total), self._num_within, total.num_updates)

    def _start_tree(self, round: int, rounds_per_tree: int) -> None:
        self._tree_first = round
        self._tree_rounds = min(rounds_per_tree, self._plan.num_rounds - round + 1)
        self._mechanism.start_tree()

    def _charge(self) -> Mechanism:
        return Mechanism(
            noise_multiplier=self._plan.noise_multiplier,
            sample_rate=self._plan.sample_rate,
            max_grad_norm=self.clip_norm,
            num_steps=1 if self._plan.rounds_per_tree is None else self._tree_rounds,
            num_records=self._plan.num_hospitals,
            delta=self._plan.delta,
            unit="hospital",
            adjacency="add_remove" if self._plan.rounds_per_tree is None else "zero_out",
        )

    def _spent(self) -> PrivacySpent:
        return self._ledger.spent()
