"""A hospital that trains by a MONAI ClientAlgo: the round's protocol is ours, training and scores are its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medfl_ray.federation.hospital import Hospital
from medfl_ray.messages import ClientFailure, SiteEvaluation
from medfl_ray.params import Vector

if TYPE_CHECKING:
    from medfl_ray.federation.hospital import HospitalParts
    from medfl_ray.training.client_algo import AlgoTrainer


class AlgoHospital(Hospital):
    """A hospital whose metrics are those of its ClientAlgo; it has no figures per patient and no pictures."""

    def __init__(self, parts: HospitalParts, algo: AlgoTrainer) -> None:
        super().__init__(parts)
        self._algo = algo

    def evaluate(self, round: int, weights: Vector, pictures: bool = False) -> SiteEvaluation | ClientFailure:
        """Have the ClientAlgo score the weights."""

        def work() -> SiteEvaluation:
            return SiteEvaluation(hospital=self.id, round=round, metrics=self._labelled(self._algo.metrics(weights)))

        return self._guarded(round, 0, "evaluate", False, work)
