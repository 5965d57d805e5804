"""The pictures of a search: its front, its trials as lines through their parameters, and what mattered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from medfl_ray.analytics.figures import FAINT, FEDERATED, INK, LOCAL, Chart, new_figure, svg_text
from medfl_ray.analytics.search_summary import NAMES, SearchSummary, TrialRow, megabytes, parameter_words, up

COLOURS = "viridis"
MAX_CATEGORIES = 6


def front_chart(summary: SearchSummary) -> Chart | None:
    """Draw Dice over epsilon with its intervals; colour and size are the bytes moved, the line is the front."""
    rows = summary.finished
    if not rows:
        return None
    figure, axes = new_figure(10.4, 5.4)
    axes.set_xscale("log")
    sizes = [row.size_bytes / 1e6 for row in rows]
    norm = Normalize(min(sizes), max(sizes) if max(sizes) > min(sizes) else min(sizes) + 1)
    for row in rows:
        _draw_point(axes, row, norm(row.size_bytes / 1e6))
    rising = _rising(summary.front)
    axes.step(
        [row.epsilon for row in rising],
        [row.dice for row in rising],
        where="post",
        color=FEDERATED,
        linewidth=1.8,
        alpha=0.75,
        zorder=2,
    )
    for row in summary.front:
        axes.annotate(
            str(row.number),
            (row.epsilon, row.dice),
            (7, 6),
            textcoords="offset points",
            fontsize=9.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},  # else a bar runs through it
            zorder=6,
        )
    axes.set_xlabel(f"epsilon of the whole run, largest of a hospital ({summary.terms})")
    axes.set_ylabel("Dice on held-out patients, 95 % interval")
    _epsilon_ticks(axes, [row.epsilon for row in rows])
    bar = figure.colorbar(ScalarMappable(norm, colormaps[COLOURS].reversed()), ax=axes, pad=0.015, aspect=32)
    bar.set_label("MB of weights moved in the whole run", color=INK, size=10.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9.5, colors=INK, length=3)
    _front_legend(axes, any(not row.on_front for row in rows), summary.best is not None)
    words = "; ".join(
        f"trial {row.number}: epsilon {up(row.epsilon)}, Dice {row.dice:.3f} ({row.low:.3f} to {row.high:.3f}), "
        f"{megabytes(row.size_bytes)} MB"
        for row in summary.front
    )
    return Chart("The front: privacy, Dice and traffic", svg_text(figure), f"Trials on the front. {words}.")


def _draw_point(axes: Axes, row: TrialRow, share: float) -> None:
    colour = colormaps[COLOURS].reversed()(share)
    error = [[max(0.0, row.dice - row.low)], [max(0.0, row.high - row.dice)]]
    faint = 1.0 if row.on_front else 0.45
    axes.errorbar(
        [row.epsilon],
        [row.dice],
        yerr=error,
        color=INK,
        alpha=0.6 * faint,
        elinewidth=1.3,
        capsize=3,
        linestyle="",
        zorder=3,
    )
    axes.scatter(
        [row.epsilon],
        [row.dice],
        s=50 + 110 * share,
        color=[colour],
        alpha=faint,
        edgecolor=INK if row.on_front else "white",
        linewidth=1.4 if row.on_front else 0.6,
        zorder=4,
    )
    if row.recommended:
        axes.scatter([row.epsilon], [row.dice], s=430, facecolor="none", edgecolor=LOCAL, linewidth=2.4, zorder=5)


def _front_legend(axes: Axes, others: bool, recommended: bool) -> None:
    def marker(label: str, **style: object) -> Line2D:
        return Line2D([], [], linestyle="", marker="o", label=label, **style)  # type: ignore[arg-type]

    entries = [marker("on the front, with the trial's number", markersize=8, color="#5b6b7a", markeredgecolor=INK)]
    if others:
        entries.append(marker("beaten by another trial", markersize=8, color="#c4ccd4", markeredgecolor="white"))
    if recommended:
        entries.append(
            marker("recommended", markersize=13, markerfacecolor="none", markeredgecolor=LOCAL, markeredgewidth=2.2)
        )
    entries.append(Line2D([], [], color=FEDERATED, linewidth=1.8, label="best Dice within an epsilon"))
    axes.legend(
        handles=entries,
        ncols=len(entries),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        handlelength=1.4,
        columnspacing=1.4,
    )


def _rising(front: Sequence[TrialRow]) -> list[TrialRow]:
    """Return the rows of the front along which Dice rises with epsilon: traffic has no axis of its own here."""
    rising: list[TrialRow] = []
    for row in front:
        if not rising or row.dice > rising[-1].dice:
            rising.append(row)
    return rising


def _epsilon_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values) / 1.25, max(values) * 1.25
    axes.set_xlim(low, high)
    steps = [step * 10.0**power for power in range(-3, 4) for step in (1, 2, 3, 5, 8)]
    axes.set_xticks([step for step in steps if low <= step <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(7))


def parallel_chart(summary: SearchSummary) -> Chart | None:
    """Draw every finished trial as a line through its parameters and the outcome, coloured by Dice."""
    rows = summary.finished
    if len(rows) < 2:
        return None
    varied = list(rows[0].parameters)
    columns: list[tuple[str, list[float | int | str]]] = [
        (NAMES.get(name, name), [row.parameters[name] for row in rows]) for name in varied
    ]
    if "epsilon" not in varied:
        columns.append(("epsilon", [row.epsilon for row in rows]))
    columns += [("MB moved", [row.size_bytes / 1e6 for row in rows]), ("Dice", [row.dice for row in rows])]
    figure, axes = new_figure(10.4, 4.6)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    heights = np.array([_draw_axis(axes, place, values) for place, (_, values) in enumerate(columns)])
    norm = Normalize(min(row.dice for row in rows), max(row.dice for row in rows))
    for number in sorted(range(len(rows)), key=lambda index: rows[index].dice):
        row = rows[number]
        axes.plot(
            range(len(columns)),
            heights[:, number],
            color=LOCAL if row.recommended else colormaps[COLOURS].reversed()(0.1 + 0.9 * norm(row.dice)),
            linewidth=3.2 if row.recommended else 1.9 if row.on_front else 1.1,
            alpha=1.0 if row.recommended or row.on_front else 0.55,
            zorder=4 if row.recommended else 3 if row.on_front else 2,
        )
    axes.set_xticks(range(len(columns)), [name for name, _ in columns])
    axes.tick_params(axis="x", length=0, labelsize=11, pad=6)
    axes.set_yticks([])
    axes.set_xlim(-0.25, len(columns) - 0.55)
    axes.set_ylim(-0.09, 1.09)
    words = "Parallel coordinates of " + ", ".join(name for name, _ in columns) + ", one line per finished trial."
    best = summary.best
    if best is not None:
        own = ", ".join(f"{NAMES.get(n, n)} {parameter_words(n, v)}" for n, v in best.parameters.items())
        words += f" The recommended trial has {own}."
    return Chart("Every trial through its parameters (dark: good Dice; orange: recommended)", svg_text(figure), words)


def _draw_axis(axes: Axes, place: int, values: Sequence[float | int | str]) -> list[float]:
    """Draw one axis with what stands at its ends and return each trial's height on it, 0 to 1."""
    axes.plot([place, place], [0, 1], color=FAINT, linewidth=1.2, zorder=1)
    if any(isinstance(value, str) for value in values):
        names = sorted({str(value) for value in values})[:MAX_CATEGORIES]
        height = {name: number / max(1, len(names) - 1) if len(names) > 1 else 0.5 for number, name in enumerate(names)}
        for name, at in height.items():
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2}
            axes.annotate(
                name,
                (place, at),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
                bbox=box,
                zorder=6,
            )
        return [height[str(value)] for value in values]
    numbers = np.array([float(value) for value in values])
    scaled = np.log(numbers) if numbers.min() > 0 and numbers.max() / numbers.min() > 8 else numbers
    low, high = float(scaled.min()), float(scaled.max())
    for value, at, shift in ((numbers.min(), 0.0, -12), (numbers.max(), 1.0, 6)):
        axes.annotate(
            f"{value:.3g}", (place, at), (0, shift), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    return [0.5 if high == low else float((value - low) / (high - low)) for value in scaled]


def importance_chart(summary: SearchSummary) -> Chart | None:
    """Draw how much of the differences in Dice each parameter explains."""
    if not summary.importance:
        return None
    shares = sorted(summary.importance.items(), key=lambda item: item[1])
    figure, axes = new_figure(5.6, 0.46 * len(shares) + 1.2)
    axes.barh([NAMES.get(name, name) for name, _ in shares], [100 * share for _, share in shares], color=FEDERATED)
    for place, (_, share) in enumerate(shares):
        axes.annotate(
            f"{100 * share:.0f} %", (100 * share, place), (5, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_xlim(0, 118 * shares[-1][1] + 1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the differences in Dice, %")
    words = ", ".join(f"{NAMES.get(name, name)} {100 * share:.0f} %" for name, share in reversed(shares))
    return Chart("What mattered for Dice", svg_text(figure), f"Importance: {words}.")
