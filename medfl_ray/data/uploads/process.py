"""Uploads are parsed, and their DICOM results written, in a process whose memory and time the kernel bounds.

A helper imports the readers once and waits at a socket in a private folder; each upload gets a fork of it. Decoders
are written in C and fed by strangers: one that crashes, swallows memory or never ends takes its fork with it and
nothing else. The helper ends when its parent does, because its standard input is a pipe from it. A fork ends as soon
as whoever asked shuts the connection: the kernel sends it a signal, which no decoder holds up.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medfl_ray import errors
from medfl_ray.data.results.mask_files import MaskFormat, MaskOrigin, write_mask
from medfl_ray.data.uploads.limits import UploadLimits
from medfl_ray.data.uploads.read import Upload, read_upload
from medfl_ray.data.volume import Volume
from medfl_ray.errors import DataError, MedflError, UnreadableFile

VOXELS, MASK, RESULT = "volume.npy", "mask.npy", "result"
START_SECONDS = 60.0
SECONDS_PER_PLANE = 0.05  # and label, of a result
MASK_BYTES_PER_VOXEL = 8  # and label: stacked, packed, encoded
MAX_AT_ONCE = 4
MAX_PATH_CHARACTERS = 90
ADDRESS_SPACE = Path("/proc/self/statm")
NICE_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class UploadReader:
    """Reads uploads in forks of a helper process, which is started at its first use or by `start`."""

    def __init__(self, limits: UploadLimits) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._places = asyncio.Semaphore(MAX_AT_ONCE)
        self._helper: subprocess.Popen[bytes] | None = None
        self._folder = ""

    def start(self) -> None:
        """Start the helper, which takes a second or two for its imports; does nothing if it runs."""
        with self._lock:
            if self._runs():
                return
            self._remove_folder()
            self._folder = _private_folder()
            helper = subprocess.Popen(
                [sys.executable, "-m", "medfl_ray.data.uploads.process", self._folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **NICE_ENVIRONMENT},
            )  # fmt: skip
            assert helper.stdout is not None
            ready, _, _ = select.select([helper.stdout], [], [], START_SECONDS)
            if not ready or helper.stdout.readline() != b"ready\n":
                helper.kill()
                raise UnreadableFile("the process that reads uploads did not start; look at the server's log")
            self._helper = helper

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

    async def read(self, path: Path, workspace: Path, series: Sequence[str] = ()) -> Upload:
        """Read an upload in a fork; voxels come back through a file in `workspace`.

        Nothing writes into `workspace` after this has ended, cancelled or not. No thread waits meanwhile.

        Raises:
          DataError: what `read_upload` raises, or the fork used up its memory or time, or crashed.
        """
        request = {
            "path": str(path), "workspace": str(workspace), "series": list(series),
            "limits": self.limits.model_dump(),
        }  # fmt: skip
        answer = await self._answer(request)
        if answer is None:
            raise UnreadableFile(
                "reading the upload was ended, because it took more time or memory than its size allows; the file is "
                "damaged, or decodes to far more than it should"
            )
        return _upload_of(answer, workspace)

    async def write(
        self, upload: Upload, labels: Mapping[int, str], format: MaskFormat, origin: MaskOrigin, workspace: Path
    ) -> Path:
        """Write the mask that lies in `workspace` as MASK in a fork, and return the file.

        A DICOM object repeats the headers of its images, so that they are parsed again: by a fork, as before.

        Raises:
          DataError: what `write_mask` raises, or the fork used up its memory or time, or crashed.
        """
        request = {
            "files": [str(file) for file in upload.files], "kind": upload.kind, "workspace": str(workspace),
            "affine": upload.volume.affine.tolist(), "labels": list(labels.items()), "format": format,
            "origin": asdict(origin), "limits": self.limits.model_dump(),
        }  # fmt: skip
        answer = await self._answer(request)
        if answer is None:
            raise DataError(f"writing the {format} object took more time or memory than it may; ask for nifti")
        _raise_its_error(answer)
        return workspace / RESULT

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a fork answers; None where it was ended or crashed."""
        async with self._places:
            answer = await self._ask_twice(json.dumps(request).encode() + b"\n")
        return dict(json.loads(answer)) if answer else None

    async def _ask_twice(self, request: bytes) -> bytes:
        """Ask again where the helper itself ended; an upload ends its own fork alone."""
        try:
            return await self._ask(request)
        except OSError:
            return await self._ask(request)

    async def _ask(self, request: bytes) -> bytes:
        if not self._runs():
            await asyncio.to_thread(self.start)
        reader, writer = await asyncio.open_unix_connection(f"{self._folder}/socket")
        ending = asyncio.ensure_future(_answer_of(reader))
        try:
            writer.write(request)
            return await asyncio.shield(ending)
        except asyncio.CancelledError:
            await _end_fork(writer, ending)
            raise
        finally:
            writer.close()

    def _runs(self) -> bool:
        return self._helper is not None and self._helper.poll() is None

    def _remove_folder(self) -> None:
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = ""


