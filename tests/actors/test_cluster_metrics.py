"""What a run shows in a scrape of Ray's metrics page: charged and public figures, and nothing else of private data."""

import math
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from cli_runs import DP, configuration, write_patients
from scraping import metrics_address, of_run, scrape, scrape_until
from small_runs import Interfering, small_run

from actors.cluster_metrics import ClusterMetrics, both
from actors.names import actor_name, group_name
from actors.ray_pool import RayPool
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.federation.events import HospitalState, RoundClosed
from medfl_ray.messages import ClientFailure, Metric, PrivacySpent, Receipt, RoundResult
from medfl_ray.store.run.folder import RunFolder

# What may be said of hospitals with private data: none of it is computed from images or labels.
ACCOUNTING = {
    "ray_medfl_round",
    "ray_medfl_rounds_planned",
    "ray_medfl_round_closed_timestamp_seconds",
    "ray_medfl_updates",
    "ray_medfl_quorum",
    "ray_medfl_hospitals_present",
    "ray_medfl_rounds_missed",
    "ray_medfl_update_bytes_bucket",
    "ray_medfl_update_bytes_count",
    "ray_medfl_update_bytes_sum",
}
EPSILONS = {"ray_medfl_epsilon_spent", "ray_medfl_epsilon_budget"}


def last_round_is(number, run):
    return lambda samples: any(s.value == number for s in of_run(samples, run, "ray_medfl_round"))


def run_with_metrics(run, tmp_path, pool_of, then, also=lambda event: None):
    """Run a federation and scrape it before its figures go with it; `then` gets the samples."""
    run = run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})})
    policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
    specs = hospital_specs(run, policies, folder.path)
    with ClusterMetrics(run, folder.job, policies, repeat_s=0.2) as metrics:
        emit = both(metrics.update, also)
        outcome = run_in_process(run, policies, folder.path, pool_of(specs, folder), emit, threading.Event())
        assert outcome.completed, outcome.reason
        samples = scrape_until(last_round_is(run.federation.rounds, folder.job))
        then(of_run(samples, folder.job), folder)


def private_run(tmp_path, **privacy):
    budget = {"max_epsilon": 60.0} if privacy["enable_dp"] else {}
    hospitals = [
        {"id": name, "directory": str(write_patients(tmp_path / name)), "num_patients": 20, **budget}
        for name in ("north", "south")
    ]
    return parse_run_config(
        configuration(
            data={
                "hospitals": hospitals,
                "labels": {1: "box"},
                "channels": ["T1"],
                "holdout_fraction": 0.5,
            },
            privacy=privacy,
            federation={"rounds": 2, "local_steps": 2},
        )
    )


def watched(monkeypatch):
    """Collect what the trainer computes from the patients."""
    from medfl_ray.training.trainer import Trainer

    figures, train, evaluate = [], Trainer.train, Trainer.evaluate

    def watched_train(self, *arguments):
        outcome = train(self, *arguments)
        figures.append(outcome.mean_loss)
        return outcome

    def watched_evaluate(self, *arguments):
        scores = evaluate(self, *arguments)
        figures.append(sum(score.headline for score in scores) / len(scores))
        return scores

    monkeypatch.setattr(Trainer, "train", watched_train)
    monkeypatch.setattr(Trainer, "evaluate", watched_evaluate)
    return figures


@pytest.mark.parametrize("enable_dp", [True, False], ids=["suppressed", "unprotected"])
def test_nothing_computed_from_private_data_is_in_a_scrape(ray_cluster, monkeypatch, tmp_path, enable_dp):
    # A charge of another test would refuse the run without protection.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    figures = watched(monkeypatch)
    privacy = {**DP, "epsilon": None, "noise_multiplier": 2.0} if enable_dp else {"enable_dp": False}
    labels = set()

    def note(event):
        if isinstance(event, RoundClosed):
            labels.update(m.label for of in event.result.metrics.values() for m in of.values())

    def check(samples, folder):
        assert {s.name for s in samples} == ACCOUNTING | (EPSILONS if enable_dp else set())
        shown = [value for value in figures if math.isfinite(value) and value not in (0.0, 1.0)]
        assert len(shown) >= 4
        assert not [s for s in samples if any(abs(s.value - value) < 1e-6 for value in shown)]

    run_with_metrics(private_run(tmp_path, **privacy), tmp_path, lambda specs, _: local_pool(specs), check, note)
    assert labels == {"suppressed" if enable_dp else "unprotected"}


