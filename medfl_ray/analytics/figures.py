"""The report's charts, drawn as SVG without any global state of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from medfl_ray.analytics.summary import Curve, HospitalSummary, RunSummary, Spread, shown
from medfl_ray.privacy.account import epsilon_words

FEDERATED, LOCAL, CENTRAL = "#0b6e99", "#c05a00", "#6b4fa0"
INK, GRID, FAINT = "#1f2933", "#e3e8ee", "#98a4b3"
HOSPITALS = ("#0f8f80", "#d1495b", "#8a6d00", "#5b6ee1", "#a0522d", "#3c7d2a", "#b0408f", "#4a6572")
MAX_NAMED = len(HOSPITALS)
MAX_COMPARED = 40
SAME = 0.005
"""Epsilons this near each other are the same: receipts and the ledger's export are computed separately."""


@dataclass(frozen=True)
class Chart:
    """An SVG with the words that say the same to who cannot see it."""

    title: str
    svg: str
    alt: str


def metric_name(metric: str) -> str:
    """Return how a metric is written in a sentence."""
    return {"dice": "Dice", "auc": "AUC"}.get(metric, metric)


def learning_curves(summary: RunSummary) -> Chart | None:
    """Draw the held-out metric over rounds, per hospital and mean, with the baselines as lines."""
    curves = [(h.hospital, h.curve) for h in summary.hospitals if h.curve]
    if not curves:
        return None
    figure, axes = new_figure()
    few = len(curves) <= MAX_NAMED
    for place, (name, curve) in enumerate(curves):
        colour = HOSPITALS[place] if few else FAINT
        x, y = zip(*curve, strict=True)
        axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.85 if few else 0.3, label=name if few else None)
    x, y = zip(*summary.mean_curve, strict=True)
    axes.plot(x, y, color=FEDERATED, linewidth=3, marker="o", markersize=4.5, label="federated, mean")
    _baseline(axes, summary.local, LOCAL, "local only, mean")
    _baseline(axes, summary.central, CENTRAL, "central, mean")
    axes.set_xlabel("round")
    axes.set_ylabel(f"{metric_name(summary.metric)} on held-out patients")
    _finish(axes, columns=2)
    first, last = summary.mean_curve[0], summary.mean_curve[-1]
    alt = (
        f"Line chart of {metric_name(summary.metric)} on held-out patients over rounds, one line per hospital and "
        f"their mean, which goes from {first[1]:.3f} in round {first[0]} to {last[1]:.3f} in round {last[0]}."
    )
    return Chart("Learning curves", svg_text(figure), alt + _baseline_words(summary))


