"""Work dealt to a few actors that may die: two pieces at each, the next to whoever is done first.

Towards the end each of several holds one only, so that nobody waits for an actor that has two.

A piece whose actor died is dealt again where that is free, in parts, once that actor or another can take it. What the
actor had not begun is not counted as tried: it did not end the process.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

UNDER_WAY = 2
TRIES = 3

WorkItem = TypeVar("WorkItem")


@dataclass(frozen=True)
class WorkLost:
    """Why a piece of work has no result; `late` where the deadline came first."""

    reason: str
    late: bool = False


GONE = WorkLost("the process that did it ended; Ray starts it again")


class Dealer:
    """Deals work to actors that have a method `process_id`, and knows which of them are starting again."""

    def __init__(self, actors: Sequence[Any]) -> None:
        """Take the handles of the actors, which Ray restarts when they die."""
        self._actors = dict(enumerate(actors))
        self._away: dict[Any, int] = {}
        """Questions, each to an actor that died, whose answer says that it is back."""

    def deal(
        self,
        method: str,
        pieces: Iterable[WorkItem],
        *common: Any,
        tries: int = TRIES,
        timeout_s: float | None = None,
        apart: Callable[[WorkItem, bool], Sequence[WorkItem]] = lambda piece, last: [piece],
    ) -> Iterator[tuple[WorkItem, Any]]:
        """Yield (piece, what `method(piece, *common)` returned, or `WorkLost`) as each is done, every piece once.

        Args:
          tries: how often a piece is begun at most; 1 where doing it again is not free. Above 1 it may be one more, for
            a piece behind the one that ended the process.
          apart: cuts a piece that was lost with its actor into those that are dealt instead; the second argument says
            whether it is for the last time.
          timeout_s: seconds after which what has not come is lost; its actors are started again.
        """
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        waiting = deque((piece, 0) for piece in pieces)
        sent: dict[Any, tuple[WorkItem, int, int]] = {}
        try:
            while sent or (waiting and self._actors):
                for actor in self._free(sent, len(waiting)):
                    if waiting:
                        piece, tried = waiting.popleft()
                        sent[getattr(self._actors[actor], method).remote(piece, *common)] = piece, tried + 1, actor
                left = None if ends is None else max(0.0, ends - time.monotonic())
                ready, _ = ray.wait([*sent, *self._away], num_returns=1, timeout=left)
                if not ready:
                    break
                if ready[0] in self._away:
                    self._readmit(ready[0])
                    continue
                actor = sent[ready[0]][2]
                result = self._result(ready[0], actor)
                if result is GONE and tries > 1:
                    _count_the_oldest_only(sent, actor, ready[0])
                piece, tried, _ = sent.pop(ready[0])
                if result is GONE and tried < tries:
                    waiting.extend((part, tried) for part in apart(piece, tried + 1 >= tries))
                else:
                    yield piece, result
        finally:  # also where whoever asked has had enough: the next round must not wait for what is late
            for actor in {actor for _, _, actor in sent.values()}:
                ray.kill(self._actors[actor], no_restart=False)
                self._probe_restart(actor)
        reason = WorkLost("late", late=True) if self._actors else WorkLost("no process is left that could do it")
        for piece in [piece for piece, _, _ in sent.values()] + [piece for piece, _ in waiting]:
            yield piece, reason

    def _free(self, sent: Mapping[Any, tuple[Any, int, int]], num_waiting: int) -> list[int]:
        """List the actors that can take a piece, once for each piece; everybody's first comes before the seconds."""
        held = Counter(actor for _, _, actor in sent.values())
        present = [actor for actor in self._actors if actor not in self._away.values()]
        first = [actor for actor in present if held[actor] == 0]
        if num_waiting - len(first) <= len(present) and len(self._actors) > 1:
            return first
        return first + [actor for level in range(1, UNDER_WAY) for actor in present if held[actor] <= level]

    def _result(self, answer: Any, actor: int) -> Any:
        try:
            return ray.get(answer)
        except RayActorError:
            self._probe_restart(actor)
            return GONE
        except RayTaskError as error:
            return WorkLost(f"{type(error.cause).__name__} in the process that did it; its own log has the details")
        except RayError as error:
            return WorkLost(f"Ray lost the answer ({type(error).__name__})")

    def _probe_restart(self, actor: int) -> None:
        if actor in self._actors and actor not in self._away.values():
            self._away[self._actors[actor].process_id.options(max_task_retries=-1).remote()] = actor

    def _readmit(self, answer: Any) -> None:
        """Deal to an actor again that is back; one that Ray has given up is dealt nothing any more."""
        actor = self._away.pop(answer)
        try:
            ray.get(answer)
        except RayError:
            del self._actors[actor]


def _count_the_oldest_only(sent: dict[Any, tuple[WorkItem, int, int]], actor: int, gone: Any) -> None:
    """Take back the try of what a dead actor had not begun: of the pieces behind the one that is gone, or of itself."""
    held = [answer for answer, (_, _, holder) in sent.items() if holder == actor]
    for answer in held[1:] if held[0] == gone else [gone]:
        piece, tried, _ = sent[answer]
        sent[answer] = piece, tried - 1, actor
