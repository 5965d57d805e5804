"""Which data a model was trained on, as a hash that says nothing of any patient."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.data.cases import Case
from medfl_ray.data.sources import cases_of
from medfl_ray.errors import ConfigError, DataError

MAX_BYTES = 2 << 30


class DataFingerprint(NamedTuple):
    """64 hex digits, and of what they are the hash."""

    digest: str
    of: Literal["contents", "names and sizes", "recipe", "declaration"]


def data_fingerprint(run: RunConfig, policy: SitePolicy) -> DataFingerprint:
    """Hash a hospital's data set: public and synthetic files as far as they can be read here, else its declaration.

    Of private data nothing is read: a hash of their contents would tell whether one patient was added.
    """
    if run.data.phantom is not None:
        recipe = run.data.phantom.model_dump(mode="json")
        return DataFingerprint(_digest([recipe, policy.hospital, run.spatial_dims]), "recipe")
    declared = DataFingerprint(_digest(policy.model_dump(mode="json", include=DECLARED)), "declaration")
    if policy.declared == "private":
        return declared
    try:
        return fingerprint_of(cases_of(run, policy.hospital))
    except (ConfigError, DataError, OSError):  # the files lie on another machine
        return declared


DECLARED = {"hospital", "data_set", "declared", "num_patients"}


def fingerprint_of(cases: Iterable[Case]) -> DataFingerprint:
    """Hash what cases consist of, in any order and wherever it lies."""
    cases = tuple(cases)
    files = sorted({file for case in cases for path in _paths(case) for file in _files(path)})
    classes = sorted(str(case.label) for case in cases if isinstance(case.label, int))
    if sum(file.stat().st_size for file in files) <= MAX_BYTES:
        return DataFingerprint(_digest([sorted(_file_digest(file) for file in files), classes]), "contents")
    return DataFingerprint(_digest([sorted((f.name, f.stat().st_size) for f in files), classes]), "names and sizes")


def _paths(case: Case) -> Iterator[Path]:
    yield from case.images
    if isinstance(case.label, Path):
        yield case.label


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
