"""Who is drawn in secret, and how many are, shows in nothing that a run writes or emits: no time, size or order."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import Interfering, small_run

from medfl_ray.assembly.run import RunExtras, hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.federation import hospital_level
from medfl_ray.messages import ClientFailure, Metric, RoundPlan, SiteEvaluation
from medfl_ray.params import layout_of
from medfl_ray.round_times import GRID_S, has_secret_cohorts
from medfl_ray.store.run.folder import RunFolder, interrupted_round

GRID_NS = GRID_S * 10**9
STAMP = re.compile(rb"20\d\d-\d\d-\d\dT(\d\d:\d\d:\d\d)")


def central_run(tmp_path, rounds=2, fraction=0.5, **level):
    run = small_run(
        data={"phantom": {"num_hospitals": 3, "patients_per_hospital": 3, "size_voxels": 16, "seed": 3}},
        federation={"rounds": rounds, "local_steps": 1, "fraction": fraction},
        privacy={"enable_dp": True, "unit": "hospital", "noise_multiplier": 2.0, "hospital_level": level},
    )
    return run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path / "runs"})})


def finished(run, tmp_path, wrap=lambda pool: pool):
    policies = tuple(list_hospitals(run))
    folder, events, root = RunFolder.create(run), [], tmp_path / "state"
    pool = wrap(local_pool(hospital_specs(run, policies, folder.path, root)))
    outcome = run_in_process(run, policies, folder.path, pool, events.append, threading.Event(), RunExtras(root=root))
    assert outcome.completed, outcome.reason
    return folder, events


def files_of(folder):
    return sorted(path for path in folder.path.rglob("*") if path.is_file())


def test_hole_times_of_a_secret_cohort_are_full_hours_in_every_file(tmp_path):
    """Receipts, metrics, checkpoints, journal, the federation's ledger, its mirror and its export, text or database."""
    folder, events = finished(central_run(tmp_path), tmp_path)
    found = {path.name: STAMP.findall(path.read_bytes()) for path in files_of(folder)}
    assert {clock for clocks in found.values() for clock in clocks if not clock.endswith(b":00:00")} == set()
    with_times = {name for name, clocks in found.items() if clocks}
    assert with_times >= {
        "receipts.jsonl",
        "metrics.jsonl",
        "state.json",
        "rounds.sqlite",
        "ledger.sqlite",
        "mirror.sqlite",
        "ledger.json",
    }
    assert all(result.duration_s == 0 for result in folder.results())
    assert not STAMP.search(re.sub(rb"T\d\d:00:00", b"", repr(events).encode()))


def test_hole_files_of_a_secret_cohort_were_changed_at_full_hours(tmp_path):
    """A copy of the run's folder keeps when each checkpoint was written, and so how long each round took."""
    folder, _ = finished(central_run(tmp_path), tmp_path)
    paths = [folder.path, *folder.path.rglob("*")]
    assert len(paths) > 20
    assert [path.name for path in paths if path.lstat().st_mtime_ns % GRID_NS] == []


