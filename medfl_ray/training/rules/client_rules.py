"""What a hospital does in a round of each strategy: what it trains from what the server sent, sends and remembers.

A rule is a generator. It yields one `TrainingPass` after another, is sent the outcome of each, and returns what the
hospital sends and remembers. One driver trains a single hospital (passes.py), another many hospitals at once.
What the server does is in medfl_ray/aggregation. Shapes: P values of the weights, N hospitals of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.errors import UpdateRejected
from medfl_ray.params import Vector, is_finite, norm
from medfl_ray.training.rules.kept_parameters import KeptParameters
from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome, Pull

Memory = Mapping[str, Vector]
"""What a hospital remembers from round to round, by name; empty before its first round. It never leaves."""
SMALLEST_LOSS = 1e-10


@dataclass(frozen=True, eq=False)
class RuleInput:
    """What a rule works with in one round.

    Args:
      sent: the weights [P] and behind them what else the strategy sends.
      size: number P.
      job: the plan's steps and learning rate, and the hospital's mechanism.
      index: place of the hospital in the run.
      loss_of: the mean loss of weights [P] over the hospital's training patients.
      kept: what stays in the hospital, for the strategies that share a part.
    """

    sent: Vector
    size: int
    memory: Memory
    config: AggregationConfig
    training: TrainingConfig
    job: LocalJob
    index: int
    loss_of: Callable[[Vector], float]
    kept: KeptParameters | None = None

    @property
    def weights(self) -> Vector:
        """The round's weights, [P]."""
        return self.sent if len(self.sent) == self.size else self.sent[: self.size]

    @property
    def beside(self) -> Vector:
        """What the strategy sends behind the weights."""
        return self.sent[self.size :]

    def remembered(self, name: str) -> Vector:
        """Return a part of the memory, [P]; zeros before the first round."""
        return self.memory.get(name, np.zeros(self.size, dtype=np.float32))

    @property
    def proximal(self) -> Pull | None:
        """FedProx's pull to where the training starts."""
        return Pull(self.config.mu) if self.config.mu else None

    def shortened(self, change: Vector) -> Vector:
        """Return a change of the weights [P], not longer than the configuration allows."""
        return shortened(change, self.config.max_update_norm)


