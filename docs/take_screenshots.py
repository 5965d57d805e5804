"""Take the pictures of docs/howto/monitoring.md from a real run: python docs/take_screenshots.py

Needs Debian's packages chromium and prometheus. Everything listens on loopback and ends with the script. Ray's
dashboard takes its token from the cookie that its own sign-in sets.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
IMAGES = ROOT / "docs" / "images"
COOKIE = "ray-authentication-token"
RUN = ROOT / "configs" / "demo.yaml"
ROUNDS_AFTER = 9
"""Published rounds after which the pictures are taken; the run goes on meanwhile."""
SETTLE_S, REDRAW_S = 20, 2
QUERIES = (
    "max by (hospital) (ray_medfl_dice)",
    "max by (hospital, unit, delta, adjacency) (ray_medfl_epsilon_spent)",
)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the end of the block."""
    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(timeout=30)


def prometheus_config(folder: Path) -> Path:
    """Write our own configuration with the nodes of this cluster."""
    import ray
    import yaml

    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    pages = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    (folder / "found.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": pages}]))
    config["scrape_configs"][0]["file_sd_configs"][0]["files"] = [str(folder / "found.json")]
    config["rule_files"] = [str(ROOT / "deploy" / "prometheus" / "rules.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    return folder / "prometheus.yml"


async def photograph(log: Path, pages: list[tuple[str, Path, int]], token: str) -> None:
    """Let the browser show each page in a window of the given width, and as high as the page, and write it."""
    import aiohttp

    while not (found := re.search(r"ws://(127\.0\.0\.1:\d+)/", log.read_text())):
        await asyncio.sleep(0.2)
    async with aiohttp.ClientSession() as session:
        for url, file, width in pages:
            async with session.put(f"http://{found[1]}/json/new?about:blank") as answer:
                target = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(target, max_msg_size=2**26) as browser:

                async def call(method: str, browser: Any = browser, **parameters: Any) -> Any:
                    await browser.send_json({"id": 1, "method": method, "params": parameters})
                    while (said := await browser.receive_json()).get("id") != 1:
                        pass
                    return said["result"]

                window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
                await call("Emulation.setDeviceMetricsOverride", **window)
                origin = "{0.scheme}://{0.netloc}".format(urllib.parse.urlsplit(url))
                await call("Network.setCookie", url=origin, name=COOKIE, value=token, httpOnly=True)
                await call("Page.navigate", url=url)
                await asyncio.sleep(SETTLE_S)
                found_height = await call("Runtime.evaluate", expression="document.documentElement.scrollHeight")
                window["height"] = found_height["result"]["value"]
                await call("Emulation.setDeviceMetricsOverride", **window)
                await asyncio.sleep(REDRAW_S)
                picture = await call("Page.captureScreenshot", format="png")
                file.write_bytes(base64.b64decode(picture["data"]))


def main() -> None:
    """Run a federation with dashboard and Prometheus, and photograph both while it trains."""
    os.environ["RAY_metrics_report_interval_ms"] = "2000"  # noqa: SIM112 - Ray's spelling
    # On a busy machine the dashboard takes its time.
    os.environ.update(RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT="120", RAY_DASHBOARD_STARTUP_TIMEOUT_S="180")
    import yaml

    from actors.cluster import connect, disconnect
    from actors.train import _follow
    from medfl_ray.config.files import parse_run_config
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.store.run.folder import RunFolder

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output = {"report": False, "export": False, "directory": str(place), "state_directory": str(place / "state")}
        raw = yaml.safe_load(RUN.read_text())
        run = parse_run_config({**raw, "federation": {**raw["federation"], "baselines": []}, "output": output})
        policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
        cluster = connect(num_cpus=2, dashboard=True)
        stack.callback(disconnect)
        stop, enough = threading.Event(), threading.Event()

        def emit(event: Any) -> None:
            if event.type == "round" and event.result.round >= ROUNDS_AFTER:
                enough.set()

        training = threading.Thread(target=_follow, args=(run, policies, folder.path, emit, stop))
        training.start()
        stack.callback(lambda: (stop.set(), training.join()))
        port = free_port()
        server = ["prometheus", f"--config.file={prometheus_config(place)}", f"--storage.tsdb.path={place / 'data'}"]
        stack.enter_context(process([*server, f"--web.listen-address=127.0.0.1:{port}"], place / "prometheus.log"))
        started = time.monotonic()
        enough.wait()
        options = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-proxy-server"
        options += " --hide-scrollbars"
        browser = ["chromium", *options.split(), "--remote-debugging-port=0", f"--user-data-dir={place / 'browser'}"]
        stack.enter_context(process(browser, place / "browser.log"))
        graphs = {f"g{number}.expr": query for number, query in enumerate(QUERIES)}
        shown = f"{math.ceil((time.monotonic() - started) / 60) + 1}m"
        graphs |= {
            f"g{number}.{key}": value for number in (0, 1) for key, value in (("tab", "0"), ("range_input", shown))
        }
        pages = [
            (f"http://{cluster.dashboard_url}/#/actors", IMAGES / "ray-actors.png", 1600),
            (f"http://127.0.0.1:{port}/graph?{urllib.parse.urlencode(graphs)}", IMAGES / "metrics.png", 1400),
        ]
        asyncio.run(photograph(place / "browser.log", pages, os.environ["RAY_AUTH_TOKEN"]))


if __name__ == "__main__":
    main()
