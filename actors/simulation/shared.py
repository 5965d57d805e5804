"""Vectors that all processes of a simulation read, named in the store of the cluster rather than handed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medfl_ray.params import Vector


@dataclass(frozen=True, eq=False)
class Shared:
    """A vector that lies in Ray's store, by its reference.

    Ray looks for an argument of its own in the store with every piece of work; of this one it hands over the name.
    """

    reference: Any


class Fetched:
    """The shared vector that a process used last; it is fetched when it is first named, and kept until another is."""

    def __init__(self) -> None:
        self._latest: tuple[Any, Vector] | None = None

    def __call__(self, vector: Vector | Shared) -> Vector:
        """Return the vector itself."""
        if not isinstance(vector, Shared):
            return vector
        if self._latest is None or self._latest[0] != vector.reference:
            import ray

            self._latest = None  # two at once would double what a process holds of the store
            self._latest = vector.reference, ray.get(vector.reference)
        return self._latest[1]
