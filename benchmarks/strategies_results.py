"""What the rows of strategies.py come to: the figures and the page of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import mean, stdev
from typing import Any

from harness import describe_machine

CONVERGED_ROUNDS = 160
CONVERGED_EPOCHS = 0.5
TARGET_SHARE = 0.95
"""The target of a data set, as a share of the best mean Dice that fedavg reaches on it."""


@dataclass(frozen=True)
class Row:
    """One run: Dice per hospital at its end, over the rounds, and of the baselines it had.

    `pooled` is the mean over all held-out patients, each counting once; `curve` the mean over hospitals per round.
    """

    part: str
    strategy: str
    data: str
    seed: int
    dice: dict[str, float]
    pooled: float
    curve: dict[int, float]
    local: dict[str, float] = field(default_factory=dict)
    central: dict[str, float] = field(default_factory=dict)
    num_scored: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Row:
        """Return a row as `plain` wrote it."""
        known = {one.name for one in fields(cls)}
        curve = {int(number): value for number, value in plain["curve"].items()}
        return cls(**{name: value for name, value in plain.items() if name in known} | {"curve": curve})

    def plain(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells it from others."""
        return self.part, self.strategy, self.data, self.seed

    @property
    def mean(self) -> float:
        """Mean over hospitals."""
        return mean(self.dice.values())

    @property
    def worst(self) -> float:
        """Lowest hospital."""
        return min(self.dice.values())

    @property
    def central_mean(self) -> float:
        """Central training's mean over all held-out patients."""
        total = sum(self.num_scored[hospital] for hospital in self.central)
        return sum(score * self.num_scored[hospital] for hospital, score in self.central.items()) / total


def figures_of(rows: Sequence[Row]) -> dict[str, float]:
    """Return the figures of all parts that were measured, and one per strategy and data set."""
    figures: dict[str, float] = {}
    central = {row.seed: row.central_mean for row in best_central(rows)}
    federated = {row.seed: row for row in best_federated(rows)}
    both = sorted(central.keys() & federated.keys())
    if both:
        figures["federated_minus_central_dice"] = mean(federated[s].pooled - central[s] for s in both)
    if federated:
        figures["worst_hospital_gain"] = mean(row.worst - row.local[_worst(row.dice)] for row in federated.values())
    figures |= _under_attack(rows)
    table = _grouped([row for row in rows if row.part in ("table", "others")])
    for (data, strategy), own in table.items():
        figures[f"dice[{data}][{strategy}]"] = mean(row.mean for row in own)
    shifted = {s: mean(r.mean for r in own) for (data, s), own in table.items() if data == "phantoms, scanner shift"}
    if {"fedavg", "fedbn", "ditto"} <= shifted.keys():
        best = max(shifted["fedbn"], shifted["ditto"])
        figures["best_personal_gain_where_scanners_differ"] = best - shifted["fedavg"]
    return figures


def _worst(dice: Mapping[str, float]) -> str:
    return min(dice, key=lambda hospital: dice[hospital])


def best_central(rows: Sequence[Row]) -> list[Row]:
    """Return the runs with the rate at which central training does best on the first seed, on every seed."""
    return _at_its_best(rows, lambda row: row.central_mean)


def best_federated(rows: Sequence[Row]) -> list[Row]:
    """Return the runs with the rate at which the federation does best on the first seed, on every seed."""
    return _at_its_best(rows, lambda row: row.pooled)


def _at_its_best(rows: Sequence[Row], score: Callable[[Row], float]) -> list[Row]:
    tried = [row for row in rows if row.part == "central"]
    first = min((row.seed for row in tried), default=0)
    best = max((row for row in tried if row.seed == first), key=score, default=None)
    return [] if best is None else [row for row in tried if row.strategy == best.strategy]


def _under_attack(rows: Sequence[Row]) -> dict[str, float]:
    """Return the largest mean loss of Dice over the attacks, robust and plain, against plain without an attacker.

    The attacker's own hospital is not looked at: its data may be what it attacks with.
    """
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.part == "attacks":
            honest = [dice for hospital, dice in row.dice.items() if hospital != "hospital-1"]
            by_name.setdefault(row.strategy, {})[row.seed] = mean(honest)
    clean = by_name.pop("plain, no attack", {})
    losses = {
        name: mean(clean[seed] - own[seed] for seed in own if seed in clean)
        for name, own in by_name.items()
        if own.keys() & clean.keys()
    }
    figures = {f"loss[{name}]": loss for name, loss in losses.items()}
    for figure, mode in (("robust_worst_loss", "robust"), ("fedavg_attacked_loss", "plain")):
        of_mode = [loss for name, loss in losses.items() if name.startswith(f"{mode}, ") and "no attack" not in name]
        if of_mode:
            figures[figure] = max(of_mode)
    return figures


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    data = list(dict.fromkeys(row.data for row in rows))
    for row in sorted(rows, key=lambda row: (data.index(row.data), row.part != "table", row.strategy, row.seed)):
        groups.setdefault((row.data, row.strategy), []).append(row)
    return groups


