"""Prometheus figures of one ingress replica; Ray's own scrape gets the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.replicas.drift import DriftState
from serve.replicas.model_loader import ModelKey
from serve.replicas.replica import WorkReport

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)


class _Figure:
    """One figure in two places: our own page and, in a Ray worker, Ray's."""

    def __init__(self, own: Any, rays: Any | None) -> None:
        self._own, self._rays = own, rays

    def inc(self, labels: Mapping[str, str]) -> None:
        self._own.labels(**labels).inc()
        if self._rays is not None:
            self._rays.inc(1, dict(labels))

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        self._own.labels(**labels).set(value)
        if self._rays is not None:
            self._rays.set(value, dict(labels))

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        self._own.labels(**labels).observe(value)
        if self._rays is not None:
            self._rays.observe(value, dict(labels))


class ServingMetrics:
    """Latency, queue, batch sizes, versions and drift. Labels are routes, models and versions, never a request's."""

    def __init__(self, drift_threshold: float, drift_smoothing: float, ray_too: bool) -> None:
        """Make the figures; `ray_too` only in a Ray worker."""
        self._registry, self._ray_too = CollectorRegistry(), ray_too
        self._threshold, self._smoothing = drift_threshold, drift_smoothing
        self._drift: dict[str, DriftState] = {}
        self._versions: dict[str, str] = {}
        self._requests = self._counter("requests", "Requests by outcome.", ("route", "status"))
        self._seconds = self._histogram("request_seconds", "Whole time of a request.", ("route",), SECONDS)
        self._queue = self._histogram("queue_seconds", "Time until a replica took a request.", ("model",), SECONDS)
        self._busy = self._histogram("model_seconds", "Time in the model replica.", ("model",), SECONDS)
        self._batch = self._histogram("batch_windows", "Windows per onnxruntime call.", ("model",), WINDOWS)
        self._in_flight = self._gauge("in_flight_requests", "Requests that are being answered.", ("kind",))
        self._retries = self._counter("retries", "Requests sent again because a replica was lost.", ("model",))
        self._version = self._gauge("served_version", "1 for the version that is served.", ("model", "version"))
        self._shift = self._gauge(
            "input_drift", "Mean shift of input intensities in training deviations.", ("model", "channel")
        )
        self._alert = self._gauge("input_drift_alert", "1 where the mean shift is over its threshold.", ("model",))
        self._num_in_flight = 0

    def started(self) -> None:
        """Count a request in."""
        self._num_in_flight += 1
        self._in_flight.set(self._num_in_flight, {"kind": "http"})

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Count a request out."""
        self._num_in_flight -= 1
        self._in_flight.set(self._num_in_flight, {"kind": "http"})
        self._requests.inc({"route": route, "status": str(status)})
        self._seconds.observe(seconds, {"route": route})

    def worked(self, key: ModelKey, report: WorkReport, wall_s: float) -> bool:
        """Take what a model replica reports of a request; say whether its model's inputs are adrift."""
        model = {"model": key.name}
        self._busy.observe(report.busy_s, model)
        self._queue.observe(max(0.0, wall_s - report.busy_s), model)
        for size in report.batch_windows:
            self._batch.observe(size, model)
        return self._drifted(key.name, report.shifts) if report.shifts else False

    def retried(self, key: ModelKey) -> None:
        """Count a request that is sent a second time."""
        self._retries.inc({"model": key.name})

    def served(self, key: ModelKey) -> None:
        """Note the version that is served from now on."""
        before = self._versions.get(key.name)
        if before is not None:
            self._version.set(0, {"model": key.name, "version": before})
        self._versions[key.name] = key.version
        self._version.set(1, {"model": key.name, "version": key.version})

    def page(self) -> bytes:
        """Return the figures of this process as Prometheus reads them."""
        return generate_latest(self._registry)

    def _drifted(self, model: str, shifts: tuple[float, ...]) -> bool:
        state = self._drift.get(model, DriftState()).after(shifts, self._smoothing)
        self._drift[model] = state
        for channel, shift in enumerate(state.shown):
            self._shift.set(shift, {"model": model, "channel": str(channel)})
        alert = state.is_alert(self._threshold)
        self._alert.set(int(alert), {"model": model})
        return alert

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> _Figure:
        own = Counter(f"medfl_serve_{name}", text, labels, registry=self._registry)
        return _Figure(own, self._rays("Counter", f"medfl_serve_{name}", text, labels))

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> _Figure:
        own = Gauge(f"medfl_serve_{name}", text, labels, registry=self._registry)
        return _Figure(own, self._rays("Gauge", f"medfl_serve_{name}", text, labels))

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], edges: tuple[float, ...]) -> _Figure:
        own = Histogram(f"medfl_serve_{name}", text, labels, registry=self._registry, buckets=edges)
        return _Figure(own, self._rays("Histogram", f"medfl_serve_{name}", text, labels, boundaries=list(edges)))

    def _rays(self, kind: str, name: str, text: str, labels: tuple[str, ...], **options: Any) -> Any | None:
        if not self._ray_too:
            return None
        from ray.util import metrics

        return getattr(metrics, kind)(name, description=text, tag_keys=labels, **options)
