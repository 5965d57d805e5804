"""Prepared cases, each decoded once: in memory, in a private temporary folder, or not kept at all."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

import numpy as np

from medfl_ray.data.cases import PreparedCase

Loader = Callable[[], PreparedCase]


class PreparedCases(Sequence[PreparedCase]):
    """A lazy sequence of prepared cases.

    The disk cache lives in a new temporary folder that only this user can read and that is removed with
    the sequence. Its files are named by position: no identifier is written.
    """

    def __init__(self, loaders: Sequence[Loader], cache: Literal["memory", "disk", "none"] = "memory") -> None:
        self._loaders = tuple(loaders)
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
            if position in self._kept:
                return self._kept[position]
            case = self._loaders[position]()
            if self._folder is not None:
                case = self._to_disk(case, self._folder / f"{position}")
            if self._keeps:
                self._kept[position] = case
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


def _mapped(array: np.ndarray, path: Path) -> np.ndarray:
    np.save(path, array, allow_pickle=False)
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
