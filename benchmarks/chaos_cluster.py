"""A federation on a Ray cluster of two nodes while hospitals are killed on a timer and the second node dies.

The run is the product's own: driver, coordinator on the head, hospital actors anywhere. It goes on until its time is
over, then it is stopped as by Ctrl-C.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from actors.cluster import secure_environment, worker_environment
from medfl_ray.config.files import dump_yaml, parse_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ReceiptError
from medfl_ray.messages import SignedReceipt
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import charges
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.receipts import read_receipts, verify_receipts

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.2
INTERRUPTED = 130
NUM_HOSPITALS = 4
DEADLINE_S = 30.0
KILL_EVERY_S = 20.0
NODE_EVERY_S = 300.0
NODE_AWAY_S = 20.0
# A round has its deadline for updates and as long again for its evaluation; what takes longer than both hangs.
HUNG_S = 2 * DEADLINE_S + 10.0
SETTLED_ROUNDS = 5
LEAK_WAIT_S = 30.0
MARK = "MEDFL_CHAOS_MARK"


@dataclass
class Observed:
    """What was seen from outside: when each round closed, what driver and coordinator held then, what was done."""

    began: float = field(default_factory=time.monotonic)
    closed_at: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    kills: int = 0
    node_losses: int = 0


def configure(out: Path, deadline_s: float) -> RunConfig:
    """Return a private federation of four small hospitals with more rounds than there is time for."""
    return parse_run_config(
        {
            "name": "chaos",
            "data": {
                "phantom": {
                    "preset": "balls",
                    "num_hospitals": NUM_HOSPITALS,
                    "patients_per_hospital": 8,
                    "size_voxels": 32,
                },
                "spatial_dims": 2,
            },
            "model": {"type": "unet2d", "features": [8, 16]},
            "training": {"batch_size": 2, "patch_size_voxels": 32, "patient_gradients": "single"},
            "federation": {
                "rounds": 100_000,
                "local_steps": 4,
                "deadline_s": deadline_s,
                "min_clients": 1,
                "max_failed_rounds": 1000,
                "max_hospital_failures": 1000,
                "seed": 7,
            },
            "privacy": {"enable_dp": True, "noise_multiplier": 20.0, "sample_rate": 0.5},
            "output": {"directory": str(out), "report": False, "export": False},
        }
    )


def run_under_chaos(
    out: Path, minutes: float, kill_every_s: float = KILL_EVERY_S, node_every_s: float = NODE_EVERY_S, seed: int = 1
) -> dict[str, float]:
    """Run for so many minutes, with kills and node losses on their timers, and return the figures.

    Raises:
      RuntimeError: the run ended otherwise than by our Ctrl-C.
    """
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
    os.environ.update(worker_environment())
    secure_environment()
    from ray.cluster_utils import Cluster

    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.yaml"
    config.write_text(dump_yaml(configure(out / "runs", DEADLINE_S)))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        command = [sys.executable, "-m", "medfl_ray.cli.main", "run", str(config), "--ray-address", cluster.address]
        with (out / "run.log").open("w") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        observed = Observed()
        disturb(cluster, driver, observed, out / "runs", minutes, kill_every_s, node_every_s, random.Random(seed))
        status = driver.wait(timeout=HUNG_S)
        if status != INTERRUPTED:
            raise RuntimeError(f"the run ended with {status}: {(out / 'run.log').read_text()[-1500:]}")
        leaked = wait_for_none("ray::HospitalActor") + wait_for_none("ray::Coordinator")
    finally:
        cluster.shutdown()
    leaked += wait_for_none("ray::")
    return judge(folder_of(out / "runs"), observed, leaked)


def disturb(
    cluster: Any,
    driver: subprocess.Popen[bytes],
    observed: Observed,
    runs: Path,
    minutes: float,
    kill_every_s: float,
    node_every_s: float,
    rng: random.Random,
) -> None:
    """Kill a hospital's process, now and then the node with all on it, watch, and at the end press Ctrl-C."""
    node, back_at = cluster.add_node(num_cpus=2), None
    next_kill, next_loss = observed.began + kill_every_s, observed.began + node_every_s
    while driver.poll() is None:
        time.sleep(POLL_S)
        watch(driver, observed, runs)
        now = time.monotonic()
        if now - observed.began > 60 * minutes:
            driver.send_signal(signal.SIGINT)
            return
        if now >= next_kill:
            next_kill = now + kill_every_s
            hospitals = processes("ray::HospitalActor")
            if hospitals:
                rng.choice(hospitals).kill()
                observed.kills += 1
        if back_at is not None and now >= back_at:
            node, back_at = cluster.add_node(num_cpus=2), None
        if now >= next_loss and back_at is None:
            next_loss = now + node_every_s
            cluster.remove_node(node, allow_graceful=False)
            observed.node_losses += 1
            back_at = time.monotonic() + NODE_AWAY_S


