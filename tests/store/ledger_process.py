"""A hospital's process as tests start it: reserves and settles in a ledger and imports no torch.

Usage: ledger_process.py FOLDER ROUNDS [WRITER], one printed line per completed stage.
"""

import sys
from pathlib import Path

from medfl_ray.errors import BudgetExceeded, LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger

UNPROTECTED = "unprotected"


def mechanism() -> Mechanism:
    return Mechanism(
        noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=8, num_patients=40, delta=1e-5
    )


def main(folder: str, rounds: str, writer: str = "job") -> None:
    ledger = PrivacyLedger.open(Path(folder) / "ledger.sqlite", "north", "scans", 1e-5, 1.0)
    print("opened", flush=True)
    if writer == UNPROTECTED:
        ledger.mark_unprotected(writer, "privacy.enable_dp is off")
        print("marked", flush=True)
    for round_number in range(1, int(rounds) + 1):
        try:
            reservation = ledger.reserve(writer, round_number, 0, mechanism(), None)
        except BudgetExceeded:
            print("refused", flush=True)
            continue
        print(f"reserved {round_number}", flush=True)
        if round_number % 3 == 0:
            ledger.release(reservation, "the round was called off before training")
            print(f"released {round_number}", flush=True)
        else:
            ledger.settle(reservation)
            print(f"settled {round_number}", flush=True)
    assert "torch" not in sys.modules
    print("done", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except LedgerError as error:
        print(f"error {error}", flush=True)
        sys.exit(1)
