"""The book of jobs: heartbeats, expiry, and what goes when a job goes."""

from __future__ import annotations

import asyncio
import time

from serve import jobs
from serve.jobs import Answer, JobBook, JobLimits

ANSWER = Answer(b"mask", "application/octet-stream", "mask", {})


async def ended(book, job):
    while (state := book.get(job, "me")).status not in jobs.ENDED:
        await asyncio.sleep(0.01)
    return state


async def answers(folder, progress):
    return ANSWER


def test_a_job_whose_upload_takes_long_lives_and_gives_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "DEAD_AFTER_S", 0.2)
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.02)
    book = JobBook(tmp_path)

    async def work():
        job = book.open("me").id
        async with book.beating(job):  # as the route does while the upload arrives
            await asyncio.sleep(0.5)
            assert book.get(job, "me").status == "waiting"
        book.start(job, answers)
        return await ended(book, job)

    assert asyncio.run(work()).status == "done"


def test_a_late_heartbeat_does_not_undo_a_job(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "DEAD_AFTER_S", 0.05)
    book = JobBook(tmp_path)

    async def work():
        job = book.open("me").id
        await asyncio.sleep(0.2)  # whatever held this replica up
        assert book.get(job, "me").status == "failed"
        book.start(job, answers)
        return await ended(book, job)

    assert asyncio.run(work()).status == "done"


def test_a_job_is_kept_from_its_end_on(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.02)
    book, other = (JobBook(tmp_path, JobLimits(keep_s=0.4)) for _ in range(2))

    async def slow(folder, progress):
        await asyncio.sleep(0.8)
        return ANSWER

    async def work():
        job = book.open("me").id
        book.start(job, slow)
        await asyncio.sleep(0.7)
        other.sweep()  # another replica's
        state = await ended(book, job)
        assert state.expires_at - time.time() > 0.2
        return state

    assert asyncio.run(work()).status == "done"
