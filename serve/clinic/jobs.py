"""Long segmentations as jobs: their state lies in files, so that every ingress replica of a machine can answer.

A job belongs to the token that made it, is bounded in number, and goes a while after its end. A job whose replica
ended is found by its heartbeat and called failed; none hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medfl_ray.errors import MedflError
from serve.clinic.pools import DISK, until_done
from serve.clinic.scratch import remove, remove_unless_new
from serve.refusals import NotServed, Refusal, TooMany

JOB_ID = re.compile(r"[A-Za-z0-9_-]{22}")
STATE, RESULT, SCRATCH, DELETED = "job.json", "result", "scratch", "deleted"
HEARTBEAT_S, DEAD_AFTER_S, POLL_S, KEEP_ALIVE_S = 3.0, 30.0, 0.25, 15.0
ENDED = ("done", "failed")
Status = Literal["waiting", "running", "done", "failed"]


class NotReady(Refusal):
    """A job that has no result yet, or never will."""

    status = 409


@dataclass(frozen=True)
class JobLimits:
    """How many jobs there may be and how long each stays after its last heartbeat."""

    max_jobs: int = 64
    max_per_owner: int = 16
    running_at_once: int = 2
    keep_s: float = 3600.0


@dataclass(frozen=True)
class JobResult:
    """A result as it is sent: bytes, what they are, a name for the file, and headers about them."""

    body: bytes
    media_type: str
    filename: str
    headers: dict[str, str]


class JobState(BaseModel):
    """One job's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    owner: str
    status: Status = "waiting"
    progress: float = 0.0
    error: str = ""
    expires_at: float
    beat_at: float
    media_type: str = ""
    filename: str = ""
    headers: dict[str, str] = {}

    def public(self) -> dict[str, Any]:
        """What the owner is told."""
        told = {"id": self.id, "status": self.status, "progress": round(self.progress, 4)}
        return told | ({"error": self.error} if self.error else {})


Work = Callable[[Path, Callable[[float], None]], Awaitable[JobResult]]


