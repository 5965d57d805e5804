"""Connecting to Ray: a cluster named by the user, or one of our own on loopback with a token.

A cluster that happens to run on this machine is left alone: only RAY_ADDRESS or --ray-address joins one.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.session_folders import claim_root, discard, hold, owner_only_files, session_root, sweep
from medfl_ray.errors import ClusterError

OUR_PACKAGES = ("actors", "serve", "tune")
_sessions: list[tuple[Path, int]] = []
"""The session of a cluster that this process started and has not ended, with the descriptor that marks it alive."""


@dataclass(frozen=True)
class Cluster:
    """A connection; `started` says whether closing it ends the cluster.

    `umask` is this process's own, which the processes of a cluster that it started do not have: theirs is 077.
    """

    started: bool
    num_cpus: float
    num_gpus: float
    dashboard_url: str | None
    umask: int | None = None


def connect(
    address: str | None = None, num_cpus: int | None = None, dashboard: bool = False, metrics: bool = True
) -> Cluster:
    """Join the cluster at `address` (or RAY_ADDRESS), or start one of our own.

    Args:
      metrics: whether a cluster of our own counts tasks, cores and our figures on its page for Prometheus, which asks
        for no token.

    Raises:
      ClusterError: the cluster cannot be reached or started, or a foreign package shadows one of ours.
    """
    check_packages()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None:
        secure_environment()
    import ray

    if address is None:
        _check_token_mode()
        sessions = claim_root(session_root())
        sweep(sessions)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    options["runtime_env"] = {"env_vars": worker_environment()}
    umask: int | None = None
    try:
        if address is not None:
            context = ray.init(address=address, **options)
        else:
            options |= {"num_cpus": num_cpus or os.cpu_count(), "include_dashboard": dashboard}
            options["_system_config"] = {"enable_metrics_collection": metrics}
            context, umask = _start(sessions, options)
    except Exception as error:  # noqa: BLE001 - whatever Ray says becomes one sentence
        where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
        raise ClusterError(
            f"could not {'reach' if address else 'start'} {where}: {type(error).__name__}. Check RAY_ADDRESS and "
            "RAY_AUTH_TOKEN, run medfl-ray doctor, or run without Ray: --pool local."
        ) from None
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Cluster(
        started=address is None,
        num_cpus=float(resources.get("CPU", 1)),
        num_gpus=float(resources.get("GPU", 0)),
        dashboard_url=getattr(context, "dashboard_url", None) or None,
        umask=umask,
    )


def _start(sessions: Path, options: Mapping[str, Any]) -> tuple[Any, int]:
    """Start a cluster on loopback whose session nobody else may read; return its context and this process's umask."""
    import ray

    with owner_only_files() as before:
        context = ray.init(
            address="local",
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(sessions),
            **options,
        )
    session = Path(context.address_info["session_dir"])  # type: ignore[attr-defined]
    _sessions.append((session, hold(session)))
    return context, before


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends with it, another one does not notice."""
    import ray

    ray.shutdown()
    while _sessions:
        session, lock = _sessions.pop()
        with suppress(FileNotFoundError):  # somebody has emptied the folder of temporary files
            discard(session)
        os.close(lock)


def secure_environment() -> None:
    """Set, before Ray is imported, what keeps our own cluster on loopback, behind a token, and small in memory."""
    # Unless this is 0, Ray 2.55 rewrites a 127.0.0.1 node address to the machine's own and listens everywhere.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its notice
    # Serve's proxy takes this from its environment; without it an upload is whole in memory, twice.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.flow_control:middlewares")
    # Serve's own processes else wake ten times a second, on cores that belong to the models.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "1000")
    # A sum of a small network's updates then travels in the answer itself: through the object store, the daemon of the
    # node and the coordinator would spend 3 ms on it, on cores that train.
    os.environ.setdefault("RAY_max_direct_call_object_size", str(2**21))
    os.environ.setdefault("RAY_event_stats", "0")  # statistics of Ray's own loops, for those who develop it
    # Workers are what such a cluster is for; by Ray's default they yield to every other process of the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _check_token_mode() -> None:
    """Check that Ray read our environment: it does so once, when it is imported.

    Raises:
      ClusterError: Ray was imported before `secure_environment` and would start without a token.
    """
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    if os.environ["RAY_AUTH_MODE"] == "token" and not is_token_auth_enabled():
        raise ClusterError(
            "Ray was imported before its token authentication was switched on. Set RAY_AUTH_MODE=token in the "
            "environment, or call actors.cluster.secure_environment() before the first import of ray."
        )


def worker_environment() -> dict[str, str]:
    """Return the environment of every worker: one thread each, for two on a busy machine collapse."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


def simulation_environment() -> dict[str, str]:
    """Return the environment of a simulation's workers, in place before their processes start.

    Freed memory stays with the process; otherwise a large volume's pass would spend its time on page faults (glibc).
    """
    return {
        **worker_environment(),
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TRIM_THRESHOLD_": str(2**33),
        "MALLOC_TOP_PAD_": str(2**26),
        # Groups of many sizes and short batches have thousands of convolution shapes; oneDNN keeps 1024 prepared.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(2**12),
    }


def check_pinned(hospitals: Sequence[str], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuse hospitals whose actor could restart on a node that does not have their ledger.

    Args:
      hospitals: names of those that keep a ledger outside the run.
      nodes: as `ray.nodes()` returns them.

    Raises:
      ClusterError: several nodes are alive, and a hospital's resource is not on exactly one of them.
    """
    offered = [set(node["Resources"]) for node in nodes if node["Alive"]]
    if len(offered) < 2:
        return
    loose = [name for name in hospitals if sum(f"hospital:{name}" in resources for resources in offered) != 1]
    if loose:
        raise ClusterError(
            f"the cluster has {len(offered)} nodes, and the ledger of {', '.join(loose)} lies on one of them: an actor "
            "that restarts elsewhere would open another. Start each hospital's node with the resource "
            f"hospital:{loose[0]}, as in ray start --resources='{{\"hospital:{loose[0]}\": 1}}', on exactly one node"
        )


def check_packages() -> None:
    """Check that `actors`, `serve` and `tune` are this project's.

    Raises:
      ClusterError: another distribution installed a package of the same name.
    """
    home = Path(__file__).resolve().parent.parent
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or [])] if spec else []
        if places and all(place.parent != home for place in places):
            raise ClusterError(
                f"the package {name!r} that Python finds belongs to {_owner(name)}, not to medfl-ray. "
                "Uninstall that distribution or use a virtual environment of its own."
            )


def _owner(package: str) -> str:
    from importlib.metadata import packages_distributions

    owners = [name for name in packages_distributions().get(package, []) if name != "medfl-ray"]
    return f"the distribution {owners[0]!r}" if owners else "another project"
