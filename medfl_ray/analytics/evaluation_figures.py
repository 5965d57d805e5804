"""The pictures of an evaluation: cross-site matrix, fairness, contributions, reliability, rounds to a target."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from medfl_ray.analytics.evaluation_summary import EvaluationSummary, expected_calibration_error, site_estimates
from medfl_ray.analytics.figures import (
    CENTRAL,
    FAINT,
    FEDERATED,
    INK,
    LOCAL,
    MAX_COMPARED,
    Chart,
    dress,
    metric_name,
    new_figure,
    svg_text,
)
from medfl_ray.analytics.summary import HospitalSummary, shown
from medfl_ray.messages import ReliabilityBins
from medfl_ray.study_records import ContributionRecord

LEFT_OUT = "#d1495b"
FURTHER_SIZE = 10.5
"""Points of the labels of further axes in one figure."""
NAMES = ("fairness", "cross_site", "contributions", "reliability", "rounds_to_target")
MAX_IN_MATRIX, MAX_WITH_NUMBERS, MAX_CLASSES = 40, 14, 4
BLUES = LinearSegmentedColormap.from_list("scores", ["#f4f8fb", "#8fc1d9", FEDERATED, "#083b54"])


@dataclass(frozen=True)
class Drawing:
    """A figure with the words that say the same; `name` is its file's, without an ending."""

    name: str
    title: str
    figure: Figure
    alt: str

    @property
    def chart(self) -> Chart:
        """The figure for the report."""
        return Chart(self.title, svg_text(self.figure), self.alt)

    @property
    def png(self) -> bytes:
        """The figure for a paper's draft: 150 dots per inch, on white."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def drawings(summary: EvaluationSummary) -> list[Drawing]:
    """Return the pictures that the run has figures for."""
    found = (
        fairness(summary),
        cross_site(summary),
        contributions(summary.studies.contributions, metric_name(summary.run.metric)),
        reliability(summary.reliability),
        rounds_to_target(summary),
    )
    return [drawing for drawing in found if drawing is not None]


def cross_site(summary: EvaluationSummary) -> Drawing | None:
    """Draw the score of each model at each hospital: each hospital's own, then the federated and the central one."""
    matrix = {
        f"{owner}, alone": {h: m.value for h, m in row.items()} for owner, row in summary.studies.cross_site.items()
    }
    columns = sorted(summary.studies.cross_site)
    if not matrix or len(columns) > MAX_IN_MATRIX:
        return None
    shared = {
        "federated": {h.hospital: shown(h.federated) for h in summary.run.hospitals},
        "central": {h.hospital: shown(h.central) for h in summary.run.hospitals},
    }
    matrix |= {name: row for name, row in shared.items() if any(value is not None for value in row.values())}
    values = np.array([[_or_nan(row.get(column)) for column in columns] for row in matrix.values()])
    size = 0.62 * len(columns)
    figure, axes = new_figure(width=max(5.6, size + 2.6), height=max(3.4, 0.5 * len(matrix) + 1.7))
    low, high = _range(values)
    image = axes.imshow(values, cmap=BLUES, vmin=low, vmax=high, aspect="auto")
    _mark_cells(axes, values, low, high, numbers=len(columns) <= MAX_WITH_NUMBERS)
    axes.axhline(len(columns) - 0.5, color="white", linewidth=5)
    slanted = len(columns) > 3
    axes.set_xticks(range(len(columns)), columns, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(matrix)), list(matrix))
    axes.set_xlabel("scored on held-out patients of")
    axes.set_ylabel("model")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label(metric_name(summary.run.metric), color=INK, size=11)
    bar.outline.set_visible(False)
    entries = [Patch(facecolor="none", edgecolor=LOCAL, linewidth=2, label="its own patients")]
    if np.isnan(values).any():
        entries.append(Patch(facecolor="white", edgecolor=FAINT, hatch="////", label="suppressed or not measured"))
    _legend(axes, entries)
    words = "; ".join(f"{name}: {_row_words(columns, row)}" for name, row in zip(matrix, values, strict=True))
    return Drawing("cross_site", "Every model at every hospital", figure, f"Heat map of scores. {words}.")


def _row_words(columns: Sequence[str], row: Sequence[float]) -> str:
    return ", ".join(
        f"{column} {'not shown' if math.isnan(value) else f'{value:.3f}'}"
        for column, value in zip(columns, row, strict=True)
    )


def _legend(axes: Axes, entries: Sequence[Line2D | Patch]) -> None:
    axes.legend(
        handles=list(entries),
        ncols=len(entries),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        columnspacing=1.2,
        handlelength=1.5,
    )


