"""A run's figures in Ray's metrics, which every node's agent serves to Prometheus; Ray puts `ray_` before each name.

That page asks for no token. So it holds no more than a receipt does: rounds, sizes, charged epsilons, and of the
figures of data only those labelled public or charged. Ray drops a gauge once it was scraped, so that each is said again
every few seconds as long as the run lasts, and it counts a histogram's values as the middle of their bucket.

Where cohorts are secret, rounds appear by the hour: stored scrapes would otherwise show how long each of them took.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Self

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.events import AccountsClosed, Event, HospitalState, PhaseStarted, RoundClosed, RoundTimed
from medfl_ray.messages import HEADLINES, Metric, PrivacySpent, Receipt, RoundResult
from medfl_ray.round_times import Clock, exact_now, has_secret_cohorts

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge, Histogram

Emit = Callable[[Event], None]
REPEAT_S = 5.0
"""Seconds between two repeats of all gauges; Ray's processes report every ten."""
MAX_HOSPITALS = 100
"""With more, one series stands for all: of thousands, repeating each would cost more than a hundredth of a core."""
ALL = "all"
SHOWN_LABELS = ("public", "charged")
FIGURES = (*HEADLINES, "train_loss")
SILENT = ("select", "start", "train", "late")
"""Stages of failure that an alert on silence counts; a spent budget or a refused update is another matter."""

RUN = ("run",)
HOSPITAL = ("run", "hospital")
ACCOUNT = ("run", "hospital", "unit", "delta", "adjacency")
EPSILON = "of the unit in label `unit` (patient: one patient of the hospital; hospital: one hospital of all), delta"
GAUGES = {
    "medfl_round": ("Last round that was published.", RUN),
    "medfl_rounds_planned": ("Rounds that the run is to have.", RUN),
    "medfl_round_closed_timestamp_seconds": ("When the last round ended, published or not.", RUN),
    "medfl_updates": ("Updates in the last round.", RUN),
    "medfl_quorum": ("Updates without which a round is not published.", RUN),
    "medfl_hospitals_present": ("Hospitals that have started.", RUN),
    "medfl_rounds_missed": ("Rounds in a row that brought no update although the hospital was due.", HOSPITAL),
    "medfl_dice": ("Mean Dice on held-out patients; public or charged figures only.", HOSPITAL),
    "medfl_auc": ("Area under the ROC curve on held-out patients; public or charged figures only.", HOSPITAL),
    "medfl_accuracy": ("Accuracy on held-out patients; public or charged figures only.", HOSPITAL),
    "medfl_train_loss": ("Mean training loss; public or charged figures only.", HOSPITAL),
    "medfl_epsilon_spent": (
        f"Epsilon of the data set's account so far, {EPSILON} and adjacency in the labels.",
        ACCOUNT,
    ),
    "medfl_epsilon_budget": (
        f"Epsilon that may be charged to the account in all, where declared, {EPSILON} and adjacency in the labels.",
        ACCOUNT,
    ),
    "medfl_simulation_seconds": ("Where the last simulated round's time went.", ("run", "part")),
}
COUNTERS = {
    "medfl_failures": ("Hospitals that delivered nothing, by where their part ended.", ("run", "hospital", "stage")),
    "medfl_rounds_unpublished": ("Rounds that ended without new weights.", RUN),
}
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
BYTES = tuple(float(4**power) for power in range(5, 18))
HISTOGRAMS = {
    "medfl_round_seconds": ("Length of a round; of runs on public or synthetic data only.", RUN, SECONDS),
    "medfl_client_seconds": ("A hospital's own time for a round; public or charged figures only.", HOSPITAL, SECONDS),
    "medfl_update_bytes": ("Size of one hospital's update.", HOSPITAL, BYTES),
}


