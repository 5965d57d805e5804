"""Memory that one patient has freed does not stay with the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOLES = """
import sys
from pathlib import Path
from medfl_ray.training.gradients.malloc_trim import release_freed_memory
page = 4096
blocks = [bytearray(64 * 1024) for _ in range(3000)]
kept = blocks[::100]
del blocks
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page
before = resident()
release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory where only Linux shows it")
@pytest.mark.parametrize(("environment", "released"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "1000000000"}, False)])
def test_freed_blocks_go_back_unless_they_are_kept_on_purpose(environment: dict[str, str], released: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) > 100e6) == released
