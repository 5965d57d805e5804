"""What a Flower strategy remembers, as plain arrays: a checkpoint holds it, and a resumed run goes on from its bits.

A strategy keeps its state in attributes. Numbers, text, numpy arrays, Flower's ArrayRecords, and lists and dicts of
them are taken; functions and classes are code, which the constructor makes again. Anything else is refused: a state
that is kept in part would be another run after a restart, and pickle would let a checkpoint run code.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.updates import ROBUST_STATE
from medfl_ray.errors import ConfigError, StorageError

STATE = f"{ROBUST_STATE}flower/state"
ARRAYS = f"{ROBUST_STATE}flower/array/"
KINDS = "biuf"
"""Kinds of numpy arrays that safetensors holds: truth values, whole numbers and floats."""
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)

State = Mapping[str, npt.NDArray[Any]]
StrategyArrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Records:
    """How a library's record of named arrays is recognised, taken apart and made again; and its kind of strategy."""

    kind: type
    take: Callable[[Any], Mapping[str, npt.NDArray[Any]]]
    make: Callable[[Mapping[str, npt.NDArray[Any]]], Any]
    strategy: type


@dataclass
class Capture:
    """Attributes on their way into arrays; `arrays` are those met so far."""

    records: Records
    arrays: list[npt.NDArray[Any]] = field(default_factory=list)

    def attributes(self, owner: Any) -> dict[str, Any]:
        """Return an object's attributes but its code, as JSON can hold them."""
        name = type(owner).__name__
        return {
            key: self.value(value, f"{name}.{key}") for key, value in vars(owner).items() if not isinstance(value, CODE)
        }

    def value(self, value: Any, where: str) -> Any:
        """Return one value as JSON can hold it; arrays are put aside and named by their number.

        Raises:
          ConfigError: it is of a kind that cannot be kept.
        """
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (np.ndarray, np.generic)) and np.asarray(value).dtype.kind in KINDS:
            return {"is": "array", "at": self._put(value), "scalar": isinstance(value, np.generic)}
        if isinstance(value, self.records.kind):
            return {"is": "record", "at": [[k, self._put(v)] for k, v in self.records.take(value).items()]}
        if isinstance(value, dict):
            items = [[self.value(k, where), self.value(v, where)] for k, v in value.items()]
            return {"is": "dict", "items": items}
        if isinstance(value, (list, tuple)):
            return {"is": type(value).__name__, "items": [self.value(item, where) for item in value]}
        if isinstance(value, self.records.strategy):
            return {"is": "strategy", "attributes": self.attributes(value)}
        raise ConfigError(
            f"{where} is a {type(value).__name__}, which a checkpoint cannot hold, so that a resumed run would differ. "
            "Keep a strategy's state in numbers, text, numpy arrays, ArrayRecords, and lists and dicts of them"
        )

    def _put(self, value: Any) -> int:
        self.arrays.append(np.array(value, order="C", copy=True))
        return len(self.arrays) - 1


def capture(strategy: Any, records: Records, round: int) -> StrategyArrays:
    """Return what a strategy remembers after so many rounds, as arrays by name.

    Raises:
      ConfigError: an attribute is of a kind that cannot be kept.
    """
    work = Capture(records)
    document = {"round": round, "attributes": work.attributes(strategy)}
    text = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)
    return {STATE: text, **{f"{ARRAYS}{number:05d}": array for number, array in enumerate(work.arrays)}}


def restore(strategy: Any, records: Records, state: State) -> int:
    """Put back into a new strategy what `capture` kept; return the rounds behind it, 0 where there are none.

    Raises:
      StorageError: the state is not one that this version writes.
    """
    if STATE not in state:
        return 0
    try:
        document = json.loads(np.asarray(state[STATE], dtype=np.uint8).tobytes())
        _set(strategy, document["attributes"], records, state)
        return int(document["round"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"the state of the Flower strategy {type(strategy).__name__} in the checkpoint cannot be read "
            f"({type(error).__name__}); was the class changed since? Resume with the class that the run began with"
        ) from None


def _set(owner: Any, attributes: Mapping[str, Any], records: Records, state: State) -> None:
    for name, kept in attributes.items():
        if isinstance(kept, dict) and kept["is"] == "strategy":
            _set(getattr(owner, name), kept["attributes"], records, state)
        else:
            setattr(owner, name, _value(kept, records, state))


def _value(kept: Any, records: Records, state: State) -> Any:
    if not isinstance(kept, dict):
        return kept
    kind = kept["is"]
    if kind == "array":
        array = _array(kept["at"], state)
        return array[()] if kept["scalar"] else array
    if kind == "record":
        return records.make({name: _array(at, state) for name, at in kept["at"]})
    if kind == "dict":
        return {_value(key, records, state): _value(value, records, state) for key, value in kept["items"]}
    items = [_value(item, records, state) for item in kept["items"]]
    return tuple(items) if kind == "tuple" else items


def _array(number: int, state: State) -> npt.NDArray[Any]:
    return np.array(state[f"{ARRAYS}{number:05d}"], copy=True)
