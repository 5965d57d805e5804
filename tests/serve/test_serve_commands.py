"""Ray Serve's own commands on the application: built, run until Ctrl-C, and deployed on a cluster behind a token."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from ray_head import ray_head, without_ray
from tiny_models import json_request, write_model

from actors.cluster import secure_environment
from serve.auth import add_token

ROOT = Path(__file__).parents[2]
SERVE = (sys.executable, "-m", "ray.serve.scripts")
START_S = 240
OF_THE_APPLICATION = ("MEDFL_MODELS", "MEDFL_SERVE_TOKENS", "MEDFL_STATE_DIR")
pytestmark = [pytest.mark.ci, pytest.mark.timeout(900)]


@pytest.fixture
def environment(tmp_path):
    """What an operator sets: a folder of models, a file of tokens, and Ray's token."""
    secure_environment()
    write_model(tmp_path / "models" / "tiny" / "1", mark=2)
    set_by_tests = ("RAY_ADDRESS", "MEDFL_REGISTRY", "MEDFL_SERVE_MODEL")
    kept = {name: value for name, value in os.environ.items() if name not in set_by_tests}
    return {
        **kept, "MEDFL_MODELS": str(tmp_path / "models"), "MEDFL_SERVE_TOKENS": str(tmp_path / "tokens.json"),
        "MEDFL_STATE_DIR": str(tmp_path / "state"),
    }  # fmt: skip


def build(environment, into):
    """Let `serve build` write a configuration; put it on a free port of this machine alone."""
    command = [*SERVE, "build", "serve.app:app", "-o", str(into)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=START_S, capture_output=True)
    config = yaml.safe_load(into.read_text(encoding="utf-8"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        config["http_options"] |= {"host": "127.0.0.1", "port": free.getsockname()[1]}
    into.write_text(yaml.safe_dump(config), encoding="utf-8")
    return config


def wait_until_ready(url, process=None):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with contextlib.suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(f"{url}/v2/health/ready", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"not ready; exit code {process and process.poll()}")


def test_what_serve_build_writes_serve_run_serves_until_ctrl_c(environment, tmp_path):
    config = build(environment, tmp_path / "built.yaml")
    assert [app["import_path"] for app in config["applications"]] == ["serve.app:app"]
    assert {d["name"] for d in config["applications"][0]["deployments"]} == {"models", "ingress"}
    token = add_token(tmp_path / "tokens.json", "test")
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    command = [*SERVE, "run", "--address", "local", str(tmp_path / "built.yaml")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(url, process)
        ask = {"json": json_request(), "timeout": 60, "trust_env": False}
        assert httpx.post(f"{url}/v2/models/tiny/infer", **ask).status_code == 401
        answer = httpx.post(f"{url}/v2/models/tiny/infer", headers={"Authorization": f"Bearer {token}"}, **ask)
        assert answer.json()["outputs"][1]["data"] == [2] * 64
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            pytest.fail(f"serve run went on after Ctrl-C: {(tmp_path / 'log').read_text(errors='replace')[-3000:]}")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/v2/health/live", timeout=5, trust_env=False)
    finally:
        process.kill()
        process.wait()


def test_serve_deploy_takes_the_application_to_a_running_cluster(environment, tmp_path):
    config = build(environment, tmp_path / "built.yaml")
    config["applications"][0]["runtime_env"] = {"env_vars": {name: environment[name] for name in OF_THE_APPLICATION}}
    (tmp_path / "built.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    token = add_token(tmp_path / "tokens.json", "test")
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    (tmp_path / "home").mkdir()
    with ray_head(tmp_path / "home") as head:

        def typed(*words, **own):
            command = [*SERVE, words[0], "--address", head.dashboard, *words[1:]]
            return subprocess.run(
                command, cwd=tmp_path, env=without_ray(RAY_AUTH_MODE="token", **own), capture_output=True, text=True,
                timeout=START_S, check=False,
            )  # fmt: skip

        assert typed("deploy", "built.yaml", RAY_AUTH_TOKEN="0" * 64).returncode != 0
        deployed = typed("deploy", "built.yaml", RAY_AUTH_TOKEN=head.token)
        assert deployed.returncode == 0, deployed.stderr[-2000:]
        wait_until_ready(url)
        ask = {"json": json_request(), "timeout": 60, "trust_env": False}
        answer = httpx.post(f"{url}/v2/models/tiny/infer", headers={"Authorization": f"Bearer {token}"}, **ask)
        assert answer.json()["outputs"][1]["data"] == [2] * 64
        status = yaml.safe_load(typed("status", RAY_AUTH_TOKEN=head.token).stdout)
        assert [application["status"] for application in status["applications"].values()] == ["RUNNING"]
