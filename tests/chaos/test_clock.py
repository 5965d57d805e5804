"""A clock that jumps back an hour, or a year ahead, in the middle of a run changes nothing but the times noted."""

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest
from small_runs import small_run

from medfl_ray import round_times
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.ledger.export import verify_export
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.receipts import read_receipts, verify_receipts


class Jumping:
    """Stands for `datetime` in a module; every reading is one jump on."""

    jumps = (timedelta(0), timedelta(hours=-1), timedelta(days=365), timedelta(days=-4000), timedelta(minutes=7))

    def __init__(self):
        self.readings = 0

    def now(self, zone=UTC):
        self.readings += 1
        return datetime.now(zone) + self.jumps[self.readings % len(self.jumps)]


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_a_run_does_not_mind_a_jumping_clock(tmp_path, monkeypatch, deadline_s):
    clock = Jumping()
    monkeypatch.setattr(round_times, "datetime", clock)
    monkeypatch.setattr("time.time", lambda: 0.0)
    run = small_run(
        federation={"rounds": 5, "local_steps": 1, "deadline_s": deadline_s},
        privacy={"enable_dp": True, "noise_multiplier": 20.0, "sample_rate": 0.5},
        output={"directory": tmp_path},
    )
    folder, policies = RunFolder.create(run), tuple(list_hospitals(run))
    pool = local_pool(hospital_specs(run, policies, folder.path))
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    assert outcome.completed
    assert clock.readings > 10
    receipts, _ = read_receipts(folder.path / "receipts.jsonl")
    verify_receipts(receipts)
    times = [receipt.ended_at for receipt in receipts]
    assert times != sorted(times)
    assert all(len(receipt.trained) == 3 for receipt in receipts)
    for export in json.loads((folder.path / "ledger.json").read_text()).values():
        verify_export(export)
