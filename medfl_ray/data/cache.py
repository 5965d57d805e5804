"""Prepared cases, each decoded once: in memory, in a private temporary folder, or not kept at all."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, overload

import numpy as np

from medfl_ray.data.cases import PreparedCase

Loader = Callable[[], PreparedCase]


class MemoryBudget:
    """Bytes that the prepared cases of one process may take together; what was longest unused is dropped first.

    A case that is in use stays alive until its user is done with it, and one larger than the whole budget is not kept.
    """

    def __init__(self, num_bytes: int | None) -> None:
        """Take the limit in bytes, None for none."""
        self._limit = num_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[object, tuple[int, Callable[[], object]]] = OrderedDict()
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes of all cases that are kept."""
        return self._used

    def keep(self, key: object, num_bytes: int, drop: Callable[[], object]) -> None:
        """Count a case that was just kept; `drop` is called when it has to make room."""
        with self._lock:
            self._forget(key)
            self._held[key] = num_bytes, drop
            self._used += num_bytes
            while self._limit is not None and self._used > self._limit:
                oldest = next(iter(self._held))
                _, drop_oldest = self._held[oldest]
                self._forget(oldest)
                drop_oldest()

    def touch(self, key: object) -> None:
        """Note that a case was used."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)

    def forget(self, keys: Iterable[object]) -> None:
        """Stop counting cases whose owner is gone."""
        with self._lock:
            for key in keys:
                self._forget(key)

    def _forget(self, key: object) -> None:
        if key in self._held:
            self._used -= self._held.pop(key)[0]


class PreparedCases(Sequence[PreparedCase]):
    """A lazy sequence of prepared cases.

    The disk cache lives in a new temporary folder that only this user can read and that is removed with
    the sequence. Its files are named by position: no identifier is written.
    """

    def __init__(
        self,
        loaders: Sequence[Loader],
        cache: Literal["memory", "disk", "none"] = "memory",
        budget: MemoryBudget | None = None,
    ) -> None:
        self._loaders = tuple(loaders)
        self._budget = budget or MemoryBudget(None)
        self._id = object()
        weakref.finalize(self, self._budget.forget, [(self._id, i) for i in range(len(self._loaders))])
        self._locks = tuple(threading.Lock() for _ in self._loaders)
        self._kept: dict[int, PreparedCase] = {}
        self._keeps = cache != "none"
        self._folder: Path | None = None
        if cache == "disk":
            self._folder = Path(tempfile.mkdtemp(prefix="medfl-ray-prepared-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._loaders)

    @overload
    def __getitem__(self, index: int) -> PreparedCase: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreparedCase]: ...
    def __getitem__(self, index: int | slice) -> PreparedCase | list[PreparedCase]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        with self._locks[position]:
            kept = self._kept.get(position)
            if kept is not None:
                self._budget.touch((self._id, position))
                return kept
            case = self._loaders[position]()
            if self._folder is not None:
                case = self._to_disk(case, self._folder / f"{position}")
            if self._keeps:
                self._kept[position] = case
                if self._folder is None:
                    # The dictionary alone, not this object: a budget of the process must not keep a hospital alive.
                    drop = partial(self._kept.pop, position, None)
                    self._budget.keep((self._id, position), num_bytes_of(case), drop)
            return case

    def __iter__(self) -> Iterator[PreparedCase]:
        return (self[i] for i in range(len(self)))

    def decode_all(self, num_workers: int) -> None:
        """Fill the cache now, with threads; decompression and resampling release the interpreter's lock."""
        if not self._keeps or num_workers == 0:
            return
        with ThreadPoolExecutor(num_workers) as pool:
            try:
                for _ in pool.map(self.__getitem__, range(len(self))):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)  # after an error nobody needs the rest

    def _to_disk(self, case: PreparedCase, stem: Path) -> PreparedCase:
        """Write the voxels and keep memory maps of them, which the system drops when memory is short."""
        image = _mapped(case.image, stem.with_suffix(".image.npy"))
        label = (
            _mapped(case.label, stem.with_suffix(".label.npy")) if isinstance(case.label, np.ndarray) else case.label
        )
        return replace(case, image=image, label=label)


def num_bytes_of(case: PreparedCase) -> int:
    """Return the bytes of a case's voxels."""
    return case.image.nbytes + (case.label.nbytes if isinstance(case.label, np.ndarray) else 0)


def _mapped(array: np.ndarray, path: Path) -> np.ndarray:
    np.save(path, array, allow_pickle=False)
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