def pages(rows: Sequence[Row]) -> dict[str, str]:
    """Return the pages of tables by the ending of their names; one whose part has no rows is left out.

    Each names the machine that it was measured on, so that one part may be measured again without the others.
    """
    figures = figures_of(rows)
    texts = {
        "": ("Strategies side by side", _table_lines(rows)),
        "_central": ("Federated and central training", _central_lines(rows, figures)),
        "_attacks": ("Robust mode under attack", _attack_lines(figures)),
    }
    written = f"Written by `benchmarks/strategies.py`. {describe_machine()}."
    return {
        ending: "\n".join([f"# {title}", "", *lines, "", written]) + "\n"
        for ending, (title, lines) in texts.items()
        if lines
    }


def _table_lines(rows: Sequence[Row]) -> list[str]:
    table = _grouped([row for row in rows if row.part in ("table", "others")])
    if not table:
        return []
    lines = [
        "Dice is that of the model that a hospital ends with, on its held-out patients: with fedbn, silobn, fedper,",
        "fedrep, ditto and apfl its own. Mean, worst and spread are over hospitals, averaged over the seeds; +- is the",
        "standard deviation of the mean over seeds. Rounds to target: the first round at which the mean reaches",
        f"{TARGET_SHARE:.0%} of fedavg's best on that data set; in brackets how many seeds reached it.",
        "",
        "| data | strategy | seeds | mean Dice | worst hospital | spread | rounds to target |",
        "|---|---|---|---|---|---|---|",
    ]
    for (data, strategy), own in table.items():
        lines.append(_line(data, strategy, own, _target(table.get((data, "fedavg"), []))))
    return lines


def _target(fedavg: Sequence[Row]) -> float:
    best = [max(row.curve.values()) for row in fedavg if row.curve]
    return TARGET_SHARE * mean(best) if best else float("nan")


def _line(data: str, strategy: str, own: Sequence[Row], target: float) -> str:
    means = [row.mean for row in own]
    spread = f" +- {stdev(means):.3f}" if len(means) > 1 else ""
    reached = [min(n for n, dice in row.curve.items() if dice >= target) for row in own if _reaches(row, target)]
    rounds = f"{mean(reached):.1f} ({len(reached)})" if reached else "not reached"
    width = mean(max(row.dice.values()) - row.worst for row in own)
    worst = mean(row.worst for row in own)
    return f"| {data} | {strategy} | {len(own)} | {mean(means):.3f}{spread} | {worst:.3f} | {width:.3f} | {rounds} |"


def _reaches(row: Row, target: float) -> bool:
    return any(dice >= target for dice in row.curve.values())


def _central_lines(rows: Sequence[Row], figures: Mapping[str, float]) -> list[str]:
    federated, central = best_federated(rows), best_central(rows)
    if not federated:
        return []
    gain = figures.get("federated_minus_central_dice", float("nan"))
    return [
        f"Hippocampus, strata, {CONVERGED_ROUNDS} rounds of {CONVERGED_EPOCHS:g} epochs with a cosine schedule, and as "
        "many steps of central training;",
        "all held-out cases pooled, each at its best of three learning rates on the first seed:",
        f"federated {mean(r.pooled for r in federated):.3f} ({federated[0].strategy}), "
        f"central {mean(r.central_mean for r in central):.3f} ({central[0].strategy}), difference {gain:+.4f}.",
        f"The worst hospital gains {figures['worst_hospital_gain']:+.3f} over its own model.",
    ]


def _attack_lines(figures: Mapping[str, float]) -> list[str]:
    losses = {name[5:-1]: value for name, value in figures.items() if name.startswith("loss[")}
    if not losses:
        return []
    kinds = [name.partition(", ")[2] for name in losses if name.startswith("robust, ")]
    lines = [
        "One hostile hospital of five (hippocampus, Dirichlet 5): loss of the honest hospitals' mean Dice against",
        "plain averaging without an attacker.",
        "",
        "| attack | robust mode | plain averaging |",
        "|---|---|---|",
    ]
    for kind in kinds:
        robust, plain = losses.get(f"robust, {kind}"), losses.get(f"plain, {kind}")
        lines.append(f"| {kind} | {_number(robust)} | {_number(plain)} |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"
