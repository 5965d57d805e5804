"""Uploads are parsed in a process of their own, whose memory and time the kernel bounds.

A helper imports the readers once and waits at a socket in a private folder; each upload gets a fork of it. Decoders
are written in C and fed by strangers: one that crashes, swallows memory or never ends takes its fork with it and
nothing else. The helper ends when its parent does, because its standard input is a pipe from it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medfl_ray import errors
from medfl_ray.data.upload_limits import UploadLimits
from medfl_ray.data.uploads import Upload, read_upload
from medfl_ray.data.volume import Volume
from medfl_ray.errors import DataError, MedflError, UnreadableFile

VOXELS = "volume.npy"
START_SECONDS = 60.0
MOST_AT_ONCE = 4
NICE_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class UploadReader:
    """Reads uploads in forks of a helper process; thread-safe, and started at its first use or by `start`."""

    def __init__(self, limits: UploadLimits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._helper: subprocess.Popen[bytes] | None = None
        self._folder = ""

    def start(self) -> None:
        """Start the helper, which takes a second or two for its imports; does nothing if it runs."""
        with self._lock:
            if self._helper is not None and self._helper.poll() is None:
                return
            self._remove_folder()
            self._folder = tempfile.mkdtemp(prefix="medfl-reader-")
            self._helper = subprocess.Popen(
                [sys.executable, "-m", "medfl_ray.data.upload_process", self._folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **NICE_ENVIRONMENT},
            )  # fmt: skip
            assert self._helper.stdout is not None
            ready, _, _ = select.select([self._helper.stdout], [], [], START_SECONDS)
            if not ready or self._helper.stdout.readline() != b"ready\n":
                self._helper.kill()
                raise UnreadableFile("the process that reads uploads did not start; look at the server's log")

    def close(self) -> None:
        """End the helper and remove its folder."""
        with self._lock:
            if self._helper is not None:
                for pipe in (self._helper.stdin, self._helper.stdout):
                    if pipe is not None:
                        pipe.close()
                try:
                    self._helper.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    self._helper.kill()
                    self._helper.wait()
                self._helper = None
            self._remove_folder()

    def read(self, path: Path, workspace: Path, series: Sequence[str] = ()) -> Upload:
        """Read an upload in a fork; voxels come back through a file in `workspace`.

        Raises:
          DataError: what `read_upload` raises, or the fork used up its memory or time, or crashed.
        """
        self.start()
        request = {
            "path": str(path), "workspace": str(workspace), "series": list(series),
            "limits": self.limits.model_dump(),
        }  # fmt: skip
        with self._places:
            answer = self._ask(json.dumps(request).encode() + b"\n")
        if not answer:
            raise UnreadableFile(
                "reading the upload was ended, because it took more time or memory than its size allows; the file is "
                "damaged, or decodes to far more than it should"
            )
        return _upload_of(json.loads(answer), workspace)

    def _ask(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(f"{self._folder}/socket")
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            # A fork that is killed closes the connection; there is no other way to wait for ever.
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65_536):
                    parts.append(part)
        return b"".join(parts)

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""


def _upload_of(answer: dict[str, Any], workspace: Path) -> Upload:
    if "error" in answer:
        kind = getattr(errors, answer["error"], DataError)
        raise (kind if issubclass(kind, MedflError) else DataError)(answer["message"])
    array = np.load(workspace / VOXELS, mmap_mode="c", allow_pickle=False)
    volume = Volume(array, np.array(answer["affine"], dtype=np.float64), tuple(answer["notes"]))
    return Upload(volume, answer["kind"], tuple(Path(file) for file in answer["files"]))


def _serve(folder: str) -> None:
    """Accept requests until standard input ends, which it does with the parent."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(128)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer_and_exit(connection)
            connection.close()


def _answer_and_exit(connection: socket.socket) -> None:
    """Read one upload under the kernel's limits; runs in a fork, which never returns."""
    code = 1
    try:
        with connection.makefile("rb") as stream:
            request = json.loads(stream.readline())
        connection.sendall(json.dumps(_answer(request)).encode())
        connection.close()
        code = 0
    finally:
        os._exit(code)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    limits = UploadLimits.model_validate(request["limits"])
    workspace, path = Path(request["workspace"]), Path(request["path"])
    size = path.stat().st_size if path.is_file() else 0
    before = _address_space()

    def bound(num_bytes: int) -> None:
        """Allow what a header asks for, at the slowest speed that is tolerated."""
        memory = before + limits.memory_bytes + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))
        seconds = limits.seconds + (size + num_bytes) / limits.bytes_per_second
        signal.alarm(max(1, math.ceil(seconds)))

    bound(0)
    try:
        upload = read_upload(path, limits, workspace, request["series"], bound)
        np.save(workspace / VOXELS, upload.volume.array, allow_pickle=False)
    except MedflError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {"error": "UnreadableFile", "message": "the upload asks for more memory than it may have"}
    return {
        "kind": upload.kind, "affine": upload.volume.affine.tolist(), "notes": list(upload.volume.notes),
        "files": [str(file) for file in upload.files],
    }  # fmt: skip


def _address_space() -> int:
    """Bytes of address space that this process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def _import_readers() -> None:
    """Import what reading needs, so that a fork does not."""
    import highdicom  # noqa: F401
    import libjpeg  # noqa: F401
    import nibabel  # noqa: F401
    import nrrd  # noqa: F401
    import openjpeg  # noqa: F401
    import pydicom.pixels  # noqa: F401
    import rle  # noqa: F401


if __name__ == "__main__":
    _import_readers()
    _serve(sys.argv[1])