def watch(driver: subprocess.Popen[bytes], observed: Observed, runs: Path) -> None:
    """Take down the rounds that have closed since, and what the processes that stay hold."""
    folder = folder_of(runs)
    path = folder / "metrics.jsonl" if folder is not None else None
    closed = path.read_bytes().count(b"\n") if path is not None and path.exists() else 0
    if closed > len(observed.closed_at):
        held = [psutil.Process(driver.pid), *processes("ray::Coordinator")]
        observed.resident_mb.append(sum(process.memory_info().rss for process in held) / 2**20)
        observed.closed_at.extend([time.monotonic()] * (closed - len(observed.closed_at)))


def folder_of(runs: Path) -> Path | None:
    """Return the folder of the run, once it is there."""
    return next(iter(sorted(runs.glob("*-chaos"))), None)


def processes(title: str) -> list[psutil.Process]:
    """Return the processes of this benchmark whose title begins so."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK] and " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:
            continue  # it has ended, or is not ours
    return found


def wait_for_none(title: str) -> int:
    """Return how many processes of a title are still there after a while."""
    ends = time.monotonic() + LEAK_WAIT_S
    while processes(title) and time.monotonic() < ends:
        time.sleep(0.5)
    return len(processes(title))


def judge(folder: Path | None, observed: Observed, leaked: int) -> dict[str, float]:
    """Return the figures of a run under chaos."""
    assert folder is not None
    receipts, _ = read_receipts(folder / "receipts.jsonl")
    gaps = np.diff([*observed.closed_at, time.monotonic()])[:-1]
    settled = observed.resident_mb[SETTLED_ROUNDS:]
    enough = len(settled) > SETTLED_ROUNDS
    undercounts, lost = compare_with_ledgers(folder, receipts)
    return {
        "minutes": (observed.closed_at[-1] - observed.began) / 60,
        "rounds": len(receipts),
        "rounds_published": sum(receipt.published for receipt in receipts),
        "hospital_kills": observed.kills,
        "node_losses": observed.node_losses,
        "failures_named": sum(len(receipt.failures) for receipt in receipts),
        "longest_round_s": float(gaps.max()),
        "hung_rounds": int((gaps > HUNG_S).sum()),
        "leaked_actors": leaked,
        "cluster_undercounts": undercounts,
        "cluster_lost_rounds": lost,
        "rss_slope_mb_per_round": float(np.polyfit(np.arange(len(settled)), settled, 1)[0]) if enough else float("nan"),
    }


def compare_with_ledgers(folder: Path, receipts: Sequence[SignedReceipt]) -> tuple[int, int]:
    """Return how many updates are in a receipt and not in their hospital's ledger, and how many rounds are missing."""
    try:
        verify_receipts(receipts)
    except ReceiptError:
        return 0, len(receipts)
    names = {name for receipt in receipts for name in receipt.asked}
    undercounts = 0
    for name in names:
        trained = {(receipt.round, receipt.attempt) for receipt in receipts if name in receipt.trained}
        undercounts += len(trained - charged_rounds(folder, name))
    published = sorted({receipt.round for receipt in receipts if receipt.published})
    return undercounts, (published[-1] if published else 0) - len(published)


def charged_rounds(folder: Path, hospital: str) -> set[tuple[int | None, int | None]]:
    """Return the rounds and attempts that a hospital's ledger charges."""
    path = folder / "hospitals" / hospital / "ledger.sqlite"
    ledger = PrivacyLedger.open(path, hospital, data_set_of(folder, hospital), 1e-5, None)
    return {(event.round, event.attempt) for event in charges(ledger.events())}


def data_set_of(folder: Path, hospital: str) -> str:
    """Return the name under which a hospital's account is kept."""
    return next(p.data_set for p in list_hospitals(RunFolder.open(folder).run) if p.hospital == hospital)