def shortened(change: Vector, limit: float | None) -> Vector:
    """Return a change of the weights [P], not longer than a limit; None is no limit."""
    length = norm(change) if limit is not None else 0.0
    return change if limit is None or length <= limit else (change * np.float32(limit / length)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class TrainingPass:
    """One training: where it starts, [P], and what is done.

    With `silent`, neither its result nor its failure may show outside of the hospital: it trains without noise
    beside a private training, for the hospital alone.
    """

    start: Vector
    job: LocalJob
    silent: bool = False


@dataclass(frozen=True, eq=False)
class RuleResult:
    """What a round came to: the update with whatever the strategy adds behind its P values, and the new memory."""

    outcome: LocalOutcome
    memory: Memory


RuleSteps = Generator[TrainingPass, LocalOutcome, RuleResult]
Rule = Callable[[RuleInput], RuleSteps]


class ModelInput(NamedTuple):
    """What a hospital has outside of a round: shared weights [P], what it remembers, and what stays with it."""

    config: AggregationConfig
    kept: KeptParameters | None
    memory: Memory
    weights: Vector


def shared_model(given: ModelInput) -> Vector:
    """Use the shared model as it is."""
    return given.weights


class ClientRule(NamedTuple):
    """What a hospital does for a strategy: `train` in a round; `use` gives the model [P] that it scores and uses."""

    train: Rule
    use: Callable[[ModelInput], Vector] = shared_model


def average(given: RuleInput) -> RuleSteps:
    """Train from the round's weights, with FedProx's pull where there is one (Li et al. 2020, arXiv:1812.06127)."""
    outcome = yield _shared_pass(given, given.weights)
    return _sent(given, outcome, outcome.delta, {})


def fednova(given: RuleInput) -> RuleSteps:
    """FedNova: send the change over the accumulated steps, and these (Wang et al. 2020, arXiv:2007.07481)."""
    outcome = yield _shared_pass(given, given.weights)
    steps = accumulated_steps(given.job, given.training.momentum, given.config.mu)
    return _sent(given, outcome, outcome.delta / np.float32(steps), {}, [steps])


def qfedavg(given: RuleInput) -> RuleSteps:
    """q-FedAvg: weigh the change by the loss to the power q (Li et al. 2020, arXiv:1905.10497, algorithm 2).

    Sent is (F^q change, F^q + q F^(q-1) L |change|^2) with L = 1 / learning rate: the paper's two sums over L.
    """
    q = given.config.fairness
    loss = max(given.loss_of(given.weights), SMALLEST_LOSS)
    outcome = yield _shared_pass(given, given.weights)
    change = given.shortened(outcome.delta)
    length = norm(change)
    scale = loss**q + q * loss ** (q - 1) * length**2 / given.job.learning_rate
    return _sent(given, outcome, np.float32(loss**q) * change, {}, [scale])


def afl(given: RuleInput) -> RuleSteps:
    """AFL: send N lambda_i times the change, and the loss of the round's weights (Mohri et al. 2019,
    arXiv:1902.00146)."""
    shares = given.beside
    losses = np.zeros_like(shares)
    losses[given.index] = given.loss_of(given.weights)
    outcome = yield _shared_pass(given, given.weights)
    change = np.float32(len(shares) * shares[given.index]) * given.shortened(outcome.delta)
    return _sent(given, outcome, change, {}, losses)


def scaffold(given: RuleInput) -> RuleSteps:
    """SCAFFOLD: correct every step by the server's control less the own one (Karimireddy et al. 2020,
    arXiv:1910.06378, option II).

    The new control is the mean of the gradients on the way. With momentum these count unequally, so that the change
    is divided by the accumulated steps instead of their number, and the mean is a weighted one.
    """
    control, own = given.beside, given.remembered("control")
    outcome = yield TrainingPass(given.weights, replace(given.job, pull=Pull(offset=control - own)))
    steps = accumulated_steps(given.job, given.training.momentum)
    change = -control - outcome.delta / np.float32(given.job.learning_rate * steps)
    return _sent(given, outcome, outcome.delta, {"control": own + change}, change)


def feddyn(given: RuleInput) -> RuleSteps:
    """FedDyn: a regulariser that remembers the gradient at the local optimum (Acar et al. 2021, arXiv:2111.04263)."""
    alpha, own = given.config.dynamic_alpha, given.remembered("gradient")
    outcome = yield TrainingPass(given.weights, replace(given.job, pull=Pull(alpha, given.weights, -own)))
    change = given.shortened(outcome.delta)
    return _sent(given, outcome, change, {"gradient": own - np.float32(alpha) * change})


def partially_shared(given: RuleInput) -> RuleSteps:
    """FedBN, SiloBN, FedPer: train everything, send the shared part, keep the rest; see kept_parameters.py."""
    start = _overlaid(given)
    outcome = yield _shared_pass(given, start)
    return _sent_in_part(given, outcome, start, outcome.delta)


def fedrep(given: RuleInput) -> RuleSteps:
    """FedRep: first the own part with the shared one frozen, then the other way (Collins et al. 2021,
    arXiv:2102.07078)."""
    assert given.kept is not None
    start, total = _overlaid(given), given.job.num_steps
    num_head = min(given.config.head_steps or total // 2, total - 1)
    head = LocalOutcome(np.zeros_like(start), 0, 0.0)
    if num_head:
        job = replace(given.job, num_steps=num_head, frozen=given.kept.shared)
        head = yield TrainingPass(start, replace(job, pull=given.proximal))
    rest = replace(given.job, num_steps=total - num_head, frozen=given.kept.names, pull=given.proximal)
    body = yield _again(TrainingPass(start + head.delta, rest))
    losses = np.array([head.mean_loss, body.mean_loss])
    mean_loss = float(np.average(losses, weights=[num_head, total - num_head]))
    return _sent_in_part(given, LocalOutcome(body.delta, total, mean_loss), start, head.delta + body.delta)


def ditto(given: RuleInput) -> RuleSteps:
    """Ditto: beside the shared model, one's own that is pulled to it (Li et al. 2021, arXiv:2012.04221)."""
    shared = yield _shared_pass(given, given.weights)
    start = given.memory.get("personal", given.weights)
    own = yield _personal_pass(given, start, Pull(given.config.personal_mu, given.weights))
    return _sent(given, shared, shared.delta, {"personal": start + own.delta})


def apfl(given: RuleInput) -> RuleSteps:
    """APFL: a mixture of one's own model and the shared one is trained (Deng et al. 2020, arXiv:2003.13461).

    The paper steps on both models in turn; here the shared one takes the round's steps first and is held while the
    own one takes as many. A step of rate eta on the own model moves the mixture by alpha^2 eta times its gradient,
    which is how it is trained; with Adam, which knows no scale of a gradient, by alpha eta.
    """
    alpha, start = given.config.personal_share, given.memory.get("personal", given.weights)
    shared = yield _shared_pass(given, given.weights)
    if alpha == 0:
        return _sent(given, shared, shared.delta, {"personal": start})
    held = np.float32(1 - alpha) * (given.weights + shared.delta)
    rate = given.job.learning_rate * (alpha**2 if given.training.optimizer == "sgd" else alpha)
    mixed = np.float32(alpha) * start + held
    own = yield _personal_pass(given, mixed, None, rate)
    after = ((mixed + own.delta - held) / np.float32(alpha)).astype(np.float32)
    return _sent(given, shared, shared.delta, {"personal": after})


def shared_model_with_own_part(given: ModelInput) -> Vector:
    """Use the shared model with the hospital's own part in place, once there is one."""
    if given.kept is None or "kept" not in given.memory:
        return given.weights
    overlaid = given.weights.copy()
    overlaid[given.kept.mask] = given.memory["kept"]
    return overlaid


def own_model(given: ModelInput) -> Vector:
    """Use the hospital's own model, once there is one."""
    return given.memory.get("personal", given.weights)


def mixture(given: ModelInput) -> Vector:
    """Use the mixture of the hospital's own model and the shared one, once there is an own one."""
    if "personal" not in given.memory:
        return given.weights
    alpha = np.float32(given.config.personal_share)
    return alpha * given.memory["personal"] + (1 - alpha) * given.weights


CLIENT_RULES: dict[str, ClientRule] = {
    "fedavg": ClientRule(average),
    "fedavgm": ClientRule(average),
    "fedadam": ClientRule(average),
    "fedyogi": ClientRule(average),
    "fedadagrad": ClientRule(average),
    "fednova": ClientRule(fednova),
    "qfedavg": ClientRule(qfedavg),
    "afl": ClientRule(afl),
    "fedprox": ClientRule(average),
    "scaffold": ClientRule(scaffold),
    "feddyn": ClientRule(feddyn),
    "fedbn": ClientRule(partially_shared, shared_model_with_own_part),
    "silobn": ClientRule(partially_shared, shared_model_with_own_part),
    "fedper": ClientRule(partially_shared, shared_model_with_own_part),
    "fedrep": ClientRule(fedrep, shared_model_with_own_part),
    "ditto": ClientRule(ditto, own_model),
    "apfl": ClientRule(apfl, mixture),
    "flower": ClientRule(average),
    "custom": ClientRule(average),
}
"""What a hospital does in each strategy; where it is `average`, the server does what differs."""


def client_rule(config: AggregationConfig) -> Rule:
    """Return what a hospital does in a round of a run's strategy."""
    return CLIENT_RULES[config.strategy].train


def evaluated_weights(
    config: AggregationConfig, kept: KeptParameters | None, memory: Memory, weights: Vector
) -> Vector:
    """Return what a hospital would use of given weights [P]: with its own part, its own model, or the mixture."""
    return CLIENT_RULES[config.strategy].use(ModelInput(config, kept, memory, weights))


def accumulated_steps(job: LocalJob, momentum: float, mu: float = 0.0) -> float:
    """Return |a|_1 of Wang et al. 2020: how far one unit of gradient in every step has led, over the learning rate.

    The number of steps for plain SGD; more with momentum, fewer with a proximal term mu. a is the response to one
    unit of gradient, 1 to num_steps steps after it.
    """
    place, velocity, total = 0.0, 0.0, 0.0
    for step in range(job.num_steps):
        velocity = momentum * velocity + (1.0 if step == 0 else 0.0) + mu * place
        place -= job.learning_rate * velocity
        total += abs(place) / job.learning_rate
    return total


def _shared_pass(given: RuleInput, start: Vector) -> TrainingPass:
    return TrainingPass(start, replace(given.job, pull=given.proximal))


def _personal_pass(given: RuleInput, start: Vector, pull: Pull | None, rate: float | None = None) -> TrainingPass:
    """Train a model that never leaves, so that it needs no noise; beside a private training its failure is silent."""
    job = replace(given.job, mechanism=None, pull=pull, learning_rate=rate or given.job.learning_rate)
    return replace(_again(TrainingPass(start, job)), silent=given.job.mechanism is not None)


def _again(one: TrainingPass) -> TrainingPass:
    """Let a second pass draw other patients and patches than the first."""
    return replace(one, job=replace(one.job, seed_key=(*one.job.seed_key, 1)))


def _overlaid(given: RuleInput) -> Vector:
    return evaluated_weights(given.config, given.kept, given.memory, given.weights)


def _sent_in_part(given: RuleInput, outcome: LocalOutcome, start: Vector, change: Vector) -> RuleResult:
    assert given.kept is not None
    own = (start + change)[given.kept.mask]
    return _sent(given, outcome, np.where(given.kept.mask, np.float32(0), change), {"kept": own})


def _sent(given: RuleInput, outcome: LocalOutcome, change: Vector, memory: Memory, extra: object = ()) -> RuleResult:
    """Put together what is sent: the change [P], shortened to the longest that is allowed, and what goes behind it."""
    update, behind = given.shortened(change).astype(np.float32, copy=False), np.asarray(extra, dtype=np.float32)
    if behind.size:
        update = np.concatenate([update, behind])
    if update is not outcome.delta and not is_finite(update):  # what training returns was looked at there
        raise UpdateRejected("the update holds values that are not finite; lower training.learning_rate")
    return RuleResult(replace(outcome, delta=update), memory)
