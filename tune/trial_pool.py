"""The hospitals of a trial in its process, which Ray Tune lets the next trial have: their images are prepared once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from medfl_ray.config import RunConfig
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.messages import ClientFailure, SiteEvaluation
from medfl_ray.params import Vector

if TYPE_CHECKING:
    from actors.hospital import HospitalSpec
    from medfl_ray.data.dataset import HospitalData

VARIED: Mapping[str, Any] = {
    "privacy": True,
    "aggregation": True,
    "model": {"features"},
    "training": {"learning_rate", "measured_group_sizes"},
    "federation": {"local_steps", "local_epochs"},
}
"""What trials of one search differ in; none of it decides how a hospital's images are read."""


class TrialPool(LocalPool):
    """Hospitals that draw no pictures: nobody looks at those of a trial."""

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        """Score weights as any pool does."""
        return super().evaluate(round, hospitals, weights, False, deadline_s)


@dataclass(frozen=True)
class _Images:
    """Whose images, read in which way; equal for all trials of a search."""

    members: tuple[str, ...]
    reading: str
    run: RunConfig = field(compare=False)


def trial_pool(specs: Sequence[HospitalSpec]) -> TrialPool:
    """Return all hospitals in this process, with the images that an earlier trial of it has prepared."""
    from functools import partial

    from actors.hospital import build_hospital

    keeps_late = bool(specs) and specs[0].run.federation.stragglers == "keep"
    builders = {spec.policy.hospital: partial(build_hospital, spec, open_once) for spec in specs}
    return TrialPool(builders, keeps_late)


def open_once(run: RunConfig, members: tuple[str, ...]) -> HospitalData:
    """Return the data of hospitals as `open_hospital_data` does, opened by the first trial that asks."""
    return _opened(_Images(members, run.model_dump_json(exclude=dict(VARIED)), run))


@lru_cache(maxsize=256)
def _opened(images: _Images) -> HospitalData:
    from medfl_ray.data.sources import open_hospital_data

    return open_hospital_data(images.run, images.members)


def spare_the_collector() -> None:
    """Take the libraries out of the garbage collector's sight, once: each trial has it look several times."""
    if gc.get_freeze_count() == 0:
        from medfl_ray.models.light_monai import load_monai

        load_monai()
        gc.collect()
        gc.freeze()
