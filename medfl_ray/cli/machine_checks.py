"""What `medfl-ray doctor` looks at: each check returns what was found and, where something is wrong, what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from medfl_ray.errors import MedflError

PORTS = {8265: "Ray dashboard", 6379: "Ray head node", 8000: "model endpoints"}
GIB = 2**30
RAY_START_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Check:
    """One finding; `advice` says what to do and is empty where all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def check_python() -> Check:
    """Python's version and whether it is an environment of its own; pip refuses versions that are too old."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.prefix == sys.base_prefix:
        advice = "run make install: an environment of its own keeps other packages out"
        return Check("python", "warn", f"{version}, not in a virtual environment", advice)
    return Check("python", "ok", f"{version}, in a virtual environment")


def check_packages() -> Check:
    """Installed versions against the bounds of pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("medfl-ray") or ()]
    except metadata.PackageNotFoundError:
        return Check("packages", "fail", "medfl-ray is not installed", "run make install")
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "run pip install -c constraints.txt -e . again")
    return Check("packages", "ok", f"{len(needed)} required packages are within their bounds")


def check_names() -> Check:
    """No foreign distribution brings packages with our names."""
    try:
        from actors import cluster

        cluster.check_packages()
    except ImportError:
        advice = "uninstall the distribution that brings a package 'actors', or use an environment of its own"
        return Check("names", "fail", "the package 'actors' that Python finds is not medfl-ray's", advice)
    except MedflError as error:
        return Check("names", "fail", str(error), "uninstall it, or use an environment of its own")
    return Check("names", "ok", "actors, serve and tune are not taken by another distribution")


def check_gpu() -> Check:
    """What torch can train on."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Check("gpu", "ok", ", ".join(f"{d.name} ({d.total_memory / GIB:.0f} GiB)" for d in devices))
    if shutil.which("nvidia-smi"):
        found = f"an NVIDIA driver is present, but torch {torch.__version__} cannot use it"
        return Check("gpu", "warn", found, "install a CUDA build of the same torch version, or update the driver")
    return Check("gpu", "ok", "none; training uses the CPU")


def check_processor() -> Check:
    """Cores that this process may use, and the thread settings of the numerical libraries."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return Check("processor", "ok", f"{available} cores; each Ray worker computes with one thread")
    if not text.isdigit() or int(text) < 1:
        return Check("processor", "fail", f"OMP_NUM_THREADS is {text!r}, which is no number above 0", "unset it")
    if int(text) > available:
        found = f"OMP_NUM_THREADS={text} on {available} cores"
        return Check("processor", "warn", found, f"set it to {available} or less; more threads than cores are slower")
    return Check("processor", "ok", f"{available} cores, OMP_NUM_THREADS={text}")


def check_disk() -> Check:
    """Room for runs below the current folder, and whether it can be written."""
    here = Path.cwd()
    if not os.access(here, os.W_OK):
        advice = "change to a folder that you may write to, or set output.directory"
        return Check("disk", "fail", "the current folder cannot be written", advice)
    free = shutil.disk_usage(here).free / GIB
    found = f"{free:.1f} GiB free in the current folder"
    if free < 1:
        return Check("disk", "fail", found, "free at least 1 GiB: checkpoints could not be written")
    return Check("disk", "warn" if free < 5 else "ok", found, "free some space; Ray spills to disk" if free < 5 else "")


def check_shared_memory() -> Check:
    """Shared memory, in which Ray keeps the weights of a round."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("shared memory", "ok", "this system has none of its own; Ray uses files")
    free = shutil.disk_usage(place).free / GIB
    if free < 0.5:
        advice = "in a container, start it with --shm-size=2g; Ray uses slower files otherwise"
        return Check("shared memory", "warn", f"{free:.2f} GiB free", advice)
    return Check("shared memory", "ok", f"{free:.1f} GiB free")


def check_ports() -> Check:
    """Ports that our services use by default, on loopback."""
    taken = [port for port in PORTS if not _is_free(port)]
    if not taken:
        return Check("ports", "ok", f"{', '.join(map(str, PORTS))} are free")
    found = ", ".join(f"{port} ({PORTS[port]})" for port in taken)
    advice = "harmless for training, which finds other ports; stop the other program before you start that service"
    return Check("ports", "warn", f"in use: {found}", advice)


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_ray() -> Check:
    """Start Ray in a process of its own, as a run would, and end it again."""
    version = metadata.version("ray")
    command = [sys.executable, "-c", "from medfl_ray.cli.machine_checks import start_ray; start_ray()"]
    advice = "run without Ray: medfl-ray run CONFIG --pool local"
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=RAY_START_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("ray", "fail", f"{version} did not answer within {RAY_START_TIMEOUT_S:.0f} s", advice)
    try:
        report = json.loads(answer.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return Check("ray", "fail", f"{version} ended with exit code {answer.returncode} while starting", advice)
    if "error" in report:
        return Check("ray", "fail", f"{version}: {report['error']}", advice)
    kind = "starts here" if report["started"] else "answers at RAY_ADDRESS"
    return Check("ray", "ok", f"{version} {kind} with {report['cpus']:g} CPUs and {report['gpus']:g} GPUs")


def start_ray() -> None:
    """Connect to Ray, print what it offers as one line of JSON, and leave it; runs in a process of its own."""
    from actors.cluster import connect, disconnect

    try:
        cluster = connect()
    except MedflError as error:
        print(json.dumps({"error": str(error)}))
        return
    print(json.dumps({"started": cluster.started, "cpus": cluster.num_cpus, "gpus": cluster.num_gpus}))
    disconnect()


def check_state(folder: Path) -> Check:
    """The folder of the privacy ledgers can be written, and by its owner alone."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = "set MEDFL_STATE_DIR or output.state_directory to a folder that you may write to"
        return Check("state", "fail", "the folder of the privacy ledgers cannot be written", advice)
    if existing == folder and stat.S_IMODE(folder.stat().st_mode) & 0o022:
        found = "others on this machine can change the privacy ledgers"
        return Check("state", "warn", found, f"run chmod -R go-w on the folder {folder.name!r}")
    return Check("state", "ok", "the folder of the privacy ledgers can be written")


def check_data(folder: Path) -> Check:
    """The folder can be read and has a known layout; no image is opened."""
    from medfl_ray.data.layouts.catalogue import discover_cases

    try:
        index = discover_cases(folder, "auto")
    except MedflError as error:
        return Check("data", "fail", str(error), "docs/howto/own-data.md shows the layouts")
    patients = len({case.patient_id for case in index.cases})
    found = f"{len(index.cases)} cases of {patients} patients in {folder.name!r}"
    if index.problems:
        return Check(
            "data", "warn", f"{found}, problems noted: {len(index.problems)}", "run medfl-ray data inspect on it"
        )
    return Check("data", "ok", found)