@pytest.mark.ci
def test_a_scrape_of_a_run_on_ray_says_what_its_receipts_say_and_its_actors_whose_they_are(ray_cluster, tmp_path):
    import ray

    run = small_run(privacy={"enable_dp": True, "epsilon": 8.0, "max_grad_norm": 1.0, "sample_rate": 0.5})
    names = set()

    def look(event):
        if isinstance(event, RoundClosed):
            names.update(name for name in ray.util.list_named_actors() if "lungs-1" in name)

    def check(samples, folder):
        last = folder.results()[-1]
        for hospital, spent in last.receipt.spent.items():
            (epsilon,) = (s for s in samples if s.name.endswith("_spent") and s.labels["hospital"] == hospital)
            assert epsilon.value == pytest.approx(spent.epsilon, rel=1e-9)
            assert epsilon.labels["unit"] == "patient"
            assert epsilon.labels["adjacency"] == "add_remove"
            assert float(epsilon.labels["delta"]) == spent.delta
            (dice,) = (s for s in samples if s.name == "ray_medfl_dice" and s.labels["hospital"] == hospital)
            assert dice.value == pytest.approx(last.metrics[hospital]["dice"].value)
            (missed,) = (s for s in samples if s.name.endswith("_missed") and s.labels["hospital"] == hospital)
            assert missed.value == 0
        assert [s.value for s in samples if s.name == "ray_medfl_updates"] == [3]
        counts = {s.labels["hospital"]: s.value for s in samples if s.name == "ray_medfl_client_seconds_count"}
        assert counts == dict.fromkeys(last.receipt.spent, run.federation.rounds)
        time.sleep(1.0)  # a gauge that is not repeated is gone after one scrape
        scrape_until(last_round_is(run.federation.rounds, folder.job), within_s=5)

    run_with_metrics(run, tmp_path, lambda specs, folder: RayPool(specs, "lungs-1", 2), check, look)
    first, second, third = sorted(policy.hospital for policy in list_hospitals(run))
    assert names == {f"medfl:lungs-1:hospital:{first}+{third}", actor_name("lungs-1", "hospital", second)}
    assert group_name(["a", "b", "c"]) == "a+2"


def test_following_a_run_takes_less_than_a_hundredth_of_it(ray_cluster, tmp_path):
    run, seen = small_run(federation={"rounds": 3}), []
    policies = tuple(list_hospitals(run))
    run_with_metrics(run, tmp_path, lambda specs, _: local_pool(specs), lambda samples, folder: None, seen.append)
    metrics = ClusterMetrics(run, "again", policies)
    started = time.perf_counter()
    for event in seen:
        metrics.update(event)
    followed_s = time.perf_counter() - started
    rounds_s = sum(event.result.duration_s for event in seen if isinstance(event, RoundClosed))
    assert followed_s < 0.01 * rounds_s, f"{followed_s:.4f} s of {rounds_s:.2f} s"


def closed(number, trained=(), failures=(), **changes):
    fields = {
        "job": "j",
        "round": number,
        "attempt": 1,
        "plan_hash": "",
        "config_hash": "",
        "asked": ("a", "b"),
        "trained": trained,
        "failures": failures,
        "update_hashes": {},
        "spent": {},
        "weights_before": "",
        "weights_after": "w" if trained else None,
        "published": bool(trained),
        "ended_at": "2025-01-02T03:04:05+00:00",
        **changes,
    }
    return RoundClosed(result=RoundResult(round=number, receipt=Receipt(**fields), metrics={}, duration_s=1.0))


def failed(hospital, stage):
    return ClientFailure(hospital=hospital, round=1, attempt=1, stage=stage, reason="")


def test_silence_is_counted_until_an_update_arrives_and_is_neither_a_spent_budget_nor_a_secret(ray_cluster):
    metrics = ClusterMetrics(small_run(), "counted", ())
    metrics.update(HospitalState(hospital="absent", state="failed"))
    missed = metrics._missed
    metrics.update(closed(1, ("a",), (failed("b", "late"),)))
    metrics.update(closed(2, ("a",), (failed("b", "train"), failed("a", "evaluate"))))
    assert missed | metrics._missed == {"a": 0, "b": 2, "absent": 2}
    metrics.update(closed(3, ("b",), (failed("a", "reserve"),)))
    assert metrics._missed == {"a": 0, "b": 0, "absent": 3}
    metrics.update(closed(4, (), (), secret_cohort=True, asked=()))
    assert metrics._missed == {"a": 0, "b": 0, "absent": 3}


