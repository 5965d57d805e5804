"""What keeps a model replica's process small: it never holds pandas, and its allocator gives memory back.

Serve imports pandas, and with it pyarrow, wherever it is installed, for an encoder of data frames that no replica
needs: 65 MiB in every process. Ray 2.55.1, which is pinned, runs the function that WORKER_PROCESS_SETUP_HOOK_ENV_VAR
names before it imports Serve; only for whole jobs is there a public way to name one, and a job has other processes.
"""

from __future__ import annotations

import sys

HOOK = "serve.replicas.lean_worker.without_pandas"
# Two arenas instead of eight per core, and large arrays returned as soon as they are freed (glibc only).
ALLOCATOR = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def environment() -> dict[str, str]:
    """Return the environment of a replica's process, in place before it starts."""
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    return {**ALLOCATOR, WORKER_PROCESS_SETUP_HOOK_ENV_VAR: HOOK}


def without_pandas() -> None:
    """Make pandas look absent: Serve, MONAI and the others that can use it then go on without it."""
    if "pandas" not in sys.modules:
        sys.modules["pandas"] = None  # type: ignore[assignment]
