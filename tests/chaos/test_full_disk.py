"""A run on a disk that fills up for real: one clear sentence, and a resume that ends as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small_run

from medfl_ray.config.files import dump_yaml

pytestmark = [pytest.mark.ci, pytest.mark.timeout(300)]


def can_mount():
    probe = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


SCRIPT = """
set -u
mount -t tmpfs -o size=400k tmpfs "$1"
cp "$2" "$1/config.yaml"
cd "$1"
"$3" -m medfl_ray.cli.main run config.yaml --pool local; echo "first $?"
mount -o remount,size=40m "$1"
"$3" -m medfl_ray.cli.main run --resume runs/*; echo "second $?"
cat runs/*/receipts.jsonl | tail -n 1
"""


@pytest.mark.skipif(not can_mount(), reason="the system does not let this user mount a small file system")
def test_a_small_file_system_that_fills_up(tmp_path):
    run = small_run(federation={"rounds": 8, "local_steps": 1}, output={"report": False, "export": False})
    (tmp_path / "disk").mkdir()
    (tmp_path / "config.yaml").write_text(dump_yaml(run))
    arguments = [str(tmp_path / "disk"), str(tmp_path / "config.yaml"), sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "first 1" in ended.stdout, ended.stdout + ended.stderr
    assert "No space left on device" in ended.stderr or "disk is full" in ended.stderr
    assert ended.stderr.count("error: ") == 1
    assert "Traceback" not in ended.stderr
    assert "second 0" in ended.stdout, ended.stdout + ended.stderr
    last = json.loads(ended.stdout.strip().splitlines()[-1])
    assert (last["round"], last["published"]) == (8, True)
