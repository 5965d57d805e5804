"""Telling the patients that a model was trained on from those that it was not, by its loss.

The figure describes single patients, so that it is computed for public and synthetic data alone: of private data it
would be a release of its own, which no ledger has paid for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medfl_ray.data.prepare.dataset import HospitalData
from medfl_ray.errors import DataError
from medfl_ray.params import Vector
from medfl_ray.privacy.audit_record import MembershipAttack
from medfl_ray.training.trainer import Trainer

MAX_PATIENTS = 200
"""Training patients, and held-out cases, that are scored at most."""
NUM_PATCHES = 8
NUM_RESAMPLES = 1000


def attack_membership(trainer: Trainer, weights: Vector, data: HospitalData, confidence: float) -> MembershipAttack:
    """Score training and held-out patients by the loss of as many patches, drawn alike, and compare.

    Source: Yeom et al. 2018, arXiv:1709.01604 (the loss as the attacker's score).

    Raises:
      DataError: the data are private, or hold fewer than two training patients or held-out cases.
    """
    if data.declared == "private":
        raise DataError("the data are private; a membership attack on them would be a release that nobody has paid for")
    holdout = [index for index, case in enumerate(data.holdout) if case.label is not None]
    if data.num_train_patients < 2 or len(holdout) < 2:
        raise DataError(
            f"{data.num_train_patients} training patients and {len(holdout)} labelled held-out cases are too few to "
            "compare; hold more out with data.holdout_fraction"
        )
    rng = np.random.default_rng(0)  # the data are public: the same audit shows the same figure
    chosen = _choose(range(data.num_train_patients), rng)
    members = trainer.losses(weights, (data.train_patches(index, NUM_PATCHES, rng) for index in chosen))
    others = trainer.losses(weights, (data.holdout_patches(i, NUM_PATCHES, rng) for i in _choose(holdout, rng)))
    auc, low, high = membership_auc(members, others, confidence)
    return MembershipAttack(
        auc=auc, low=low, high=high, confidence=confidence, num_members=len(members), num_others=len(others)
    )


def membership_auc(
    member_losses: Sequence[float], other_losses: Sequence[float], confidence: float
) -> tuple[float, float, float]:
    """Return the AUC of "a lower loss means trained on" and its percentile bootstrap interval.

    Members and others are resampled apart, with a fixed seed.
    """
    from sklearn.metrics import roc_auc_score

    members, others = -np.asarray(member_losses), -np.asarray(other_losses)
    truth = np.repeat([1, 0], [len(members), len(others)])
    auc = roc_auc_score(truth, np.concatenate([members, others]))
    # A resample's AUC is a weighted mean over pairs, and so all of them are one product of matrices.
    wins = np.where(members[:, None] == others, 0.5, members[:, None] > others)
    rng = np.random.default_rng(0)
    weights = [rng.multinomial(n, np.full(n, 1 / n), NUM_RESAMPLES) / n for n in wins.shape]
    resampled = np.einsum("ri,ij,rj->r", weights[0], wins, weights[1], optimize=True)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(auc), float(low), float(high)


def _choose(indices: Sequence[int], rng: np.random.Generator) -> list[int]:
    if len(indices) <= MAX_PATIENTS:
        return list(indices)
    return sorted(int(i) for i in rng.choice(np.asarray(indices), MAX_PATIENTS, replace=False))