def test_hole_checkpoints_are_dated_by_the_hour_before_the_run_has_ended(tmp_path):
    folder, dates = [], []

    def look(update):
        dates.extend(path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/checkpoints/**/*"))
        return [update]

    run = central_run(tmp_path, rounds=3, fraction=0.999)
    folder, _ = finished(run, tmp_path, lambda pool: Interfering(pool, look))
    assert dates
    assert {date % GRID_NS for date in dates} == {0}
    assert has_secret_cohorts(folder.run)


def masked(value, key=""):
    """Return a document with its hashes, noise and times replaced by their kinds; names, orders and lengths stay."""
    if isinstance(value, dict):
        return [(name, masked(inner, name)) for name, inner in value.items()]
    if isinstance(value, list):
        return [masked(inner, key) for inner in value]
    if isinstance(value, float) or (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}|\d+:[0-9a-f]{32,}", value)):
        return type(value).__name__
    if key in ("job", "ended_at", "at", "signature", "public_key"):
        return "differs from run to run"
    return value


def shape_of(folder):
    """Return every file of a run with its lines, keys, orders and, where it holds no text, its size."""
    shape = []
    for path in files_of(folder):
        name = str(path.relative_to(folder.path))
        if path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            shape.append((name, [masked(json.loads(line)) for line in lines]))
        elif path.suffix not in (".png", ".yaml"):
            shape.append((name, path.stat().st_size))
        else:
            shape.append((name, None))
    return shape


def test_hole_an_empty_and_a_full_cohort_leave_the_same_files_lines_and_events(tmp_path, monkeypatch):
    shapes, told = [], []
    for who in ((), None):
        cohort = lambda available, rate, who=who: tuple(available) if who is None else who  # noqa: E731
        monkeypatch.setattr(hospital_level, "sample_cohort", cohort)
        own = tmp_path / f"with-{'nobody' if who == () else 'all'}"
        folder, events = finished(central_run(own), own)
        shapes.append(shape_of(folder))
        told.append([masked(json.loads(event.model_dump_json())) for event in events])
    assert [name for name, _ in shapes[0]] == [name for name, _ in shapes[1]]
    assert shapes[0] == shapes[1]
    assert told[0] == told[1]


def test_hole_figures_that_come_with_an_update_do_not_name_a_hospital_of_a_secret_cohort(tmp_path):
    """A hospital of another version may send its loss, and only who was drawn sends anything."""

    def with_loss(update):
        return [replace(update, metrics={"train_loss": Metric(value=0.25, label="public")})]

    folder, _ = finished(central_run(tmp_path, fraction=0.999), tmp_path, lambda pool: Interfering(pool, with_loss))
    assert b"train_loss" not in b"".join(path.read_bytes() for path in files_of(folder))


def test_hole_the_order_in_which_hospitals_answered_is_in_no_file(tmp_path):
    """Whose data the last round has loaded is first to be scored."""
    folder = RunFolder.create(central_run(tmp_path))
    names = ("c", "a", "b")
    evaluations = [SiteEvaluation(hospital=name, round=1, metrics={}, patient_scores=None) for name in names]
    failures = [
        ClientFailure(hospital=name, round=1, attempt=1, stage="evaluate", reason="") for name in reversed(names)
    ]
    folder.save_final(np.zeros(2, np.float32), layout_of(torch.nn.Linear(1, 1)), evaluations, failures)
    assert list(json.loads((folder.path / "evaluation.json").read_text())) == ["a", "b", "c"]
    assert [one["hospital"] for one in json.loads((folder.path / "failures.json").read_text())] == ["a", "b", "c"]


@pytest.mark.parametrize("secret", [True, False])
def test_an_interrupted_round_ends_at_a_full_hour_where_its_cohort_is_secret(secret):
    plan = RoundPlan(
        job="job", round=1, attempt=1, config_hash="", weights_checksum="", hospitals=() if secret else ("a",),
        num_steps={} if secret else {"a": 1}, learning_rate=0.1, mechanisms={},
    )  # fmt: skip
    before = datetime.now(UTC).timestamp() - 1
    receipt = interrupted_round(SimpleNamespace(plan=plan, state="collecting", delivered=())).receipt
    ended = datetime.fromisoformat(receipt.ended_at).timestamp()
    assert receipt.secret_cohort is secret
    if secret:
        assert ended % GRID_S == 0
        assert ended >= before
    else:
        assert before <= ended <= datetime.now(UTC).timestamp()


def test_times_are_exact_where_everybody_is_asked(tmp_path):
    before = datetime.now(UTC).timestamp() - 1
    folder, _ = finished(central_run(tmp_path, fraction=1.0), tmp_path)
    ended = [datetime.fromisoformat(receipt.ended_at).timestamp() for receipt in folder.receipts()]
    assert all(before <= moment <= datetime.now(UTC).timestamp() for moment in ended)
    assert any(path.stat().st_mtime_ns % GRID_NS for path in files_of(folder))


def test_hole_the_report_of_a_secret_cohort_is_dated_by_the_hour(tmp_path):
    from medfl_ray.analytics.report import write_report

    folder, _ = finished(central_run(tmp_path, rounds=1), tmp_path)
    text = write_report(folder.path).read_text()
    assert re.findall(r"20\d\d-\d\d-\d\d \d\d:(\d\d)", text) == ["00"]
