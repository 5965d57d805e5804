"""A process that has imported what its children need and forks for each of them, over a socket; see warm.py.

Usage: warm_parent.py SOCKET MODULE ...
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import json
import os
import runpy
import select
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def main(address: str, modules: list[str]) -> None:
    """Import, then fork for every connection until standard input ends with whoever started this."""
    for module in modules:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(16)
        print("ready", flush=True)
        while serve_one(listening):
            pass


def serve_one(listening: socket.socket) -> bool:
    """Start what the next connection asks for; return whether there may be another."""
    ready, _, _ = select.select([listening, sys.stdin], [], [])
    with contextlib.suppress(ChildProcessError):  # there is none left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if listening not in ready:
        return False
    connection, _ = listening.accept()
    with connection:
        if os.fork() == 0:
            listening.close()
            watch(connection)
    return True


def watch(connection: socket.socket) -> None:
    """Fork the child, say its process id and, in the end, how it ended; never returns."""
    head, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    wanted = json.loads(head)
    child = os.fork()
    if child == 0:
        connection.close()
        become(wanted, files)
    with contextlib.suppress(OSError):  # whoever asked may have ended
        connection.sendall(f"{child}\n".encode())
        for file in files:
            os.close(file)
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    os._exit(0)


def become(wanted: dict[str, Any], files: list[int]) -> None:
    """Run a program as `python PROGRAM` or `python -m MODULE` would; never returns."""
    status = 0
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        # What the parent has buffered is the parent's.
        sys.stdin, sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, mode, 0 if number == 2 else -1),
            write_through=number == 2, errors="backslashreplace" if number == 2 else "strict")
            for number, mode in enumerate(("rb", "wb", "wb")))  # fmt: skip
        os.environ.clear()
        os.environ.update(wanted["env"])
        os.chdir(wanted["cwd"])
        own = wanted["env"].get("PYTHONPATH", "").split(os.pathsep)
        program, sys.argv = wanted["argv"][0], wanted["argv"]
        sys.path[:] = [path for path in own if path] + [path for path in sys.path if path not in own]
        if Path(program).is_absolute():
            sys.path.insert(0, str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path.insert(0, wanted["cwd"])
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - a fork never returns to its parent's code
        traceback.print_exc()
        status = 1
    finish(status)


def finish(status: int) -> None:
    """End as an interpreter does: threads and exit handlers first, then what is buffered."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
