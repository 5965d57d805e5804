"""Pooled training is charged where the patients' data come from, at every hospital or at none."""

from pathlib import Path

import pytest

from medfl_ray.errors import BudgetExceeded, LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.pooled import PooledLedger

MECHANISM = Mechanism(
    noise_multiplier=2.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=80, delta=1e-5
)


def ledger_of(folder: Path, hospital: str, max_epsilon: float | None = None) -> PrivacyLedger:
    (folder / hospital).mkdir()
    return PrivacyLedger.open(folder / hospital / "ledger.sqlite", hospital, "scans", 1e-5, max_epsilon)


def test_every_hospital_is_charged(tmp_path: Path) -> None:
    north, south = ledger_of(tmp_path, "north"), ledger_of(tmp_path, "south")
    north.reserve("run", 1, 1, MECHANISM, None)
    pooled = PooledLedger([north, south])
    pooled.settle(pooled.reserve("run/central", 1, 1, MECHANISM, None))
    assert [event.kind for event in south.events()] == ["reserve", "settle"]
    assert pooled.spent().epsilon == north.spent().epsilon > south.spent().epsilon > 0


def test_where_one_hospital_cannot_afford_it_nobody_is_charged(tmp_path: Path) -> None:
    north, south = ledger_of(tmp_path, "north"), ledger_of(tmp_path, "south", max_epsilon=0.1)
    pooled = PooledLedger([north, south])
    with pytest.raises(BudgetExceeded, match="south"):
        pooled.reserve("run/central", 1, 1, MECHANISM, None)
    assert north.spent().epsilon == south.spent().epsilon == 0.0
    assert "refused" in str(north.events()[-1].reason)


def test_a_pooled_charge_closes_once(tmp_path: Path) -> None:
    north = ledger_of(tmp_path, "north")
    pooled = PooledLedger([north])
    charge = pooled.reserve("run/central", 1, 1, MECHANISM, None)
    pooled.release(charge, "below quorum")
    with pytest.raises(LedgerError, match="not open"):
        pooled.settle(charge)
    assert north.spent().epsilon == 0.0


def test_hole_no_hospital_settles_a_pooled_mechanism_that_it_has_not_charged(tmp_path: Path) -> None:
    north, south = ledger_of(tmp_path, "north"), ledger_of(tmp_path, "south")
    pooled = PooledLedger([north, south])
    charge = pooled.reserve("run/central", 1, 1, MECHANISM, None)
    with pytest.raises(LedgerError, match="would train with num_steps 3 where 2 was charged"):
        pooled.settle(charge, mechanism=MECHANISM.model_copy(update={"num_steps": 3}))
    assert [len(ledger.events()) for ledger in (north, south)] == [1, 1]
    pooled.settle(pooled.reserve("run/central", 1, 2, MECHANISM, None), mechanism=MECHANISM)
    assert [len(ledger.events()) for ledger in (north, south)] == [3, 3]
