"""The whole command on Ray, as a process of its own: it stops on Ctrl-C, resumes, and leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from small_runs import small_run

from medfl_ray.config.files import dump_yaml

pytestmark = [pytest.mark.ci, pytest.mark.timeout(600)]


def command(arguments, mark):
    environment = {**os.environ, "MEDFL_TEST_MARK": mark}
    environment.pop("RAY_AUTH_TOKEN", None)
    return subprocess.Popen(
        [sys.executable, "-m", "medfl_ray.cli.main", "run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_running(mark):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MEDFL_TEST_MARK={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue  # the process has ended, or is not ours
    return found


def nothing_left(mark, within_s=30):
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if not left_running(mark):
            return True
        time.sleep(0.5)
    return False


def write_config(tmp_path, with_report=True, **federation):
    output = {"directory": tmp_path, "report": with_report, "export": with_report}
    run = small_run(federation={"pool": "ray", "local_steps": 4, **federation}, output=output)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(run))
    return path


def final_weights(folder):
    last = (folder / "receipts.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["weights_after"]


def process_called(name, mark, within_s=60):
    """Return the id of one of the run's processes, by Ray's title of it."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                title = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if name in title and f"MEDFL_TEST_MARK={mark}".encode() in (process / "environ").read_bytes():
                    return int(process.name)
            except OSError:
                continue  # the process has ended, or is not ours
        time.sleep(0.2)
    raise AssertionError(f"no process called {name}")


def test_a_killed_coordinator_is_started_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path):
    mark = uuid.uuid4().hex
    config = write_config(tmp_path, with_report=False, rounds=6)
    running = command([str(config)], mark)
    seen = []
    for line in iter(running.stdout.readline, ""):
        seen.append(line)
        if line.startswith(("round 2/", "round 4/")):
            os.kill(process_called("ray::Coordinator", mark), signal.SIGKILL)
    assert running.wait(timeout=60) == 0, running.stderr.read()
    assert sum("it is started again" in line for line in seen) == 2
    assert nothing_left(mark), left_running(mark)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    receipts = [json.loads(line) for line in (folder / "receipts.jsonl").read_text().splitlines()]
    assert [receipt["round"] for receipt in receipts if receipt["published"]] == list(range(1, 7))

    whole = command([str(config), "--pool", "local"], mark)
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    (other,) = (path for path in tmp_path.iterdir() if path.is_dir() and path != folder)
    assert final_weights(other) == final_weights(folder)


def test_where_rays_own_processes_end_the_run_says_so_and_is_resumed(tmp_path):
    mark = uuid.uuid4().hex
    running = command([str(write_config(tmp_path, with_report=False, rounds=40))], mark)
    for line in iter(running.stdout.readline, ""):
        if line.startswith("round 2/"):
            os.kill(process_called("raylet/raylet", mark), signal.SIGKILL)
    assert running.wait(timeout=120) == 1
    errors = [line for line in running.stderr.read().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Ray's own processes may have ended" in errors[0]
    assert nothing_left(mark), left_running(mark)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    resumed = command(["--resume", str(folder)], mark)
    _, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    published = [json.loads(line)["round"] for line in (folder / "receipts.jsonl").read_text().splitlines()]
    assert sorted(set(published)) == list(range(1, 41))


def test_a_run_on_ray_stops_on_interrupt_resumes_to_the_same_weights_and_leaves_no_process(tmp_path):
    mark = uuid.uuid4().hex
    config = write_config(tmp_path, rounds=12)
    stopped = command([str(config)], mark)
    lines = iter(stopped.stdout.readline, "")
    assert any(line.startswith("round 2/") for line in lines)
    stopped.send_signal(signal.SIGINT)
    output, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, errors
    assert "--resume" in output
    assert "Traceback" not in errors
    assert nothing_left(mark), left_running(mark)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not (folder / "report.html").exists()

    resumed = command(["--resume", str(folder)], mark)
    output, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    for name in ("report.html", "model.onnx", "model.safetensors", "ledger.json", "receipts.jsonl"):
        assert (folder / name).is_file(), name
    rounds = [json.loads(line)["round"] for line in (folder / "receipts.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, 13))
    assert nothing_left(mark), left_running(mark)

    whole = command([str(config), "--pool", "local"], mark)
    _, errors = whole.communicate(timeout=240)
    assert whole.returncode == 0, errors
    (other,) = (path for path in tmp_path.iterdir() if path.is_dir() and path != folder)
    assert final_weights(other) == final_weights(folder)