async def _answer_of(reader: asyncio.StreamReader) -> bytes:
    """Return all that a fork says; one that is killed closes the connection, so that nothing waits for ever."""
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


async def _end_fork(writer: asyncio.StreamWriter, ending: asyncio.Future[bytes]) -> None:
    """Shut the connection, which ends the fork, and wait until it has ended, even if this is cancelled again."""
    with contextlib.suppress(OSError):
        writer.write_eof()
    while not ending.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([ending])


def _private_folder() -> str:
    """A folder whose socket's path is short enough for the system."""
    folder = tempfile.mkdtemp(prefix="medfl-reader-")
    if len(folder) <= MAX_PATH_CHARACTERS:
        return folder
    Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="medfl-reader-", dir="/tmp")


def _raise_its_error(answer: dict[str, Any]) -> None:
    if "error" in answer:
        kind = getattr(errors, answer["error"], DataError)
        raise (kind if issubclass(kind, MedflError) else DataError)(answer["message"])


def _upload_of(answer: dict[str, Any], workspace: Path) -> Upload:
    _raise_its_error(answer)
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
    """Do one piece of work under the kernel's limits; runs in a fork, which never returns."""
    code = 1
    try:
        with connection.makefile("rb") as stream:
            request = json.loads(stream.readline())
        _end_when_shut(connection)
        connection.sendall(json.dumps(_answer(request)).encode())
        code = 0
    finally:
        os._exit(code)


def _end_when_shut(connection: socket.socket) -> None:
    """Let the kernel end this process when the other side shuts the connection or is gone: SIGIO ends what has it."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | fcntl.FASYNC)
    if select.select([connection], [], [], 0)[0]:  # it was shut before
        os._exit(1)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    limits = UploadLimits.model_validate(request["limits"])
    work = _written if "format" in request else _read
    try:
        return work(request, limits, Path(request["workspace"]))
    except MedflError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        return {"error": "UnreadableFile", "message": "the upload asks for more memory than it may have"}


def _read(request: dict[str, Any], limits: UploadLimits, workspace: Path) -> dict[str, Any]:
    path = Path(request["path"])
    size = path.stat().st_size if path.is_file() else 0
    bound = _bounds(limits)

    def grant(num_bytes: int) -> None:
        """Allow what a header asks for, at the slowest speed that is tolerated."""
        bound(num_bytes, (size + num_bytes) / limits.bytes_per_second)

    grant(0)
    upload = read_upload(path, limits, workspace, request["series"], grant)
    np.save(workspace / VOXELS, upload.volume.array, allow_pickle=False)
    return {
        "kind": upload.kind, "affine": upload.volume.affine.tolist(), "notes": list(upload.volume.notes),
        "files": [str(file) for file in upload.files],
    }  # fmt: skip


def _written(request: dict[str, Any], limits: UploadLimits, workspace: Path) -> dict[str, Any]:
    files = tuple(Path(file) for file in request["files"])
    labels = {int(value): str(name) for value, name in request["labels"]}
    mask = np.load(workspace / MASK, allow_pickle=False)
    num_bytes = mask.size * MASK_BYTES_PER_VOXEL * (1 + len(labels))
    size = sum(file.stat().st_size for file in files)
    planes = mask.shape[0] * (1 + len(labels))
    _bounds(limits)(num_bytes, (size + num_bytes) / limits.bytes_per_second + planes * SECONDS_PER_PLANE)
    # Only the place of the image is needed, not its voxels.
    volume = Volume(np.broadcast_to(np.float32(0), (1, *mask.shape)), np.array(request["affine"], dtype=np.float64))
    origin = MaskOrigin(**request["origin"])
    content = write_mask(mask, Upload(volume, request["kind"], files), labels, request["format"], origin)
    (workspace / RESULT).write_bytes(content)
    return {}


def _bounds(limits: UploadLimits) -> Callable[[int, float], None]:
    """Return what lets this process have so many bytes and seconds beyond those that every upload has."""
    before = _address_space()

    def bound(num_bytes: int, seconds: float) -> None:
        if before is not None:
            memory = before + limits.memory_bytes + num_bytes
            resource.setrlimit(resource.RLIMIT_AS, (memory, resource.RLIM_INFINITY))
        signal.alarm(max(1, math.ceil(limits.seconds + seconds)))

    return bound


def _address_space() -> int | None:
    """Bytes of address space that this process has now; None on systems that do not bound it."""
    if not ADDRESS_SPACE.exists():
        return None
    return int(ADDRESS_SPACE.read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def _import_readers() -> None:
    """Import what reading and writing need, so that a fork does not."""
    import highdicom  # noqa: F401
    import jpeg_ls  # noqa: F401
    import nibabel  # noqa: F401
    import nrrd  # noqa: F401
    import openjpeg  # noqa: F401
    import pydicom.pixels  # noqa: F401
    import rle  # noqa: F401


if __name__ == "__main__":
    _import_readers()
    _serve(sys.argv[1])
