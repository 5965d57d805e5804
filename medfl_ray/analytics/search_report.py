"""The report of a search: one self-contained HTML file, pictures first."""

from __future__ import annotations

import math
from pathlib import Path

from medfl_ray.analytics.headline import Tile
from medfl_ray.analytics.report import render_page, write_page
from medfl_ray.analytics.search_figures import front_chart, importance_chart, parallel_chart
from medfl_ray.analytics.search_summary import NAMES, SearchSummary, TrialRow, megabytes, parameter_words, up

CHARGED = {
    "public": "nothing charged by the search",
    "compose": "every trial charged, PLD",
    "select": "the best alone released, repeat-and-select",
}


def write_search_report(path: Path, summary: SearchSummary) -> None:
    """Write a search's report.html.

    Raises:
      OSError: it cannot be written.
    """
    write_page(path, render_search_report(summary), mode=0o644)


def render_search_report(summary: SearchSummary) -> str:
    """Return the report's HTML; of a search that releases its best trial alone it shows that one and no other."""
    alone = summary.accounting == "select"
    return render_page(
        "search.html.j2",
        search=summary,
        alone=alone,
        front_chart=None if alone else front_chart(summary),
        parallel_chart=None if alone else parallel_chart(summary),
        importance_chart=None if alone else importance_chart(summary),
        headline=headline(summary),
        badges=badges(summary),
        tiles=tiles(summary),
        names=NAMES,
        varied=[name for name in summary.rows[0].parameters if name != "epsilon"] if summary.rows else [],
        rows=sorted(summary.rows, key=lambda row: (not row.on_front, not row.finished, row.epsilon)),
        privacy_facts=privacy_facts(summary),
        megabytes=megabytes,
        parameter_words=parameter_words,
        up=up,
    )


def headline(summary: SearchSummary) -> str:
    """Return what is recommended and why, in a sentence or two."""
    best = summary.best
    if best is None:
        return "No trial finished, so that nothing is recommended."
    own = ", ".join(
        f"{NAMES.get(name, name)} {parameter_words(name, value)}" for name, value in best.parameters.items()
    )
    score = f"Dice {best.dice:.3f} (95 % interval over patients {best.low:.3f} to {best.high:.3f})"
    return (
        f"Recommended: {own}. It reached {score} at epsilon {up(best.epsilon)} ({summary.terms}). {_why(summary, best)}"
    )


def _why(summary: SearchSummary, best: TrialRow) -> str:
    if summary.accounting == "select":
        return "It has the best Dice of all trials."
    if summary.wanted_dice is not None and best.dice >= summary.wanted_dice:
        return f"It is the trial with the smallest epsilon among those that reach Dice {summary.wanted_dice:g}."
    missed = f"No trial reached Dice {summary.wanted_dice:g}. " if summary.wanted_dice is not None else ""
    return (
        missed
        + "Of the trials that no other one beats it lies nearest to the smallest epsilon and the best Dice at once."
    )


def badges(summary: SearchSummary) -> list[str]:
    """Return the search's kind in a few words each."""
    if summary.accounting == "select":
        return ["random search", CHARGED["select"]]
    stopped = sum(row.state == "stopped" for row in summary.rows)
    found = [f"{len(summary.finished)} of {summary.num_trials} trials finished"]
    if stopped:
        found.append(f"{stopped} stopped early")
    if summary.failed:
        found.append(f"{len(summary.failed)} failed")
    return [*found, f"{summary.planned_rounds} rounds", CHARGED[summary.accounting]]


def tiles(summary: SearchSummary) -> list[Tile]:
    """Return the large figures of the recommended trial."""
    best = summary.best
    if best is None:
        return []
    found = [
        Tile("", "Dice", f"{best.dice:.3f}", f"{best.low:.3f} to {best.high:.3f}, on {summary.judged_on}"),
        Tile("eps", "Epsilon of the run", up(best.epsilon), summary.terms),
        Tile(
            "central",
            "Weights moved",
            f"{megabytes(best.size_bytes)} MB",
            f"{summary.planned_rounds} rounds, up and down",
        ),
    ]
    if summary.selected is not None:
        found.append(
            Tile("local", "Epsilon of the release", up(summary.selected), f"repeat-and-select; {summary.terms}")
        )
    elif summary.accounting == "compose":
        worst = max(summary.worst_case.values())
        when = "whatever the trials cost" if math.isinf(worst) else "with all that was charged before"
        found.append(Tile("local", "Worst case of the search", up(worst), f"{when}; {summary.terms}"))
    else:
        found.append(Tile("gain", "Charged by the search", "0", "synthetic or public data; the final run is charged"))
    return found


def privacy_facts(summary: SearchSummary) -> list[tuple[str, str]]:
    """Return how the search was accounted."""
    facts = [
        ("Accounting", CHARGED[summary.accounting]),
        ("Unit", "one patient with all images"),
        ("Adjacency", "add or remove one patient"),
        ("Delta", f"{summary.delta:.2g}, the largest of the hospitals"),
    ]
    for hospital, epsilon in summary.worst_case.items():
        name = "Release" if summary.accounting == "select" else "Worst case"
        facts.append((f"{name}, {hospital}", f"epsilon {up(epsilon)}"))
    return facts
