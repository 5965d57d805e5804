"""Prepared cases, each decoded once: in memory, in a private temporary folder, or not kept at all."""

from __future__ import annotations

import errno
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, overload

import numpy as np
import structlog

from medfl_ray.data.cases import PreparedCase
from medfl_ray.data.prepare.cache_folders import locked_folder, private_file
from medfl_ray.errors import DataError

Loader = Callable[[], PreparedCase]
OF_THIS_MACHINE = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
"""Faults of reading that say nothing of the file; EIO and EACCES may be those of the one file, and are its own."""

log = structlog.get_logger()


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

    The disk cache lives in a folder that only this user can read and that is removed with the sequence. Its files are
    named by position: no identifier is written.
    """

    def __init__(
        self,
        loaders: Sequence[Loader],
        cache: Literal["memory", "disk", "none"] = "memory",
        budget: MemoryBudget | None = None,
        root: Path | None = None,
    ) -> None:
        """Take the cases; with cache: disk prepared volumes lie in a locked folder below `root`, if there is one."""
        self._loaders = tuple(loaders)
        self._budget = budget or MemoryBudget(None)
        self._id = object()
        weakref.finalize(self, self._budget.forget, [(self._id, i) for i in range(len(self._loaders))])
        self._locks = tuple(threading.Lock() for _ in self._loaders)
        self._kept: dict[int, PreparedCase] = {}
        self._keeps = cache != "none"
        self._told = False
        self._folder: Path | None = None
        self._close: Callable[[], object] = lambda: None
        if cache == "disk":
            self._folder, release = locked_folder(root)
            self._close = weakref.finalize(self, release)

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
            stored = self._to_disk(case, self._folder / f"{position}") if self._folder is not None else case
            if self._keeps and stored is not None:
                case = stored
                self._kept[position] = case
                if self._folder is None:
                    # The dictionary alone, not this object: a budget of the process must not keep a hospital alive.
                    drop = partial(self._kept.pop, position, None)
                    self._budget.keep((self._id, position), num_bytes_of(case), drop)
            return case

    def __iter__(self) -> Iterator[PreparedCase]:
        return (self[i] for i in range(len(self)))

    def close(self) -> None:
        """Remove the folder on the disk, if there is one; nothing can be read afterwards."""
        self._kept.clear()
        self._close()

    def problems(self, num_workers: int) -> dict[int, str]:
        """Prepare every case once and return what is wrong, by position; whatever goes wrong is of that case alone.

        Raises:
          MemoryError, RuntimeError, OSError: this machine, and not the case, is at fault; which case met it says
            nothing of it. RuntimeError is how torch reports that there is no memory.
        """

        def problem_of(position: int) -> str | None:
            try:
                self[position]
            except Exception as error:
                if is_of_this_machine(error):
                    raise
                if isinstance(error, DataError):
                    return str(error)
                return f"case at position {position + 1}: {type(error).__name__} while it was read"
            return None

        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            found = enumerate(pool.map(problem_of, range(len(self))))
            return {position: problem for position, problem in found if problem is not None}

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

    def _to_disk(self, case: PreparedCase, stem: Path) -> PreparedCase | None:
        """Write the voxels and keep memory maps of them, which the system drops when memory is short.

        Returns:
          None where the disk takes no more: the case is used without it, and prepared again when it is next needed.
        """
        files = stem.with_suffix(".image.npy"), stem.with_suffix(".label.npy")
        try:
            image = _mapped(case.image, files[0])
            label = _mapped(case.label, files[1]) if isinstance(case.label, np.ndarray) else case.label
        except OSError as error:
            for file in files:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
            if not self._told:  # once: how often it happens follows how many cases are read
                self._told = True
                log.warning("cache_cannot_be_written", reason=error.strerror or type(error).__name__)
            return None
        return replace(case, image=image, label=label)


def is_of_this_machine(error: BaseException | None) -> bool:
    """Say whether an error is a lack of memory, files or disk, of which no case is the cause.

    Readers put such a fault into words of their own, which keep it as context. Where a reader itself found no room
    for what a file's header claims, that is the file's own fault.
    """
    if isinstance(error, MemoryError) or _is_of_torch_memory(error):
        return True
    while error is not None:
        if isinstance(error, OSError) and error.errno in OF_THIS_MACHINE:
            return True
        error = error.__context__
    return False


def _is_of_torch_memory(error: BaseException | None) -> bool:
    """Say whether torch found no memory; it is not imported for that, since without it it cannot have failed."""
    if not isinstance(error, RuntimeError):
        return False
    torch = sys.modules.get("torch")
    return (torch is not None and isinstance(error, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def num_bytes_of(case: PreparedCase) -> int:
    """Return the bytes of a case's voxels."""
    return case.image.nbytes + (case.label.nbytes if isinstance(case.label, np.ndarray) else 0)


def _mapped(array: np.ndarray, path: Path) -> np.ndarray:
    with open(path, "wb", opener=private_file) as stream:
        np.save(stream, array, allow_pickle=False)
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
