"""The hospitals of a trial in its process, which Ray Tune lets the next trial have: their images are prepared once."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfl_ray.config.run import RunConfig
from medfl_ray.federation.local_pool import LocalPool
from medfl_ray.messages import ClientFailure, SiteEvaluation
from medfl_ray.params import Vector

if TYPE_CHECKING:
    from medfl_ray.assembly.spec import HospitalSpec
    from medfl_ray.data.prepare.dataset import HospitalData
    from medfl_ray.federation.hospital import Hospital

SWEEP_PATIENCE_S = 10.0
VARIED: Mapping[str, Any] = {
    "privacy": True,
    "aggregation": True,
    "model": {"features"},
    "training": {"learning_rate", "measured_group_sizes"},
    "federation": {"local_steps", "local_epochs"},
}
"""What trials of one search differ in; none of it decides how a hospital's images are read."""


class TrialPool(LocalPool):
    """Hospitals that draw no pictures, since nobody looks at those of a trial, and leave their images to the next."""

    def evaluate(
        self, round: int, hospitals: Sequence[str], weights: Vector, pictures: bool, deadline_s: float | None
    ) -> Iterator[SiteEvaluation | ClientFailure]:
        """Score weights as any pool does."""
        return super().evaluate(round, hospitals, weights, False, deadline_s)

    def close(self) -> None:
        """Let go of the hospitals; their images are closed when this process ends."""
        self._hospitals.clear()


@dataclass(frozen=True)
class _Images:
    """Whose images, read in which way and kept where; equal for all trials of a search."""

    members: tuple[str, ...]
    reading: str
    is_patient_level: bool
    cache_root: Path | None
    run: RunConfig = field(compare=False)


def trial_pool(specs: Sequence[HospitalSpec]) -> TrialPool:
    """Return all hospitals in this process, with the images that an earlier trial of it has prepared."""
    keeps_late = bool(specs) and specs[0].run.federation.stragglers == "keep"
    return TrialPool({spec.policy.hospital: partial(_build, spec) for spec in specs}, keeps_late)


def _build(spec: HospitalSpec) -> Hospital:
    from medfl_ray.assembly.hospital import build_hospital, cache_root

    return build_hospital(spec, lambda run, members: open_once(run, members, cache_root(spec)))


def open_once(run: RunConfig, members: tuple[str, ...], cache_root: Path | None = None) -> HospitalData:
    """Return the data of hospitals as `open_hospital_data` does, opened by the first trial that asks.

    Nobody else may close them: the next trial of this process has the same ones.
    """
    reading = run.model_dump_json(exclude=dict(VARIED))
    return _opened(_Images(members, reading, run.privacy.patient_level, cache_root, run))


@lru_cache(maxsize=256)
def _opened(images: _Images) -> HospitalData:
    from medfl_ray.data.sources import open_hospital_data

    return open_hospital_data(images.run, images.members, cache_root=images.cache_root)


def sweep_after(folders: Sequence[Path], patience_s: float = SWEEP_PATIENCE_S) -> None:
    """Remove the prepared images that ended trial processes have left below their hospitals' folders.

    A process that ends in order removes its own; one that Ray kills does not. One that still ends holds its
    lock, so this waits for it; what another run is using at that time stays.
    """
    from medfl_ray.data.prepare.cache_folders import PREFIX, sweep_caches

    until = time.monotonic() + patience_s
    while True:
        for folder in folders:
            sweep_caches(folder)
        if not any(True for folder in folders for _ in folder.glob(f"{PREFIX}*")) or time.monotonic() > until:
            return
        time.sleep(0.2)


def spare_the_collector() -> None:
    """Take the libraries out of the garbage collector's sight, once: each trial has it look several times."""
    if gc.get_freeze_count() == 0:
        from medfl_ray.models.light_monai import load_monai

        load_monai()
        gc.collect()
        gc.freeze()
