"""All updates of a round, for rules that need each of them: in memory, or on disk where they are many.

Shapes: n updates, P values of each.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from medfl_ray.params import Vector

ROBUST_STATE = "robust/"
"""What the names of a robust rule's own part of the server's state begin with."""
IN_MEMORY_BYTES = 2**30
"""Beyond this the updates of a round go to a file without a name, which the system removes with the process."""


class Updates:
    """Updates and their weights, always read in the order of the hospitals' names: no rule depends on who was first."""

    def __init__(self, size: int, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        """Hold no updates yet, of P = size values each."""
        self._size, self._limit = size, in_memory_bytes
        self._weights: dict[str, int] = {}
        self._rows: dict[str, Vector] = {}
        self._file: Any = None
        self._places: dict[str, int] = {}

    def add(self, hospital: str, update: Vector, weight: int) -> None:
        """Keep one hospital's update, [P]."""
        self._weights[hospital] = weight
        if (len(self._rows) + 1) * self._size * 4 <= self._limit:
            self._rows[hospital] = update
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as this object is
        self._places[hospital] = len(self._places)
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(update, dtype=np.float32).tobytes())
        self._file.flush()

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def size(self) -> int:
        """Number of values P of an update."""
        return self._size

    @property
    def hospitals(self) -> tuple[str, ...]:
        """Whose updates these are, sorted."""
        return tuple(sorted(self._weights))

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """Aggregation weights, [n], in the order of `hospitals`."""
        return np.array([self._weights[name] for name in self.hospitals], dtype=np.float64)

    @property
    def block_size(self) -> int:
        """Values of one update that a block has, so that a block of all updates fits the memory that is allowed."""
        return max(1024, min(self._size, self._limit // (4 * max(1, len(self)))))

    def rows(self, start: int, stop: int) -> Vector:
        """Return values start to stop of every update, [n, stop - start], in the order of `hospitals`."""
        stop = min(stop, self._size)
        mapped: Any = None
        if self._file is not None:
            mapped = np.memmap(self._file, dtype=np.float32, mode="r", shape=(len(self._places), self._size))
        block = np.empty((len(self), stop - start), dtype=np.float32)
        for row, name in zip(block, self.hospitals, strict=True):
            source = self._rows[name] if name in self._rows else mapped[self._places[name]]
            row[:] = source[start:stop]
        return block