def comparison(summary: RunSummary) -> Chart | None:
    """Draw each hospital's local, federated and central figure on one line, its patients as faint dots."""
    rows = [h for h in summary.hospitals if shown(h.federated) is not None]
    if not rows or len(rows) > MAX_COMPARED:
        return None
    figure, axes = new_figure(height=max(3.9, 0.42 * len(rows) + 1.5))
    for place, hospital in enumerate(rows):
        _compare(axes, place, hospital)
    axes.set_yticks(range(len(rows)), [h.hospital for h in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{metric_name(summary.metric)} on held-out patients")
    entries = [Line2D([], [], color=FEDERATED, marker="o", linestyle="", markersize=8, label="federated")]
    if summary.local:
        entries.append(Line2D([], [], color=LOCAL, marker="s", linestyle="", markersize=7, label="local only"))
    if summary.central:
        entries.append(Line2D([], [], color=CENTRAL, marker="D", linestyle="", markersize=6.5, label="central"))
    if any(h.patient_scores for h in rows):
        entries.append(Line2D([], [], color=FAINT, marker="|", linestyle="", markersize=9, label="one patient"))
    axes.grid(axis="y", visible=False)
    _finish(axes, columns=4, entries=entries)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    words = "; ".join(_comparison_words(h) for h in rows)
    title = "Federated beside its baselines" if summary.local or summary.central else "Hospitals side by side"
    return Chart(title, svg_text(figure), f"Per hospital: {words}.")


def epsilon_curves(summary: RunSummary) -> Chart | None:
    """Draw what was ever charged to each hospital's data after each round, with the budgets that bound it."""
    finite = {h.hospital: [s for s in h.spending if math.isfinite(s[1].epsilon)] for h in summary.hospitals}
    rows = [h for h in summary.hospitals if finite[h.hospital]]
    if not rows:
        return None
    figure, axes = new_figure()
    groups = _same_spending(rows)
    few = len(groups) <= MAX_NAMED
    for place, (curve, names) in enumerate(groups.items()):
        x, y = zip(*curve, strict=True)
        colour, alpha = (HOSPITALS[place], 1.0) if few else (FAINT, 0.35)
        label = (", ".join(names) if len(names) <= 3 else f"{len(names)} hospitals") if few else None
        axes.plot(x, y, color=colour, linewidth=2.2, marker="o", markersize=4, alpha=alpha, label=label)
    for label, budget in _budgets(rows):
        axes.axhline(budget, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"{label} {budget:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon of the data set so far\n(patient, add/remove)")
    _finish(axes, columns=3)
    words = "; ".join(f"{h.hospital} {epsilon_words(h.spending[-1][1].epsilon)}" for h in rows[:MAX_NAMED])
    deltas = sorted({f"{s.delta:.2g}".replace("e-0", "e-") for h in rows for _, s in h.spending}, key=float)
    alt = (
        "Line chart of everything ever charged to each hospital's data, as patient-level epsilon (add/remove, delta = "
        f"{' to '.join(dict.fromkeys((deltas[0], deltas[-1])))}) after each round; after the last one: {words}. What "
        "baselines and studies cost comes on top."
    )
    return Chart("Epsilon over rounds", svg_text(figure), alt)


def _budgets(rows: Sequence[HospitalSummary]) -> list[tuple[str, float]]:
    """Return the budgets that bound what is drawn: a run's own only where nothing was charged before it."""
    found = set()
    for hospital in rows:
        account, last = hospital.account, hospital.spending[-1][1].epsilon
        if account is None or account.run is None:
            continue
        if account.total.budget is not None:
            found.add(("lifetime budget", account.total.budget))
        if account.run.budget is not None and abs(last - account.run.epsilon) < SAME:
            found.add(("budget of the run", account.run.budget))
    return sorted(found, key=lambda one: one[1])[:MAX_NAMED]


def _same_spending(rows: Sequence[HospitalSummary]) -> dict[Curve, list[str]]:
    """Group hospitals whose lines would hide each other."""
    groups: dict[Curve, list[str]] = {}
    for hospital in rows:
        curve = tuple((n, round(s.epsilon, 2)) for n, s in hospital.spending if math.isfinite(s.epsilon))
        groups.setdefault(curve, []).append(hospital.hospital)
    return groups


def _compare(axes: Axes, place: int, hospital: HospitalSummary) -> None:
    federated, local, central = shown(hospital.federated), shown(hospital.local), shown(hospital.central)
    scores = hospital.patient_scores or ()
    axes.plot(scores, [place + 0.27] * len(scores), color=FAINT, marker="|", linestyle="", markersize=7, alpha=0.8)
    points = [value for value in (federated, local, central) if value is not None]
    axes.plot([min(points), max(points)], [place, place], color=GRID, linewidth=5, solid_capstyle="round", zorder=1)
    for value, colour, marker, size in (
        (central, CENTRAL, "D", 6.5),
        (local, LOCAL, "s", 7),
        (federated, FEDERATED, "o", 9),
    ):
        if value is not None:
            axes.plot([value], [place], color=colour, marker=marker, markersize=size, markeredgecolor="white", zorder=3)


def _comparison_words(hospital: HospitalSummary) -> str:
    values = (("federated", hospital.federated), ("local only", hospital.local), ("central", hospital.central))
    known = [f"{name} {metric.value:.3f}" for name, metric in values if metric is not None and metric.value is not None]
    return f"{hospital.hospital} {', '.join(known)}"


def _baseline(axes: Axes, value: Spread | None, colour: str, name: str) -> None:
    if value is not None:
        axes.axhline(value.mean, color=colour, linewidth=1.8, linestyle=(0, (5, 3)), label=name)


def _baseline_words(summary: RunSummary) -> str:
    words = [
        f" The mean of {name} is {value.mean:.3f}."
        for name, value in (("local-only models", summary.local), ("the central model", summary.central))
        if value is not None
    ]
    return "".join(words)


def new_figure(width: float = 5.6, height: float = 3.9) -> tuple[Figure, Axes]:
    """Return an empty chart in the report's dress; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    dress(axes)
    return figure, axes


def dress(axes: Axes, size: float = 11) -> None:
    """Give axes the report's dress; their labels have `size` points, their ticks half a point less."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=size - 0.5, length=3, color=FAINT)
    axes.xaxis.label.set(color=INK, size=size)
    axes.yaxis.label.set(color=INK, size=size)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _finish(axes: Axes, columns: int, entries: Sequence[Line2D] | None = None) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    handles = list(entries) if entries is not None else axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(
            handles=handles,
            ncols=min(columns, len(handles)),
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            frameon=False,
            fontsize=10,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
        )
    ticks = axes.get_xlim()
    if np.isclose(ticks[0], ticks[1]):
        axes.set_xlim(ticks[0] - 1, ticks[1] + 1)


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG, the same bytes for the same drawing."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
