"""What a plan costs and what such a cost has bought: epsilon over rounds, and the score of finished runs against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medfl_ray.analytics.figures import FAINT, FEDERATED, GRID, HOSPITALS, INK, MAX_NAMED, metric_name
from medfl_ray.analytics.summary import Curve, summarise_run
from medfl_ray.errors import ConfigError
from medfl_ray.privacy.account import epsilon_words

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class FinishedRun:
    """One finished run as a point: what its rounds cost a hospital at most, and how well its model does.

    What baselines, studies and other runs cost is left out, because they did not make the model.
    """

    name: str
    epsilon: float
    delta: float
    score: float
    metric: str


def finished_runs(folder: Path) -> list[FinishedRun]:
    """Return the private runs in a folder whose held-out score may be shown, the cheapest first.

    A run without differential privacy, without a shown score, or whose folder cannot be read is left out.
    """
    found = []
    for config in sorted(folder.glob("*/config.yaml")):
        try:
            summary = summarise_run(config.parent)
        except ConfigError:
            continue  # another version's folder: a plan is drawn from what can be read
        parts = [account.run or account.total for account in summary.own_accounts]
        spent, score = max(parts, key=lambda part: part.epsilon, default=None), summary.federated
        is_bounded = spent is not None and math.isfinite(spent.epsilon) and summary.config.privacy.patient_level
        if is_bounded and spent is not None and score is not None:
            found.append(FinishedRun(config.parent.name, spent.epsilon, spent.delta, score.mean, summary.metric))
    return sorted(found, key=lambda run: run.epsilon)


def write_plan_figure(path: Path, curves: Mapping[str, Curve], terms: str, runs: Sequence[FinishedRun]) -> None:
    """Draw a plan into a PNG, SVG or PDF file.

    Args:
      curves: (round, epsilon) points of each hospital.
      terms: unit, delta and adjacency, for the axes.
      runs: finished runs; with none of them there is one panel.

    Raises:
      ConfigError: the file's ending is another, or it cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path.name!r} ends in {path.suffix or 'nothing'!r}; end it in {', '.join(SUFFIXES)}")
    figure = Figure(figsize=(11.0 if runs else 5.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if runs else 1, squeeze=False)[0]
    _draw_cost(panels[0], curves, terms)
    if runs:
        _draw_worth(panels[1], runs, max(curve[-1][1] for curve in curves.values()))
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"cannot write {path.name!r}: {error.strerror}; choose a folder that exists") from None


def _draw_cost(axes: Axes, curves: Mapping[str, Curve], terms: str) -> None:
    _dress(axes)
    few = len(curves) <= MAX_NAMED
    for place, (name, curve) in enumerate(curves.items()):
        x, y = zip(*curve, strict=True)
        colour = HOSPITALS[place] if few else FAINT
        axes.plot(x, y, color=colour, linewidth=2.2, marker="o", markersize=3.5, label=name if few else None)
    axes.set(xlabel="round", ylabel="epsilon", ylim=(0, None), title=f"Cost of the plan\n{terms}")
    if few and len(curves) > 1:
        axes.legend(frameon=False, labelcolor=INK)


def _draw_worth(axes: Axes, runs: Sequence[FinishedRun], planned: float) -> None:
    _dress(axes)
    axes.scatter([run.epsilon for run in runs], [run.score for run in runs], color=FEDERATED, s=45, zorder=3)
    middle = max(planned, *(run.epsilon for run in runs)) / 2
    for run in runs[:MAX_NAMED]:
        right = run.epsilon > middle  # the name stays within the panel
        offset, side = ((-7, -3), "right") if right else ((7, -3), "left")
        position = (run.epsilon, run.score)
        axes.annotate(run.name, position, offset, textcoords="offset points", ha=side, fontsize=8, color=INK)
    axes.axvline(planned, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"this plan: {epsilon_words(planned)}")
    deltas = sorted({run.delta for run in runs})
    shown = f"{deltas[0]:.2g}" if len(deltas) == 1 else f"{deltas[0]:.2g} to {deltas[-1]:.2g}"
    metric = metric_name(runs[0].metric)
    axes.set(
        xlim=(0, None),
        xlabel="epsilon of the run's rounds, largest of a hospital",
        ylabel=f"{metric} on held-out patients",
        title=f"{metric} of finished runs\nunit patient, delta {shown}, adjacency add/remove",
    )
    axes.legend(frameon=False, labelcolor=INK)


def _dress(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.title.set(size=10.5, color=INK)
