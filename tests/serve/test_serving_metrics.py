"""The figures that Prometheus reads."""

import time

import pytest

from serve.replicas.model_loader import ModelKey
from serve.replicas.replica import WorkReport
from serve.serving_metrics import ServingMetrics

KEY = ModelKey("tiny", "1")


def figures(metrics):
    lines = [line for line in metrics.page().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.fixture
def metrics():
    return ServingMetrics(drift_threshold=0.5, drift_smoothing=0.5, ray_too=False)


def test_requests_are_counted_by_route_and_status(metrics):
    metrics.started()
    metrics.started()
    metrics.ended("/v2/models/{model}/infer", 200, 0.3)
    found = figures(metrics)
    assert found['medfl_serve_in_flight_requests{kind="http"}'] == 1
    assert found['medfl_serve_requests_total{route="/v2/models/{model}/infer",status="200"}'] == 1
    assert found['medfl_serve_request_seconds_bucket{le="0.25",route="/v2/models/{model}/infer"}'] == 0
    assert found['medfl_serve_request_seconds_bucket{le="0.5",route="/v2/models/{model}/infer"}'] == 1


def test_the_queue_is_the_time_that_no_replica_worked(metrics):
    metrics.worked(KEY, WorkReport(busy_s=2.0, batch_windows=(4, 4, 1)), wall_s=2.5)
    found = figures(metrics)
    assert found['medfl_serve_queue_seconds_sum{model="tiny"}'] == pytest.approx(0.5)
    assert found['medfl_serve_model_seconds_sum{model="tiny"}'] == pytest.approx(2.0)
    assert found['medfl_serve_batch_windows_count{model="tiny"}'] == 3
    assert found['medfl_serve_batch_windows_sum{model="tiny"}'] == 9


def test_drift_raises_an_alert_after_enough_volumes(metrics):
    alerts = [metrics.worked(KEY, WorkReport(0.1, (1,), (0.9, 0.0)), 0.1) for _ in range(6)]
    assert alerts == [False] * 4 + [True] * 2
    found = figures(metrics)
    assert found['medfl_serve_input_drift{channel="0",model="tiny"}'] == pytest.approx(0.9)
    assert found['medfl_serve_input_drift{channel="1",model="tiny"}'] == 0
    assert found['medfl_serve_input_drift_alert{model="tiny"}'] == 1


@pytest.fixture
def round_time(monkeypatch):
    """Let every figure have begun at a time of few digits, among which a test may look for others."""
    monkeypatch.setattr(time, "time", lambda: 1e9)


def test_the_shift_of_one_patients_image_is_not_published(round_time, metrics):
    page = b""
    for number in range(1, 7):
        metrics.worked(KEY, WorkReport(0.1, (1,), (0.3721,)), 0.1)
        page = metrics.page()
        assert (b'medfl_serve_input_drift{channel="0"' in page) is (number >= 5)
        assert b"372" not in page
    assert figures(metrics)['medfl_serve_input_drift{channel="0",model="tiny"}'] == 0.4


def test_images_without_a_fingerprint_raise_none(metrics):
    assert not any(metrics.worked(KEY, WorkReport(0.1, (1,)), 0.1) for _ in range(9))
    assert 'medfl_serve_input_drift_alert{model="tiny"}' not in figures(metrics)
