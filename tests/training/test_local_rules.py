"""What a hospital does in each strategy, against numbers worked out by hand, and on parabolas with a known optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.errors import ModelError
from medfl_ray.messages import Mechanism
from medfl_ray.params import Vector
from medfl_ray.training.rules.client_rules import (
    Memory,
    RuleInput,
    RuleResult,
    TrainingPass,
    accumulated_steps,
    client_rule,
    evaluated_weights,
)
from medfl_ray.training.rules.kept_parameters import KeptParameters
from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome
from medfl_ray.training.rules.passes import advance, attempt, first_pass

RATE = 0.1
HEAD = KeptParameters(frozenset({"head"}), frozenset({"body"}), np.array([False, True]))


def vector(*values: float) -> Vector:
    return np.array(values, dtype=np.float32)


class Parabola:
    """A hospital whose loss is curvature / 2 |w - optimum|^2, trained by gradient descent; it notes its passes."""

    def __init__(self, curvature: float, *optimum: float, steps: int = 1, momentum: float = 0.0) -> None:
        self.curvature, self.optimum, self.steps, self.momentum = curvature, vector(*optimum), steps, momentum
        self.memory: Memory = {}
        self.passes: list[TrainingPass] = []

    def gradient(self, weights: Vector) -> Vector:
        return np.float32(self.curvature) * (weights - self.optimum)

    def loss(self, weights: Vector) -> float:
        return float(self.curvature / 2 * np.square(weights - self.optimum).sum())

    def train(self, one: TrainingPass) -> LocalOutcome:
        self.passes.append(one)
        weights, velocity = one.start.astype(np.float64), np.zeros(len(one.start))
        for _ in range(one.job.num_steps):
            gradient = self.gradient(weights)
            if (pull := one.job.pull) is not None:
                gradient = gradient + pull.strength * (weights - (one.start if pull.centre is None else pull.centre))
                gradient = gradient + (0.0 if pull.offset is None else pull.offset)
            frozen = np.isin(("body", "head")[-len(weights) :], sorted(one.job.frozen))
            velocity = self.momentum * velocity + np.where(frozen, 0.0, gradient)
            weights = weights - one.job.learning_rate * velocity
        return LocalOutcome((weights - one.start).astype(np.float32), one.job.num_steps, self.loss(weights))

    def round(
        self, strategy: str, sent: Vector, index: int = 0, mechanism: Mechanism | None = None, **fields
    ) -> RuleResult:
        config = AggregationConfig.model_validate({"strategy": strategy, **fields})
        training = TrainingConfig(learning_rate=RATE, momentum=self.momentum)
        job = LocalJob(self.steps, RATE, mechanism, (1, 2, index))
        kept = HEAD if strategy in ("fedbn", "fedper", "fedrep") else None
        size = len(self.optimum)
        given = RuleInput(sent, size, self.memory, config, training, job, index, self.loss, kept)
        passes = client_rule(config)(given)
        following: TrainingPass | RuleResult = first_pass(passes)
        while isinstance(following, TrainingPass):
            following = advance(passes, self.train(following))
        self.memory = following.memory
        return following

    def update(self, strategy: str, sent: Vector, index: int = 0, **fields) -> Vector:
        return self.round(strategy, sent, index, **fields).outcome.delta


def test_fedavg_and_fedprox_by_hand():
    near, far = Parabola(1, 1, steps=2), Parabola(2, -1, steps=1)
    # 0 -> 0.1 -> 0.19 and 0 -> -0.2
    assert near.update("fedavg", vector(0)) == pytest.approx([0.19])
    assert far.update("fedavg", vector(0)) == pytest.approx([-0.2])
    # mu 0.5 pulls the second step back: 0.1 + 0.1 * (0.9 - 0.5 * 0.1)
    assert near.update("fedprox", vector(0), proximal_mu=0.5) == pytest.approx([0.185])
    assert far.update("fedprox", vector(0), proximal_mu=0.5) == pytest.approx([-0.2])


def test_scaffold_by_hand():
    hospital = Parabola(1, 1, steps=2)
    # c = 0.5, own 0: 0 -> 0.1 * (1 - 0.5) = 0.05 -> 0.05 + 0.1 * (0.95 - 0.5) = 0.095
    update = hospital.update("scaffold", vector(0, 0.5))
    # own becomes 0 - 0.5 - 0.095 / (2 * 0.1) = -0.975, the mean of the gradients -1 and -0.95
    assert update == pytest.approx([0.095, -0.975])
    assert hospital.memory["control"] == pytest.approx([-0.975])
    # Next round, c = -0.4: both steps are corrected by -0.4 + 0.975.
    second = hospital.update("scaffold", vector(0.2, -0.4))
    first_step = 0.1 * (0.8 - 0.575)
    both = first_step + 0.1 * (0.8 - first_step - 0.575)
    assert second == pytest.approx([both, -both / 0.2 + 0.4], abs=1e-6)


def test_with_momentum_scaffolds_control_is_a_mean_of_the_gradients_on_the_way():
    hospital = Parabola(1, 1, steps=3, momentum=0.5)
    update = hospital.update("scaffold", vector(0, 0))
    places, weights, velocity = [], 0.0, 0.0
    for _ in range(3):
        places.append(weights)
        velocity = 0.5 * velocity + (weights - 1)
        weights -= 0.1 * velocity
    # The first gradient is in the change 1 + 0.5 + 0.25 times, the second 1.5 times, the third once.
    mean = np.average([place - 1 for place in places], weights=[1.75, 1.5, 1])
    assert update == pytest.approx([weights, mean], abs=1e-6)


def two_hospitals(momentum: float = 0.0) -> list[Parabola]:
    """Different curvatures, optima and amounts of work; the sum of their losses is least at 0.5."""
    return [Parabola(1, 2, steps=2, momentum=momentum), Parabola(3, 0, steps=7, momentum=momentum)]


def fedavg(hospitals: list[Parabola], weights: float, rounds: int) -> float:
    for _ in range(rounds):
        weights += np.mean([one.update("fedavg", vector(weights)) for one in hospitals])
    return weights


def scaffold(hospitals: list[Parabola], weights: float, rounds: int) -> float:
    control = 0.0
    for _ in range(rounds):
        updates = [one.update("scaffold", vector(weights, control)) for one in hospitals]
        weights, control = np.array([weights, control]) + np.mean(updates, axis=0)
    return float(weights)


def feddyn(hospitals: list[Parabola], weights: float, rounds: int) -> float:
    alpha, state = 0.5, 0.0
    for _ in range(rounds):
        mean = np.mean([one.update("feddyn", vector(weights), dynamic_alpha=alpha) for one in hospitals])
        state -= alpha * mean
        weights += mean - state / alpha
    return float(weights)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fedavg_drifts_to_another_optimum_and_scaffold_does_not(momentum: float):
    assert abs(fedavg(two_hospitals(momentum), 5.0, 300) - 0.5) > 0.1
    assert scaffold(two_hospitals(momentum), 5.0, 300) == pytest.approx(0.5, abs=1e-3)


def test_feddyn_finds_the_optimum_too():
    hospitals = [Parabola(1, 2, steps=60), Parabola(3, 0, steps=60)]
    assert feddyn(hospitals, 5.0, 80) == pytest.approx(0.5, abs=1e-2)


def test_feddyn_by_hand():
    hospital = Parabola(1, 1, steps=2)
    # alpha 0.5: 0 -> 0.1 -> 0.1 + 0.1 * (0.9 - 0.05) = 0.185; the memory is -0.5 * 0.185
    assert hospital.update("feddyn", vector(0), dynamic_alpha=0.5) == pytest.approx([0.185])
    assert hospital.memory["gradient"] == pytest.approx([-0.0925])
    # From 0.2: the gradient is -0.8 and 0.0925 is added to it.
    step = 0.1 * (0.8 - 0.0925)
    both = step + 0.1 * (0.8 - step - 0.0925 - 0.5 * step)
    assert hospital.update("feddyn", vector(0.2), dynamic_alpha=0.5) == pytest.approx([both], abs=1e-6)


def test_fednova_sends_the_change_per_accumulated_step():
    assert Parabola(1, 1, steps=2).update("fednova", vector(0)) == pytest.approx([0.095, 2])
    # With mu: a = (1 - 0.1 * 0.5, 1), the change is that of fedprox.
    assert Parabola(1, 1, steps=2).update("fednova", vector(0), proximal_mu=0.5) == pytest.approx([0.185 / 1.95, 1.95])


@pytest.mark.parametrize(("steps", "momentum", "mu"), [(5, 0.0, 0.0), (6, 0.9, 0.0), (4, 0.0, 2.0), (1, 0.9, 1.0)])
def test_accumulated_steps_are_those_of_the_paper(steps: int, momentum: float, mu: float):
    """Wang et al. 2020, section 4.1 and appendix: |a| of plain, momentum and proximal local steps."""
    found = accumulated_steps(LocalJob(steps, RATE, None, ()), momentum, mu)
    if momentum and steps > 1:
        expected = (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    elif mu and steps > 1:
        expected = (1 - (1 - RATE * mu) ** steps) / (RATE * mu)
    else:
        expected = steps
    assert found == pytest.approx(expected)


def test_qfedavg_by_hand():
    hospital = Parabola(2, 2, steps=1)
    # Loss 4 at 0, change 0.1 * 4 = 0.4; q 2: 16 * 0.4, and 16 + 2 * 4 * 0.16 / 0.1
    assert hospital.update("qfedavg", vector(0), fairness=2) == pytest.approx([6.4, 28.8])
    assert hospital.update("qfedavg", vector(0), fairness=0) == pytest.approx([0.4, 1])


def test_qfedavg_of_a_hospital_without_loss_is_finite():
    assert Parabola(1, 0).update("qfedavg", vector(0), fairness=0.5) == pytest.approx([0, 1e-5])


def test_afl_by_hand():
    hospital = Parabola(2, 2, steps=1)
    # Three hospitals, this one is the second and has weight 0.5: 3 * 0.5 * 0.4
    assert hospital.update("afl", vector(0, 0.25, 0.5, 0.25), index=1) == pytest.approx([0.6, 0, 4, 0])


@pytest.mark.parametrize("strategy", ["fedbn", "fedper"])
def test_the_own_part_stays_and_the_shared_one_is_sent(strategy: str):
    hospital = Parabola(1, 1, 1, steps=1)
    assert hospital.update(strategy, vector(0, 0)) == pytest.approx([0.1, 0])
    assert hospital.memory["kept"] == pytest.approx([0.1])
    # The server's second value is not what the hospital uses.
    assert hospital.update(strategy, vector(0.5, -9)) == pytest.approx([0.05, 0])
    assert hospital.memory["kept"] == pytest.approx([0.19])
    config = AggregationConfig(strategy=strategy)
    assert evaluated_weights(config, HEAD, hospital.memory, vector(0.7, -9)) == pytest.approx([0.7, 0.19])
    assert evaluated_weights(config, HEAD, {}, vector(0.7, -9)) == pytest.approx([0.7, -9])


def test_fedrep_trains_the_head_first_and_the_body_then():
    hospital = Parabola(1, 1, 1, steps=3)
    assert hospital.update("fedrep", vector(0, 0), head_steps=2) == pytest.approx([0.1, 0])
    assert hospital.memory["kept"] == pytest.approx([0.19])
    head, body = hospital.passes
    assert (head.job.num_steps, head.job.frozen) == (2, {"body"})
    assert (body.job.num_steps, body.job.frozen) == (1, {"head"})
    assert head.job.seed_key != body.job.seed_key


@pytest.mark.parametrize(("head_steps", "total", "split"), [(None, 4, [2, 2]), (9, 4, [3, 1]), (None, 1, [1])])
def test_fedrep_takes_as_many_steps_as_the_plan_says(head_steps: int | None, total: int, split: list[int]):
    hospital = Parabola(1, 1, 1, steps=total)
    outcome = hospital.round("fedrep", vector(0, 0), head_steps=head_steps).outcome
    assert [one.job.num_steps for one in hospital.passes] == split
    assert outcome.num_steps == total
    assert np.isfinite(outcome.mean_loss)


def test_ditto_by_hand():
    hospital = Parabola(1, 1, steps=1)
    assert hospital.update("ditto", vector(0), personal_mu=0.5) == pytest.approx([0.1])
    assert hospital.memory["personal"] == pytest.approx([0.1])
    # Own model: 0.1 + 0.1 * (0.9 - 0.5 * (0.1 - 0.6)); the shared one goes on from 0.6.
    assert hospital.update("ditto", vector(0.6), personal_mu=0.5) == pytest.approx([0.04])
    assert hospital.memory["personal"] == pytest.approx([0.215])
    config = AggregationConfig(strategy="ditto")
    assert evaluated_weights(config, None, hospital.memory, vector(0.6)) == pytest.approx([0.215])


def test_apfl_steps_on_the_own_model_by_the_gradient_of_the_mixture():
    hospital, alpha = Parabola(1, 1, steps=1), 0.25
    hospital.memory = {"personal": vector(0.4)}
    assert hospital.update("apfl", vector(0), personal_share=alpha) == pytest.approx([0.1])
    mixed = alpha * 0.4 + (1 - alpha) * 0.1
    own = 0.4 + RATE * alpha * (1 - mixed)
    assert hospital.memory["personal"] == pytest.approx([own], abs=1e-6)
    config = AggregationConfig(strategy="apfl", personal_share=alpha)
    expected = alpha * own + (1 - alpha) * 0.5
    assert evaluated_weights(config, None, hospital.memory, vector(0.5)) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(("alpha", "own"), [(0.0, 0.4), (1.0, 0.46)])
def test_apfl_without_one_of_its_two_models(alpha: float, own: float):
    hospital = Parabola(1, 1, steps=1)
    hospital.memory = {"personal": vector(0.4)}
    hospital.update("apfl", vector(0), personal_share=alpha)
    assert hospital.memory["personal"] == pytest.approx([own])


SENT: dict[str, Vector] = {"scaffold": vector(0, 0, 0, 0), "afl": vector(0, 0, 0.5, 0.5)}


@pytest.mark.parametrize(
    "strategy", ["fedavg", "fedprox", "scaffold", "feddyn", "fedbn", "ditto", "apfl", "qfedavg", "afl"]
)
def test_no_update_is_longer_than_is_allowed(strategy: str):
    hospital = Parabola(1, 30, 40, steps=1)
    update = hospital.update(strategy, SENT.get(strategy, vector(0, 0)), max_update_norm=0.5)
    assert np.linalg.norm(update[:2]) <= 0.5 * (1 + 1e-6)
    assert np.linalg.norm(update[:2]) > 0.25


def test_what_feddyn_remembers_is_what_it_sent():
    hospital = Parabola(1, 30, 40, steps=1)
    update = hospital.update("feddyn", vector(0, 0), max_update_norm=0.5, dynamic_alpha=0.5)
    assert hospital.memory["gradient"] == pytest.approx(-0.5 * update)


class Diverging:
    """A trainer of which every training fails."""

    def train(self, *_: object) -> LocalOutcome:
        raise ModelError("training diverged")


MECHANISM = Mechanism(noise_multiplier=1.0, sample_rate=0.5, max_grad_norm=1.0, num_steps=1, num_patients=4, delta=1e-5)


@pytest.mark.parametrize("strategy", ["ditto", "apfl"])
def test_beside_a_private_training_the_own_model_trains_without_noise_and_fails_in_silence(strategy: str):
    hospital = Parabola(1, 1, steps=1)
    hospital.memory = {"personal": vector(0.4)}
    hospital.round(strategy, vector(0), mechanism=MECHANISM)
    shared, own = hospital.passes
    assert (shared.job.mechanism, shared.silent) == (MECHANISM, False)
    assert (own.job.mechanism, own.silent) == (None, True)
    outcome = attempt(Diverging(), own, None)
    assert not outcome.delta.any()
    with pytest.raises(ModelError, match="diverged"):
        attempt(Diverging(), replace(own, silent=False), None)


@pytest.mark.parametrize("strategy", ["ditto", "apfl"])
def test_without_privacy_a_failure_of_the_own_model_is_no_secret(strategy: str):
    hospital = Parabola(1, 1, steps=1)
    hospital.round(strategy, vector(0))
    assert not any(one.silent for one in hospital.passes)


def test_the_own_model_changes_nothing_of_what_is_sent():
    """Ditto and APFL under DP: their own models have no noise, so that nothing of them may show."""
    make: Callable[[], Parabola] = lambda: Parabola(1, 1, 2, steps=3)  # noqa: E731
    for strategy in ("ditto", "apfl"):
        one, other = make(), make()
        other.memory = {"personal": vector(50, -50)}
        assert (one.update(strategy, vector(0, 1)) == other.update(strategy, vector(0, 1))).all()
        assert (one.update(strategy, vector(0, 1)) == make().update("fedavg", vector(0, 1))).all()