def _bars(axes: Axes, values: Sequence[float]) -> None:
    """Draw a bar per hospital: what is below zero in the colour of training alone."""
    colours = [LOCAL if value < 0 else FEDERATED for value in values]
    axes.barh(range(len(values)), values, color=colours, height=0.6, alpha=0.85)


def _beside(axes: Axes, words: Sequence[str]) -> None:
    """Write a word per bar in a column at the right."""
    for place, text in enumerate(words):
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=INK)


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")


def _mark_cells(axes: Axes, values: np.ndarray, low: float, high: float, numbers: bool) -> None:
    """Write the scores, hatch what is not shown and frame a hospital's own model on its own patients."""
    for (row, column), value in np.ndenumerate(values):
        corner = (column - 0.5, row - 0.5)
        if math.isnan(value):
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=FAINT, hatch="////", linewidth=0))
        elif numbers:
            colour = "white" if (value - low) / max(high - low, 1e-9) > 0.5 else INK
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=10, color=colour)
        if row == column:
            inside = (corner[0] + 0.04, corner[1] + 0.04)
            axes.add_patch(Rectangle(inside, 0.92, 0.92, fill=False, edgecolor=LOCAL, linewidth=2, zorder=4))


def fairness(summary: EvaluationSummary) -> Drawing | None:
    """Draw each hospital's federated score with its interval, and what it gains over training alone."""
    rows = [h for h in summary.run.hospitals if shown(h.federated) is not None]
    gains = any(h.gain is not None for h in rows)
    known = any(site.intervals for site in summary.sites.values())
    if len(rows) < 2 or len(rows) > MAX_COMPARED or not (gains or known):
        return None
    rows.sort(key=lambda h: shown(h.federated) or 0.0)
    figure, left = new_figure(width=8.4 if gains else 5.6, height=max(3.6, 0.42 * len(rows) + 1.7))
    if gains:
        figure.clear()
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for axes in (left, right):
            dress(axes, FURTHER_SIZE)
        _draw_gains(right, rows)
    _draw_scores(left, rows, summary)
    name = metric_name(summary.run.metric)
    left.set_xlabel(f"federated {name}, held-out patients")
    left.set_yticks(range(len(rows)), [h.hospital for h in rows])
    left.set_ylim(-0.6, len(rows) - 0.4)
    words = "; ".join(
        f"{h.hospital} {shown(h.federated):.3f}" + (f", gain {h.gain:+.3f}" if h.gain is not None else "") for h in rows
    )
    alt = f"Bars of the federated {name} per hospital, the worst first: {words}."
    return Drawing("fairness", "Who gains, and who is worst off", figure, alt)


def _draw_scores(axes: Axes, rows: Sequence[HospitalSummary], summary: EvaluationSummary) -> None:
    metric, without = summary.run.metric, summary.studies.leave_one_out
    values = [shown(h.federated) or 0.0 for h in rows]
    _bars(axes, values)
    axes.text(0.02, 0, "worst", transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color="white")
    entries: list[Line2D | Patch] = []
    for place, h in enumerate(rows):
        site = summary.sites.get(h.hospital)
        estimate = site_estimates(site).get(metric) if site is not None else None
        if estimate is not None and estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [place, place], color=INK, linewidth=1.6, marker="|", markersize=8)
        if h.hospital in without and (value := without[h.hospital].value) is not None:
            axes.plot([value], [place], color=LEFT_OUT, marker="D", markersize=6, markeredgecolor="white", zorder=4)
    mean = sum(values) / len(values)
    axes.axvline(mean, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    entries.append(Line2D([], [], color=INK, linewidth=1.1, linestyle=(0, (5, 3)), label="mean"))
    if any(site.intervals for site in summary.sites.values()):
        entries.append(Line2D([], [], color=INK, linewidth=1.6, marker="|", markersize=8, label="95 % interval"))
    if without:
        style = {"color": LEFT_OUT, "marker": "D", "linestyle": "", "markersize": 6}
        entries.append(Line2D([], [], label="trained without it", **style))  # type: ignore[arg-type]
    _legend(axes, entries)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _draw_gains(axes: Axes, rows: Sequence[HospitalSummary]) -> None:
    gains = [h.gain if h.gain is not None else math.nan for h in rows]
    _bars(axes, gains)
    axes.axvline(0, color=INK, linewidth=1.1)
    _beside(axes, ["" if math.isnan(gain) else _signed(gain) for gain in gains])
    axes.set_xlabel("gain over training alone")
    axes.xaxis.set_major_locator(MaxNLocator(4))


def contributions(record: ContributionRecord | None, metric: str) -> Drawing | None:
    """Draw what each hospital adds to the pooled score, with standard errors where orders were drawn."""
    if record is None or len(record.values) > MAX_COMPARED:
        return None
    rows = sorted(record.values.items(), key=lambda item: item[1])
    errors = [record.standard_errors.get(name) for name, _ in rows]
    figure, axes = new_figure(width=6.2, height=max(3.2, 0.42 * len(rows) + 1.5))
    values = [value for _, value in rows]
    _bars(axes, values)
    axes.axvline(0, color=INK, linewidth=1.1)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        if error is not None:
            axes.errorbar([value], [place], xerr=[error], color=INK, elinewidth=1.6, capsize=4, linestyle="")
    _beside(
        axes,
        [
            _signed(value) + (f" ± {error:.3f}" if error is not None else "")
            for value, error in zip(values, errors, strict=True)
        ],
    )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"contribution to the pooled {metric} (estimate)")
    words = "; ".join(f"{name} {value:+.3f}" for name, value in reversed(rows))
    title = "Contribution of each hospital, estimated"
    return Drawing("contributions", title, figure, f"Bars of estimated contributions to the pooled score: {words}.")


