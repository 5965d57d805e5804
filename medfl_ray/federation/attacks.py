"""What hostile hospitals send, for studies of robustness on data that are not private.

An attacker trains like everybody else, and the coordinator turns its update into the attack once the honest updates
of the round are there. So ALIE and IPM know every honest update exactly. Real attackers know their own alone and would
have to guess, which makes a study the harder test. Attacks on the training data are in
medfl_ray/data/prepare/attacked_patches.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from medfl_ray.aggregation.robust import blocks
from medfl_ray.aggregation.updates import Updates
from medfl_ray.config.aggregation import DEFAULT_SCALE, AggregationConfig, AttackConfig
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError
from medfl_ray.messages import ClientUpdate
from medfl_ray.params import Vector

GAUSSIAN = 0xA77AC  # keeps the attackers' noise apart from every other draw


def check_attack(run: RunConfig, policies: Sequence[SitePolicy]) -> None:
    """Refuse a study of attacks that names a hospital which is not in the run, or in which any data are private.

    Raises:
      ConfigError: that is so.
    """
    if run.attack is None:
        return
    unknown = sorted(set(run.attack.hospitals) - {policy.hospital for policy in policies})
    if unknown:
        known = ", ".join(sorted(policy.hospital for policy in policies)[:10])
        raise ConfigError(f"attack.hospitals names {', '.join(unknown)}, which the run has not; it has {known}")
    private = sorted(policy.hospital for policy in policies if policy.declared == "private")
    if private:
        raise ConfigError(
            f"attack is for studies on public or synthetic data; the data of {', '.join(private)} are private. Remove "
            "the section attack"
        )


def altered_updates(
    attack: AttackConfig,
    honest: Updates,
    trained: Mapping[str, ClientUpdate],
    aggregation: AggregationConfig,
    seed: tuple[int, int],
) -> Iterator[ClientUpdate]:
    """Yield what the attackers send in a round, in the order of their names.

    Args:
      honest: the others' updates. Where there are none, ALIE and IPM go by the attackers' own.
      trained: what each attacker has trained.
      seed: (seed of the run, round), for the noise of gaussian.
    """
    names = sorted(trained)
    scale = attack.scale if attack.scale is not None else DEFAULT_SCALE.get(attack.kind)
    if scale is None:
        scale = replacing_scale(honest, trained, aggregation.server_learning_rate)
    known = honest if len(honest) else of_all(trained, honest.size)
    same = {"alie": a_little, "ipm": against_mean}
    sent = same[attack.kind](known, scale) if attack.kind in same else None
    for index, name in enumerate(names):
        own = trained[name].delta
        if attack.kind == "gaussian":
            rng = np.random.default_rng(np.random.SeedSequence([abs(seed[0]), seed[1], index, GAUSSIAN]))
            delta = rng.standard_normal(own.size, dtype=np.float32) * np.float32(scale)
        elif sent is not None:
            delta = sent.copy()
        else:
            delta = np.float32(-scale if attack.kind == "sign_flip" else scale) * own
        yield replace(trained[name], delta=delta, signature="")


def of_all(trained: Mapping[str, ClientUpdate], size: int) -> Updates:
    """Return the attackers' own updates as a rule would read them."""
    own = Updates(size)
    for name, update in trained.items():
        own.add(name, update.delta, update.aggregation_weight)
    return own


def replacing_scale(honest: Updates, trained: Mapping[str, ClientUpdate], server_learning_rate: float) -> float:
    """Return the factor with which the attackers' model takes the place of the mean (Bagdasaryan et al. 2020).

    It is all weight by the attackers' weight and the server's learning rate, arXiv:1807.00459, equation 3.
    """
    own = float(sum(update.aggregation_weight for update in trained.values()))
    return (float(honest.weights.sum()) + own) / (own * server_learning_rate)


def a_little(honest: Updates, z: float) -> Vector:
    """Return mean - z * standard deviation of every value, [P] (ALIE: Baruch et al. 2019, arXiv:1902.06156).

    The paper's z is the largest that still hides among the honest; for one of five hospitals it is 0, an honest update.
    """
    sent = np.empty(honest.size, dtype=np.float32)
    for where, block in blocks(honest):
        sent[where] = block.mean(axis=0) - z * block.std(axis=0)
    return sent


def against_mean(honest: Updates, factor: float) -> Vector:
    """Return -factor * mean of the honest updates, [P] (IPM: Xie et al. 2020, arXiv:1903.03936)."""
    sent = np.empty(honest.size, dtype=np.float32)
    for where, block in blocks(honest):
        sent[where] = -factor * block.mean(axis=0)
    return sent
