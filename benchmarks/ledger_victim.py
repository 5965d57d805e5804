"""The process that benchmarks/ledger.py kills: it charges rounds in a ledger and says under which it trained."""

from __future__ import annotations

import sys
from pathlib import Path

from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger

MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=8, num_patients=40, delta=1e-5
)


def open_ledger(folder: Path, hospital: str = "north", max_epsilon: float | None = None) -> PrivacyLedger:
    """Open the ledger that victim and judge share."""
    return PrivacyLedger.open(folder / "ledger.sqlite", hospital, "scans", MECHANISM.delta, max_epsilon)


def main(folder: str, job: str, num_rounds: str) -> None:
    """Reserve, settle and "train" round by round; every third round is called off and released instead."""
    ledger = open_ledger(Path(folder))
    for number in range(1, int(num_rounds) + 1):
        reservation = ledger.reserve(job, number, 0, MECHANISM, None)
        if number % 3 == 0:
            ledger.release(reservation, "called off before training")
        else:
            ledger.settle(reservation)
            print("trained", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