class ClusterMetrics:
    """Keeps a run's gauges up to date from `with` to its end; `update` takes the run's events as they happen."""

    def __init__(
        self,
        run: RunConfig,
        name: str,
        policies: Sequence[SitePolicy],
        repeat_s: float = REPEAT_S,
        clock: Clock = exact_now,
    ) -> None:
        """Make the figures, in a process that has joined a Ray cluster; `name` is the run's label."""
        from ray.util.metrics import Counter, Gauge, Histogram

        self._gauges: dict[str, Gauge] = {key: Gauge(key, *about) for key, about in GAUGES.items()}
        self._counters: dict[str, Counter] = {key: Counter(key, *about) for key, about in COUNTERS.items()}
        self._histograms: dict[str, Histogram] = {
            key: Histogram(key, text, list(edges), tags) for key, (text, tags, edges) in HISTOGRAMS.items()
        }
        self._run, self._name, self._repeat_s, self._clock = run, name, repeat_s, clock
        # A round takes as long as its slowest hospital, whose time tells how many of its patients were drawn.
        self._shows_times = all(policy.declared != "private" for policy in policies)
        self._many = len(policies) > MAX_HOSPITALS
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}
        self._missed: dict[str, int] = {}
        self._present: set[str] = set()
        self._absent: set[str] = set()
        self._held_back: deque[RoundResult] = deque()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._repeater = threading.Thread(target=self._repeat, name="cluster-metrics", daemon=True)

    def __enter__(self) -> Self:
        self._set("medfl_quorum", self._run.federation.min_clients)
        self._repeater.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._repeater.join()

    def update(self, event: Event) -> None:
        """Take what an event says, as far as anybody may see it."""
        if isinstance(event, PhaseStarted) and event.name == "start":
            self._set("medfl_rounds_planned", event.total_rounds or 0)
        elif isinstance(event, HospitalState):
            self._heard_of(event)
        elif isinstance(event, RoundClosed) and event.result.receipt.secret_cohort:
            self._held_back.append(event.result)
        elif isinstance(event, RoundClosed):
            self._closed(event.result)
        elif isinstance(event, AccountsClosed) and not has_secret_cohorts(self._run):
            self._set_accounts(event.spent)
        elif isinstance(event, RoundTimed) and self._shows_times:
            for part, seconds in event.seconds.items():
                self._set("medfl_simulation_seconds", seconds, part)

    def _heard_of(self, state: HospitalState) -> None:
        if state.state == "waiting":
            self._present.add(state.hospital)
            self._set("medfl_hospitals_present", len(self._present))
        elif state.state == "failed" and state.hospital not in self._present:
            self._absent.add(state.hospital)
            self._count("medfl_failures", self._label(state.hospital), "start")
        if state.update_bytes is not None:
            self._observe("medfl_update_bytes", state.update_bytes, self._label(state.hospital))
        if state.duration is not None:
            self._observe("medfl_client_seconds", shown(state.duration), self._label(state.hospital))

    def show_due(self) -> None:
        """Show the rounds with secret cohorts whose time in the receipt, which is rounded up, has come."""
        while self._held_back and datetime.fromisoformat(self._held_back[0].receipt.ended_at) <= self._clock():
            self._closed(self._held_back.popleft())

    def _closed(self, result: RoundResult) -> None:
        receipt = result.receipt
        if receipt.published:
            self._set("medfl_round", receipt.round)
        else:
            self._count("medfl_rounds_unpublished")
        self._set("medfl_round_closed_timestamp_seconds", datetime.fromisoformat(receipt.ended_at).timestamp())
        self._count_missed(receipt)
        if self._shows_times and result.duration_s:
            self._observe("medfl_round_seconds", result.duration_s)
        for failure in receipt.failures:
            self._count("medfl_failures", self._label(failure.hospital), failure.stage)
        for name in FIGURES:
            found = {hospital: shown(figures[name]) for hospital, figures in result.metrics.items() if name in figures}
            may_be_seen = {hospital: value for hospital, value in found.items() if value is not None}
            self._set_each(f"medfl_{name}", may_be_seen, fmean)
        self._set_accounts(receipt.spent)

    def _set_accounts(self, by_hospital: Mapping[str, PrivacySpent]) -> None:
        accounts = by_hospital if not self._many or not by_hospital else {ALL: nearest_to_budget(by_hospital)}
        for hospital, spent in accounts.items():
            account = (hospital, spent.unit, f"{spent.delta:g}", spent.adjacency)
            self._set("medfl_epsilon_spent", spent.epsilon, *account)
            self._set("medfl_epsilon_budget", spent.budget, *account)

    def _count_missed(self, receipt: Receipt) -> None:
        """Count rounds without an update; with a secret cohort nobody learns who delivered, not even how many."""
        if receipt.secret_cohort:
            return
        delivered = {*receipt.trained, *receipt.late}
        silent = {failure.hospital for failure in receipt.failures if failure.stage in SILENT} | self._absent
        self._missed |= dict.fromkeys(delivered, 0)
        self._missed |= {hospital: self._missed.get(hospital, 0) + 1 for hospital in silent - delivered}
        self._set_each("medfl_rounds_missed", self._missed, max)
        self._set("medfl_updates", len(delivered))

    def _set(self, name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            with self._lock:
                self._values[name, labels] = value

    def _set_each(self, name: str, values: Mapping[str, float], of_many: Callable[[Iterable[float]], float]) -> None:
        if self._many and values:
            values = {ALL: of_many(values.values())}
        for hospital, value in values.items():
            self._set(name, value, hospital)

    def _count(self, name: str, *labels: str) -> None:
        self._counters[name].inc(1, self._tags(COUNTERS[name][1], labels))

    def _observe(self, name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            self._histograms[name].observe(value, self._tags(HISTOGRAMS[name][1], labels))

    def _label(self, hospital: str) -> str:
        return ALL if self._many else hospital

    def _tags(self, keys: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
        return dict(zip(keys, (self._name, *labels), strict=True))

    def _repeat(self) -> None:
        while not self._ended.wait(self._repeat_s):
            self.show_due()
            with self._lock:
                values = dict(self._values)
            for (name, labels), value in values.items():
                self._gauges[name].set(value, self._tags(GAUGES[name][1], labels))


def both(first: Emit, second: Emit) -> Emit:
    """Return what hands an event to two that follow a run."""

    def emit(event: Event) -> None:
        first(event)
        second(event)

    return emit


def nearest_to_budget(spent: Mapping[str, PrivacySpent]) -> PrivacySpent:
    """Return the account with the largest share of its budget spent; without budgets, the largest epsilon."""
    return max(spent.values(), key=lambda one: (one.epsilon / one.budget if one.budget else 0.0, one.epsilon))


def shown(figure: Metric) -> float | None:
    """Return a figure that may stand where anybody on the machine reads it, or None."""
    return figure.value if figure.label in SHOWN_LABELS else None