def reliability(bins: Mapping[str, ReliabilityBins]) -> Drawing | None:
    """Draw predicted probability against observed share per class, above how often each probability was given."""
    classes = list(bins.items())[:MAX_CLASSES]
    if not classes:
        return None
    figure, _ = new_figure(width=max(4.4, 3.1 * len(classes) + 0.8), height=4.3)
    figure.clear()
    grid = figure.subplots(2, len(classes), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False)
    for place, (name, one) in enumerate(classes):
        _draw_reliability(grid[0][place], grid[1][place], name, one)
    grid[0][0].set_ylabel("observed share")
    grid[1][0].set_ylabel("predictions")
    words = "; ".join(f"{name} {expected_calibration_error(one):.4f}" for name, one in classes)
    alt = f"Reliability diagrams per class, with the expected calibration error: {words}."
    return Drawing("reliability", "Does a probability come true", figure, alt)


def _draw_reliability(upper: Axes, lower: Axes, name: str, bins: ReliabilityBins) -> None:
    for axes in (upper, lower):
        dress(axes, FURTHER_SIZE)
    width = 1 / len(bins.counts)
    rows = zip(bins.counts, bins.sum_probability, bins.num_true, strict=True)
    points = [(given / count, true / count) for count, given, true in rows if count]
    upper.plot([0, 1], [0, 1], color=FAINT, linewidth=1.4, linestyle=(0, (5, 3)))
    if points:
        x, y = zip(*points, strict=True)
        upper.plot(x, y, color=FEDERATED, linewidth=2.2, marker="o", markersize=5, clip_on=False, zorder=3)
        for given, true in points:
            upper.plot([given, given], [given, true], color=LOCAL, linewidth=1.4, alpha=0.6)
    upper.set_title(f"{name}   ECE {expected_calibration_error(bins):.3f}", fontsize=10.5, color=INK)
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    centres = [(place + 0.5) * width for place in range(len(bins.counts))]
    lower.bar(centres, bins.counts, width=0.9 * width, color=FAINT)
    if max(bins.counts, default=0) > 0:
        lower.set_yscale("log")
        lower.set_ylim(bottom=0.8)
    lower.set_xlabel("predicted probability")


def rounds_to_target(summary: EvaluationSummary) -> Drawing | None:
    """Draw the mean score over rounds, federated and central, with the target and when each reached it."""
    target, curve = summary.target, summary.run.mean_curve
    if target is None or not curve:
        return None
    figure, axes = new_figure()
    name = metric_name(summary.run.metric)
    axes.axhline(target.value, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"target {target.value:g}")
    for line, colour, label, reached in (
        (summary.central_curve, CENTRAL, "central", target.central),
        (curve, FEDERATED, "federated, mean over hospitals", target.federated),
    ):
        if not line:
            continue
        x, y = zip(*line, strict=True)
        axes.plot(x, y, color=colour, linewidth=2.4, marker="o", markersize=4.5, label=label)
        if reached is not None:
            axes.plot([reached], [dict(line)[reached]], marker="o", markersize=13, markerfacecolor="none",
                      markeredgecolor=colour, markeredgewidth=2, linestyle="")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel(f"{name} on held-out patients")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9.5, labelcolor=INK,
                columnspacing=1.2, handlelength=1.5)  # fmt: skip
    reached_words = [
        f"{who} {'in round ' + str(number) if number is not None else 'never'}"
        for who, number, there in (
            ("federated", target.federated, True),
            ("central", target.central, target.has_central),
        )
        if there
    ]
    alt = f"Line chart of {name} over rounds; the target {target.value:g} was reached: {', '.join(reached_words)}."
    return Drawing("rounds_to_target", "Rounds to the target", figure, alt)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the limits of the colours: of the scores there are, a little apart where they are equal."""
    known = values[~np.isnan(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    return (low - 0.02, high + 0.02) if high - low < 0.04 else (low, high)
