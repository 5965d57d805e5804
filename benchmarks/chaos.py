"""Rounds under fire: the coordinator killed at every named point, and a two-node cluster whose hospitals die.

Part `kills` ends a run's process with SIGKILL at each failpoint, resumes it and compares ledgers, receipts and
weights. Part `cluster` runs a federation for some minutes while a hospital is killed every 20 s and the second node
every 5 minutes.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from chaos_cluster import run_under_chaos
from chaos_kills import FAILPOINTS, kill_everywhere
from harness import Goal, Options, benchmark, report

REPEATS = 5
MINUTES = 30.0
SAMPLE = ("round.reserved", "round.update", "checkpoint.manifest", "record.metrics")
GOALS = {
    "kills": (
        Goal("kills", at_least=12 * REPEATS),
        Goal("undercounts", at_most=0),
        Goal("overcharged_attempts_max", at_most=1),
        Goal("lost_rounds", at_most=0),
        Goal("resume_minus_cold_s_max", at_most=2.0),
        Goal("model_hash_equal", at_least=1),
    ),
    "cluster": (
        Goal("hung_rounds", at_most=0),
        Goal("leaked_actors", at_most=0),
        Goal("cluster_undercounts", at_most=0),
        Goal("cluster_lost_rounds", at_most=0),
        Goal("rss_slope_mb_per_round", at_most=0.5),
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the part, and how long the cluster is disturbed."""
    parser.add_argument("--part", choices=(*GOALS, "all"), default="all", help="what to do (default: all)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="kills at each point (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="minutes of chaos on the cluster")
    parser.add_argument("--node-every", type=float, default=300.0, help="seconds between losses of the node")


def measure(options: Options) -> dict[str, float]:
    """Do the parts that are asked for."""
    import torch

    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    part = options.own.part
    if part in ("kills", "all"):
        points, repeats = (SAMPLE, 1) if options.quick else (FAILPOINTS, options.own.repeats)
        figures |= kill_everywhere(options.out / "kills", repeats, points)
    if part in ("cluster", "all"):
        minutes = min(options.own.minutes, 2.0) if options.quick else options.own.minutes
        figures |= run_under_chaos(options.out / "cluster", minutes, node_every_s=options.own.node_every)
    return figures


if __name__ == "__main__":
    with benchmark(__doc__, add_options=add_options) as options:
        wanted = [goal for part, goals in GOALS.items() if options.own.part in (part, "all") for goal in goals]
        report(options, measure(options), wanted)
