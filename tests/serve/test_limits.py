"""Rates, sizes and pauses, on a clock of our own."""

import asyncio
import time

import pytest

from serve.limits import RateLimit, check_declared_size, limited
from serve.refusals import Refusal, TooLarge, TooMany, TooSlow
from serve.settings import Limits


def test_a_caller_may_send_a_burst_and_then_as_many_as_come_back_with_time():
    now = [0.0]
    rate = RateLimit(per_minute=60, burst=3, clock=lambda: now[0])
    for _ in range(3):
        rate.admit("a")
    with pytest.raises(TooMany) as refusal:
        rate.admit("a")
    assert refusal.value.retry_after_s == pytest.approx(1.0)
    rate.admit("b")  # another caller has a bucket of its own
    now[0] = 1.0
    rate.admit("a")
    with pytest.raises(TooMany):
        rate.admit("a")
    now[0] = 1000.0
    for _ in range(3):
        rate.admit("a")
    with pytest.raises(TooMany):
        rate.admit("a")


def test_a_declared_size_is_checked_before_anything_is_read():
    limits = Limits(max_upload_bytes=100)
    check_declared_size(None, limits)
    check_declared_size("100", limits)
    with pytest.raises(TooLarge):
        check_declared_size("101", limits)
    for text in ("-1", "1e3", "", "٣", "9" * 30):
        with pytest.raises(Refusal):
            check_declared_size(text, limits)


def parts(*messages):
    waiting = list(messages)

    async def receive():
        message = waiting.pop(0)
        if isinstance(message, float):
            await asyncio.sleep(message)
            return await receive()
        return message

    return receive


def body(size, more=True):
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


async def drain(receive):
    total = 0
    while True:
        message = await receive()
        total += len(message.get("body", b""))
        if not message.get("more_body"):
            return total


def test_a_body_is_measured_while_it_arrives():
    limits = Limits(max_upload_bytes=100)
    assert asyncio.run(drain(limited(parts(body(60), body(40, more=False)), limits))) == 100
    with pytest.raises(TooLarge):
        asyncio.run(drain(limited(parts(body(60), body(41)), limits)))


def test_a_body_that_stops_or_takes_too_long_is_refused():
    with pytest.raises(TooSlow):
        asyncio.run(drain(limited(parts(body(1), 5.0, body(1)), Limits(stall_timeout_s=0.05))))
    slow = [part for _ in range(100) for part in (body(1), 0.02)]
    started = time.monotonic()
    with pytest.raises(TooSlow):
        asyncio.run(drain(limited(parts(*slow), Limits(upload_timeout_s=0.1))))
    assert time.monotonic() - started < 1


def test_once_refused_stays_refused_and_once_complete_nothing_is_timed():
    async def refused_twice():
        receive = limited(parts(body(200), body(0, more=False)), Limits(max_upload_bytes=100))
        for _ in range(2):
            with pytest.raises(TooLarge):
                await receive()

    async def waits_for_the_end():
        receive = limited(parts(body(1, more=False), 0.2, {"type": "http.disconnect"}), Limits(stall_timeout_s=0.05))
        await receive()
        return await receive()

    asyncio.run(refused_twice())
    assert asyncio.run(waits_for_the_end()) == {"type": "http.disconnect"}
