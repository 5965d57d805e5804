"""How far every attempt at a round has come, durably: open, collecting, aggregated, published or abandoned.

A crash leaves an attempt where it was. Whoever resumes the run closes it as abandoned, with a receipt, so that each
charge in a hospital's ledger has a round that explains it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, bindparam, create_engine, event, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from medfl_ray.errors import StorageError
from medfl_ray.messages import Receipt, RoundPlan
from medfl_ray.round_times import clock_of, stamp
from medfl_ray.store.tables import round_attempts, round_deliveries, rounds_metadata

JOURNAL_NAME = "rounds.sqlite"
NEXT = {
    "open": ("collecting", "abandoned"),
    "collecting": ("aggregated", "abandoned"),
    "aggregated": ("published", "abandoned"),
}
LOCK_TIMEOUT_S = 30.0

# Put together once: this takes longer than running them, and a round of a simulation is short.
_OPEN = insert(round_attempts)
_CLOSE = (
    update(round_attempts)
    .where(*(round_attempts.c[name] == bindparam(f"its_{name}") for name in ("job", "round", "attempt")))
    .where(round_attempts.c.state.in_(bindparam("before", expanding=True)))
    .values(state=bindparam("next_state"))
)
_MOVE = _CLOSE.values(weights_after=bindparam("weights_after"))
_DELIVER = "INSERT INTO round_deliveries (job, round, attempt, hospital) VALUES (?, ?, ?, ?)"


@dataclass(frozen=True)
class OpenAttempt:
    """An attempt that a process left without closing it; `delivered` are the hospitals whose updates had arrived."""

    plan: RoundPlan
    state: str
    delivered: tuple[str, ...]


class RoundJournal:
    """The states of one run's rounds, in an SQLite file of the run's folder; made when the first round opens."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_NAME
        self._made = False

    @cached_property
    def _engine(self) -> Engine:
        engine = create_engine(f"sqlite:///{self._path}", pool_size=1, max_overflow=0)
        event.listen(engine, "connect", _prepare)
        return engine

    def dispose(self) -> None:
        """Let go of the file; the next call opens it again."""
        engine = self.__dict__.pop("_engine", None)
        if engine is not None:
            engine.dispose()

    def open(self, plan: RoundPlan) -> None:
        """Note a round before anything is reserved for it.

        Raises:
          StorageError: this attempt at the round was opened before, or the disk is full.
        """
        if not self._made:
            with self._writing() as connection:
                rounds_metadata.create_all(connection)
            self._made = True
        opened_at = stamp(clock_of(not plan.hospitals)())  # a plan that may name nobody is of a secret cohort
        row = {**_key(plan), "state": "open", "plan": plan.model_dump_json(), "opened_at": opened_at}
        with self._writing() as connection:
            connection.execute(_OPEN, row)

    def move(self, plan: RoundPlan, state: str, weights_after: str | None = None) -> None:
        """Take an attempt to its next state.

        Raises:
          StorageError: the attempt is in a state that this one does not follow, or the disk is full.
        """
        before = [name for name, following in NEXT.items() if state in following]
        with self._writing() as connection:
            moved = connection.execute(_MOVE, _moved(plan, before, state) | {"weights_after": weights_after}).rowcount
        if moved != 1:
            raise StorageError(
                f"round {plan.round}, attempt {plan.attempt} cannot become {state}: it is not {' or '.join(before)}. "
                "Another process may have run this folder; continue with medfl-ray run --resume"
            )

    def deliver(self, plan: RoundPlan, hospitals: Iterable[str]) -> None:
        """Note whose updates are in the sum; the end of the process loses nothing, a power cut may lose the last notes.

        They only tell how far an attempt had come. What is charged stands in the ledgers, and a note for each piece of
        a simulation would else wait for the disk. The attempt's next state brings them to the disk with it.

        Raises:
          StorageError: one of them had delivered before, or the disk is full.
        """
        rows = [(*_key(plan).values(), name) for name in hospitals]
        if rows:
            with self._writing(flushed=False) as connection:
                connection.exec_driver_sql(_DELIVER, rows)

    def close(self, receipt: Receipt) -> None:
        """Take the attempt of a receipt to its end; nothing happens where it was never opened or is closed.

        Raises:
          StorageError: the disk is full.
        """
        if not self._path.exists():
            return
        with self._writing() as connection:
            connection.execute(_CLOSE, _moved(receipt, list(NEXT), "published" if receipt.published else "abandoned"))

    def unfinished(self) -> list[OpenAttempt]:
        """Return the attempts that are neither published nor abandoned, oldest first."""
        if not self._path.exists():
            return []
        open_ones = select(round_attempts).where(round_attempts.c.state.in_(NEXT)).order_by(round_attempts.c.id)
        with self._writing() as connection:
            rounds_metadata.create_all(connection)
            self._made = True
            return [_attempt(connection, row.plan, row.state) for row in connection.execute(open_ones).all()]

    @contextmanager
    def _writing(self, flushed: bool = True) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                # Before the first statement that writes, at which SQLite's transaction begins.
                connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if flushed else 'NORMAL'}")
                yield connection
        except IntegrityError:
            raise StorageError(
                f"{JOURNAL_NAME} holds this attempt at the round already, or this hospital's update in it; nothing is "
                "applied twice. Continue with medfl-ray run --resume"
            ) from None
        except DBAPIError as error:
            text = str(error.orig)
            why = os.strerror(errno.ENOSPC) if "full" in text else f"SQLite says {text}"
            raise StorageError(
                f"{JOURNAL_NAME} cannot be used: {why}. Free space, or restore the file from a backup; the run "
                "continues from its last checkpoint with medfl-ray run --resume."
            ) from None


def _attempt(connection: Connection, plan_json: str, state: str) -> OpenAttempt:
    plan = RoundPlan.model_validate_json(plan_json)
    names = select(round_deliveries.c.hospital).where(_is(round_deliveries, plan))
    return OpenAttempt(plan, state, tuple(sorted(connection.execute(names).scalars())))


def _key(plan: RoundPlan | Receipt) -> dict[str, Any]:
    return {"job": plan.job, "round": plan.round, "attempt": plan.attempt}


def _moved(plan: RoundPlan | Receipt, before: list[str], state: str) -> dict[str, Any]:
    its = {f"its_{name}": value for name, value in _key(plan).items()}
    return {**its, "before": before, "next_state": state}


def _is(table: Any, plan: RoundPlan | Receipt) -> Any:
    return (table.c.job == plan.job) & (table.c.round == plan.round) & (table.c.attempt == plan.attempt)


def _prepare(connection: Any, record: object) -> None:
    for pragma in ("journal_mode = WAL", f"busy_timeout = {int(1000 * LOCK_TIMEOUT_S)}"):
        connection.execute(f"PRAGMA {pragma}")
