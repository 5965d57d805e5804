"""Back-pressure on Ray's own queues, without a cluster; tests/serve/test_on_ray.py measures it on one."""

import asyncio
import pickle

from ray.serve._private.http_util import ASGIReceiveProxy, MessageQueue
from starlette.middleware import Middleware

from serve import flow_control
from serve.flow_control import HeldBackProxy, hold_back, innermost, middlewares, waiting_bytes
from serve.limits import limited
from serve.settings import Limits

PART = {"type": "http.request", "body": b"x" * 1000, "more_body": True}


class Proxy:
    """Serve's proxy as far as bodies go: whatever comes is put into a queue."""

    def __init__(self):
        self.asgi_receive_queues = {"one": MessageQueue()}

    async def __call__(self, scope, receive, send):
        while True:
            await self.asgi_receive_queues["one"](await receive())


class RequestIds:
    """Serve's own middleware stands between."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        await self._app(scope, receive, send)


async def endless():
    await asyncio.sleep(0)
    return PART


def test_the_proxy_stops_reading_while_much_is_waiting_and_goes_on_when_it_is_fetched(monkeypatch):
    monkeypatch.setattr(flow_control, "MAX_WAITING_BYTES", 10_000)

    async def work():
        proxy = Proxy()
        running = asyncio.create_task(HeldBackProxy(RequestIds(proxy))({}, endless, None))
        await asyncio.sleep(0.1)
        assert waiting_bytes(proxy) == 11_000  # the part that went over the limit is the last
        fetched = proxy.asgi_receive_queues["one"].get_messages_nowait()
        assert len(fetched) == 11
        await asyncio.sleep(0.1)
        assert waiting_bytes(proxy) == 11_000
        running.cancel()

    asyncio.run(work())


def test_a_client_who_is_held_back_is_not_taken_for_one_who_stopped(monkeypatch):
    monkeypatch.setattr(flow_control, "MAX_WAITING_BYTES", 100)
    monkeypatch.setattr(flow_control, "SAY_HELD_BACK_S", 0.05)
    last = {"type": "http.request", "body": b"y", "more_body": False}
    gone = {"type": "http.disconnect"}

    async def work():
        proxy, told, sent = Proxy(), [], [last, gone]

        async def send_next():
            return sent.pop(0)

        async def application(scope, receive, send):
            guarded = limited(receive, Limits(stall_timeout_s=0.5))
            while not told or told[-1] != gone:
                told.append(await guarded())

        application.asgi_receive_queues = proxy.asgi_receive_queues
        await proxy.asgi_receive_queues["one"](PART)
        running = asyncio.create_task(HeldBackProxy(application)({"type": "http"}, send_next, None))
        await asyncio.sleep(1.0)
        assert len(told) > 3
        assert not any(part["body"] for part in told)
        proxy.asgi_receive_queues["one"].get_messages_nowait()
        await asyncio.wait_for(running, 5)
        return told

    told = asyncio.run(work())
    assert [part for part in told if part.get("body") != b""] == [last, gone]
    assert told[-2:] == [last, gone]  # nothing is said of being held back once the body is complete


def test_the_ingress_stops_fetching_while_enough_is_waiting(monkeypatch):
    monkeypatch.setattr(flow_control, "MAX_WAITING_PARTS", 8)
    fetches = []

    async def fetch(metadata):
        fetches.append(metadata)
        await asyncio.sleep(0)
        return pickle.dumps([PART] * 4)

    async def work():
        receive = ASGIReceiveProxy({"type": "http"}, "metadata", fetch)
        hold_back(receive)
        running = asyncio.create_task(receive.fetch_until_disconnect())
        await asyncio.sleep(0.1)
        assert receive.queue.qsize() == 12
        for _ in range(12):
            assert await receive() == PART
        await asyncio.sleep(0.1)
        assert receive.queue.qsize() == 12
        assert fetches == ["metadata"] * 6
        running.cancel()

    asyncio.run(work())


def test_serve_is_given_middleware_that_finds_its_proxy():
    (middleware,) = middlewares()
    assert isinstance(middleware, Middleware)
    proxy = Proxy()
    assert innermost(RequestIds(RequestIds(proxy))) is proxy