class JobBook:
    """The jobs of one machine, and the running of this replica's own."""

    def __init__(self, root: Path, limits: JobLimits | None = None) -> None:
        self._root, self._limits = root, limits or JobLimits()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._running = asyncio.Semaphore(self._limits.running_at_once)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def open(self, owner: str) -> JobState:
        """Make a job with an empty scratch folder, for whose upload there is room.

        Raises:
          TooMany: there are too many jobs, of this owner or in all.
        """
        self.sweep()
        states = self._states()
        mine = [state for state in states if state.owner == _digest(owner)]
        if len(states) >= self._limits.max_jobs or len(mine) >= self._limits.max_per_owner:
            raise TooMany(
                f"there are {len(states)} jobs, {len(mine)} of this token; fetch and delete results, or wait for them "
                "to expire"
            )
        now = time.time()
        state = JobState(
            id=secrets.token_urlsafe(16), owner=_digest(owner), expires_at=now + self._limits.keep_s, beat_at=now
        )
        (self._root / state.id / SCRATCH).mkdir(parents=True, mode=0o700)
        self._write(state)
        return state

    def scratch(self, job: str) -> Path:
        """The job's folder for its upload; it goes when the work ends."""
        return self._root / job / SCRATCH

    def start(self, job: str, work: Work) -> None:
        """Run a job in the background when there is room for it."""
        self._change(job)
        task = asyncio.create_task(self._run(job, work))
        self._tasks[job] = task
        task.add_done_callback(lambda _: self._tasks.pop(job, None))

    def get(self, job: str, owner: str) -> JobState:
        """Return a job of an owner.

        Raises:
          NotServed: there is none, it expired, or it is another token's.
        """
        state = self._read(job) if JOB_ID.fullmatch(job) else None
        if state is None or state.owner != _digest(owner) or state.expires_at < time.time():
            raise NotServed("there is no such job of this token; it may have expired")
        if state.status not in ENDED and time.time() - state.beat_at > DEAD_AFTER_S:
            words = "the replica that had this job ended; send the request again"
            return state.model_copy(update={"status": "failed", "error": words})
        return state

    def result(self, job: str, owner: str) -> tuple[Path, JobState]:
        """Return the file with a job's result.

        Raises:
          NotServed: see `get`.
          NotReady: the job has not ended, or failed.
        """
        state = self.get(job, owner)
        if state.status == "failed":
            raise NotReady(f"the job failed: {state.error}")
        if state.status != "done":
            raise NotReady(f"the job is {state.status}; ask again later, or listen to its events")
        return self._root / job / RESULT, state

    async def delete(self, job: str, owner: str) -> None:
        """Remove a job and its result; a running one is stopped first, by the replica that runs it."""
        state = self.get(job, owner)
        (self._root / state.id / DELETED).touch()  # nobody finds it from now on
        if (task := self._tasks.get(state.id)) is not None:
            task.cancel()
            await until_done(task)
        if task is not None or state.status in ENDED:
            await self.discard(state.id)

    async def discard(self, job: str) -> None:
        """Remove the folder of a job that does not run."""
        await DISK.run(remove, self._root / job)

    async def events(self, job: str, owner: str) -> AsyncIterator[bytes]:
        """Yield server-sent events until the job ends."""
        last, said_at = "", time.monotonic()
        while True:
            try:
                state = await DISK.run(self.get, job, owner)
            except NotServed:
                return
            words = json.dumps(state.public())
            if words != last:
                last, said_at = words, time.monotonic()
                yield f"event: {'end' if state.status in ENDED else 'progress'}\ndata: {words}\n\n".encode()
            elif time.monotonic() - said_at > KEEP_ALIVE_S:
                said_at = time.monotonic()
                yield b": still there\n\n"
            if state.status in ENDED:
                return
            await asyncio.sleep(POLL_S)

    def sweep(self) -> None:
        """Remove what expired, and what nobody can find any more because its state is gone or damaged."""
        for name in self._names():
            state = self._read(name)
            if name in self._tasks:
                continue
            if state is None:
                remove_unless_new(self._root / name)
            elif state.expires_at < time.time():
                remove(self._root / name)

    async def close(self) -> None:
        """Stop this replica's jobs."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: str, work: Work) -> None:
        try:
            async with self.beating(job):
                async with self._running:
                    if self._read(job) is None:  # deleted while its upload came
                        return
                    self._change(job, status="running")
                    answer = await work(self.scratch(job), self._progress_of(job))
                await DISK.run((self._root / job / RESULT).write_bytes, answer.body)
            self._change(
                job, status="done", progress=1.0, media_type=answer.media_type, filename=answer.filename,
                headers=answer.headers,
            )  # fmt: skip
        except asyncio.CancelledError:
            self._change(job, status="failed", error="the service stopped this job; send the request again")
            raise
        except MedflError as error:
            self._change(job, status="failed", error=str(error))
        except Exception as error:  # noqa: BLE001 - whatever happened, the job has ended and its owner is told
            self._change(job, status="failed", error=f"the service failed on this job ({type(error).__name__})")
        finally:
            is_deleted = self._read(job) is None
            await DISK.run(remove, self._root / job if is_deleted else self.scratch(job))

    def _progress_of(self, job: str) -> Callable[[float], None]:
        said = [0.0]

        def progress(fraction: float) -> None:
            now = time.monotonic()
            if now - said[0] >= POLL_S:
                said[0] = now
                self._change(job, progress=min(max(fraction, 0.0), 1.0))

        return progress

    @asynccontextmanager
    async def beating(self, job: str) -> AsyncIterator[None]:
        """Keep a job alive while its upload arrives or its work is done."""
        beat = asyncio.create_task(self._beat(job))
        try:
            yield
        finally:
            beat.cancel()

    async def _beat(self, job: str) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._change(job)
            if self._read(job) is None and (task := self._tasks.get(job)) is not None:
                task.cancel()  # another replica was told to delete it

    def _change(self, job: str, **fields: Any) -> None:
        """Write a job's new state; nothing where its owner has deleted it."""
        state = self._read(job)
        if state is not None and state.status not in ENDED:
            with contextlib.suppress(FileNotFoundError):
                now = time.time()
                times = {"beat_at": now, "expires_at": now + self._limits.keep_s}
                self._write(state.model_copy(update=times | fields))

    def _write(self, state: JobState) -> None:
        path = self._root / state.id / STATE
        temporary = path.with_suffix(".new")
        temporary.write_text(state.model_dump_json(), encoding="utf-8")
        temporary.replace(path)

    def _read(self, job: str) -> JobState | None:
        try:
            if (self._root / job / DELETED).exists():
                return None
            return JobState.model_validate_json((self._root / job / STATE).read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            return None

    def _states(self) -> list[JobState]:
        return [state for name in self._names() if (state := self._read(name)) is not None]

    def _names(self) -> list[str]:
        return [folder.name for folder in self._root.iterdir() if JOB_ID.fullmatch(folder.name)]


def _digest(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()
