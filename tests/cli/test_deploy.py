"""medfl-ray deploy as a user runs it: a process that prints, answers, and ends with Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tiny_models import json_request, write_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ci


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(tmp_path, port):
    environment = {**os.environ, "MEDFL_STATE_DIR": str(tmp_path / "state"), "PYTHONUNBUFFERED": "1"}
    for name in ("RAY_ADDRESS", "MEDFL_SERVE_TOKENS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "medfl_ray.cli.main", "deploy", str(tmp_path / "model"), "--port", str(port)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def test_a_package_is_served_until_ctrl_c_and_its_token_is_shown_once(tmp_path, port):
    write_model(tmp_path / "model", mark=2)
    process = start(tmp_path, port)
    try:
        shown = read_until(process, "Ctrl-C")
        (secret,) = re.findall(r"^token +(\S{43})$", shown, re.MULTILINE)
        assert f"http://127.0.0.1:{port}/v2/models/tiny/segment" in shown
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v2/models/tiny/infer", json=json_request(), timeout=30, trust_env=False,
            headers={"Authorization": f"Bearer {secret}"},
        )  # fmt: skip
        assert answer.json()["outputs"][1]["data"] == [2] * 64
        assert secret not in "".join(path.read_text() for path in (tmp_path / "state").rglob("*.json"))
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 0, rest
        assert secret not in rest
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_named_at_once(tmp_path):
    write_model(tmp_path / "model", mark=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tmp_path, taken.getsockname()[1])
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "choose another with --port" in output