def test_hole_rounds_of_a_secret_cohort_appear_at_full_hours(ray_cluster):
    """Prometheus keeps when `medfl_round` moved: without the grid, how long every round took."""
    now = [datetime(2025, 1, 2, 3, 59, 59, tzinfo=UTC)]
    metrics = ClusterMetrics(small_run(), "secret", (), clock=lambda: now[0])
    for number, hour in ((1, 4), (2, 4), (3, 5)):
        metrics.update(closed(number, (), (), secret_cohort=True, asked=(), published=True, ended_at=at_hour(hour)))
    metrics.show_due()
    assert metrics._values == {}
    now[0] = datetime(2025, 1, 2, 4, tzinfo=UTC)
    metrics.show_due()
    assert metrics._values["medfl_round", ()] == 2
    assert metrics._values["medfl_round_closed_timestamp_seconds", ()] == now[0].timestamp()
    now[0] = datetime(2025, 1, 2, 5, 0, 1, tzinfo=UTC)
    metrics.show_due()
    assert metrics._values["medfl_round", ()] == 3
    assert {name for name, _ in metrics._values} == {"medfl_round", "medfl_round_closed_timestamp_seconds"}


def test_a_round_whose_cohort_is_known_appears_at_once(ray_cluster):
    metrics = ClusterMetrics(small_run(), "known", ())
    metrics.update(closed(1, ("a",), ()))
    assert metrics._values["medfl_round", ()] == 1


def at_hour(hour):
    return f"2025-01-02T{hour:02d}:00:00+00:00"


def test_one_series_stands_for_more_than_a_hundred_hospitals(ray_cluster):
    names = [f"h{number:03d}" for number in range(101)]
    policies = [SimpleNamespace(hospital=name, declared="synthetic") for name in names]
    metrics = ClusterMetrics(small_run(), "many", policies)
    spent = {name: PrivacySpent(epsilon=1 + number, delta=1e-5, budget=200.0) for number, name in enumerate(names)}
    figures = {name: {"dice": Metric(value=float(number == 0), label="public")} for number, name in enumerate(names)}
    event = closed(1, tuple(names[1:]), (failed(names[0], "late"),), spent=spent)
    metrics.update(RoundClosed(result=event.result.model_copy(update={"metrics": figures})))
    account = ("all", "patient", "1e-05", "add_remove")
    assert metrics._values["medfl_epsilon_spent", account] == 101
    assert metrics._values["medfl_epsilon_budget", account] == 200
    assert metrics._values["medfl_dice", ("all",)] == pytest.approx(1 / 101)
    assert metrics._values["medfl_rounds_missed", ("all",)] == 1
    assert {labels[0] for _, labels in metrics._values if labels} == {"all"}


def test_the_metrics_page_takes_no_token_and_is_on_loopback_only(ray_cluster):
    import socket

    host, port = metrics_address().split(":")
    assert host == "127.0.0.1"
    assert scrape("ray_")
    own = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    others = [address for address in own if not address.startswith("127.")] or ["127.0.0.2"]
    for address in others:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((address, int(port)), timeout=5).close()


def test_a_round_without_quorum_is_counted_as_such(ray_cluster, tmp_path):
    run = small_run(federation={"rounds": 1, "min_clients": 3})

    def lose_the_first(update):
        if update.attempt == 1:
            return [failed(update.hospital, "train").model_copy(update={"attempt": 1})]
        return [update]

    def check(samples, folder):
        found = scrape_until(
            lambda samples: (
                of_run(samples, folder.job, "ray_medfl_rounds_unpublished_total")
                and len(of_run(samples, folder.job, "ray_medfl_failures_total")) == 3
            )
        )
        assert [s.value for s in of_run(found, folder.job, "ray_medfl_rounds_unpublished_total")] == [1]
        assert {s.labels["stage"] for s in of_run(found, folder.job, "ray_medfl_failures_total")} == {"train"}

    run_with_metrics(run, tmp_path, lambda specs, _: Interfering(local_pool(specs), lose_the_first), check)
