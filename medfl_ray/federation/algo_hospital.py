"""A hospital that trains by a MONAI ClientAlgo: the round's protocol is ours, training and scores are its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from medfl_ray.federation.hospital import Hospital
from medfl_ray.messages import RoundPlan, SiteEvaluation
from medfl_ray.params import Vector

if TYPE_CHECKING:
    from medfl_ray.federation.hospital import HospitalParts
    from medfl_ray.training.rules.client_algo import AlgoTrainer
    from medfl_ray.training.rules.local_job import LocalJob, LocalOutcome


class AlgoHospital(Hospital):
    """A hospital whose metrics are those of its ClientAlgo; it has no figures per patient and no pictures."""

    def __init__(self, parts: HospitalParts, algo: AlgoTrainer) -> None:
        super().__init__(parts)
        self._algo = algo

    def _train_by_rule(self, plan: RoundPlan, sent: Vector, job: LocalJob) -> LocalOutcome:
        """Have the ClientAlgo train; of the strategies that go with it none asks a hospital for more."""
        from medfl_ray.training.rules.client_rules import shortened

        outcome = self._train_plainly(plan, sent, job)
        return replace(outcome, delta=shortened(outcome.delta, self._parts.run.aggregation.max_update_norm))

    def _score(self, round: int, weights: Vector, pictures: bool) -> SiteEvaluation:
        """Have the ClientAlgo score the weights."""
        return SiteEvaluation(hospital=self.id, round=round, metrics=self._labelled(self._algo.metrics(weights)))
