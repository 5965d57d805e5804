"""Strategies side by side: how well each fits hospitals that differ, and what is left of it under attack.

Every cell is a run of its own through the command line; its row is kept in --out as it comes, so that a second call
with the same folder goes on where the first one ended. Needs the hippocampus images (see demo.py); without them
their rows are left out and their figures not measured. Settings are those of configs/strategies_*.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import yaml
from harness import Goal, Options, benchmark, report
from runs import ROOT, hippocampus_folder, mean_of, run
from strategies_results import CONVERGED_EPOCHS, CONVERGED_ROUNDS, Row, best_central, best_federated, figures_of, pages

SEEDS = (1, 2, 3)
PARTS = ("table", "others", "central", "attacks")
PHANTOMS, HIPPOCAMPUS = "strategies_phantoms.yaml", "strategies_hippocampus.yaml"
COMPARED = ("fedavg", "fedprox", "fedadam", "scaffold", "fedbn", "ditto")
# silobn is not among them: the networks of the catalogue have no running statistics, so that it is refused.
OTHERS = ("fedavgm", "fedyogi", "fedadagrad", "fednova", "qfedavg", "afl", "feddyn", "fedper", "fedrep", "apfl")
ATTACKS = ("label_flip", "sign_flip", "gaussian", "alie", "ipm", "scaled_backdoor")
SGD = ("training.optimizer=sgd", "training.learning_rate=1.0", "training.momentum=0")
CONVERGED = (
    f"federation.rounds={CONVERGED_ROUNDS}",
    f"federation.local_epochs={CONVERGED_EPOCHS}",
    "training.lr_schedule=cosine",
    "federation.eval_every=40",
)
"""What the comparison with central training overrides: after ten rounds nobody has learnt what can be learnt here, and
who is ahead says who is quicker."""
RATES = (1.0, 2.0, 3.0)
"""Factors on the learning rate among which the federation and central training take their best, on the first seed."""
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "fedadam": ("aggregation.server_learning_rate=0.1",),
    "fedyogi": ("aggregation.server_learning_rate=0.1",),
    "fedadagrad": ("aggregation.server_learning_rate=0.1",),
    "fedavgm": ("aggregation.server_momentum=0.5",),
    # These count how far a unit of gradient has led, which Adam does not say.
    "scaffold": SGD,
    "fednova": SGD,
    "qfedavg": SGD,
}
DATA: dict[str, tuple[str, tuple[str, ...]]] = {
    "phantoms, alike": (PHANTOMS, ("data.phantom.preset=benchmarks/phantoms/alike.yaml",)),
    "phantoms, scanner shift": (PHANTOMS, ("data.phantom.preset=benchmarks/phantoms/shifted.yaml",)),
    "hippocampus, strata": (HIPPOCAMPUS, ()),
    "hippocampus, Dirichlet 8": (
        HIPPOCAMPUS,
        ("data.partition.by=dirichlet", "data.partition.field=null", "data.partition.num_hospitals=8"),
    ),
    "hippocampus, Dirichlet 5": (
        HIPPOCAMPUS,
        ("data.partition.by=dirichlet", "data.partition.field=null", "data.partition.num_hospitals=5"),
    ),
}
SHIFTED, STRATA, ATTACKED = "phantoms, scanner shift", "hippocampus, strata", "hippocampus, Dirichlet 5"
HOSTILE = "hospital-1"
GOALS = (
    Goal("federated_minus_central_dice", at_least=-0.005),
    Goal("worst_hospital_gain", at_least=0.0),
    Goal("robust_worst_loss", at_most=0.05),
    Goal("best_personal_gain_where_scanners_differ", at_least=0.0),
)


@dataclass(frozen=True)
class Cell:
    """One run: its part of the page, strategy, data and seed, and what it overrides; `rate` is a factor on the
    configuration's learning rate."""

    part: str
    strategy: str
    data: str
    seed: int
    overrides: tuple[str, ...] = ()
    baseline: str | None = None
    rate: float = 1.0

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells its row from others."""
        return self.part, self.strategy, self.data, self.seed


def cells(parts: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return all runs, those of one seed before those of the next, so that a part of them is a fair part."""
    every: list[Cell] = []
    for seed in seeds:
        if "table" in parts:
            every += [Cell("table", name, data, seed) for data in DATA if data != ATTACKED for name in COMPARED]
        if "others" in parts and seed == seeds[0]:
            every += [Cell("others", name, SHIFTED, seed) for name in OTHERS]
        if "central" in parts:
            every += list(_against_central(seed, seeds[0]))
        if "attacks" in parts:
            every += list(_attacks(seed))
    return every


def _against_central(seed: int, first: int) -> Iterable[Cell]:
    """Federated, central and local training at every rate, on the first seed; see `again_at_its_best`."""
    for factor in RATES if seed == first else ():
        yield Cell("central", f"rate x{factor:g}", STRATA, seed, CONVERGED, baseline="local,central", rate=factor)


def _attacks(seed: int) -> Iterable[Cell]:
    yield Cell("attacks", "plain, no attack", ATTACKED, seed)
    yield Cell("attacks", "robust, no attack", ATTACKED, seed, ("aggregation.mode=robust",))
    for mode in ("robust", "plain"):
        for kind in ATTACKS:
            attack = (f"attack.kind={kind}", f"attack.hospitals=[{HOSTILE}]", f"aggregation.mode={mode}")
            yield Cell("attacks", f"{mode}, {kind}", ATTACKED, seed, attack)


def overrides_of(cell: Cell, images: Path | None, quick: bool) -> tuple[str, list[str]]:
    """Return a cell's configuration and what is set beside it."""
    config, of_data = DATA[cell.data]
    given = [*of_data, f"federation.seed={cell.seed}", *cell.overrides]
    if cell.strategy in (*COMPARED, *OTHERS):
        given += [f"aggregation.strategy={cell.strategy}", *OWN_SETTINGS.get(cell.strategy, ())]
    if config == HIPPOCAMPUS:
        given.append(f"data.directory={images}")
    if quick:
        given += ["federation.rounds=1", "federation.local_steps=1", "federation.local_epochs=null"]
    if cell.rate != 1:
        given.append(f"training.learning_rate={_rate_of(config) * cell.rate}")
    return config, given


def _rate_of(config: str) -> float:
    text = (ROOT / "configs" / config).read_text(encoding="utf-8")
    return float(yaml.safe_load(text)["training"]["learning_rate"])


def measure_cell(cell: Cell, options: Options, images: Path | None) -> Row:
    """Run one cell and return its row."""
    folder = options.out / "cells" / "-".join(str(part).replace(" ", "_").replace(",", "") for part in cell.key)
    folder.mkdir(parents=True, exist_ok=True)
    config, overrides = overrides_of(cell, images, options.quick)
    finished = run(config, folder, overrides, baseline=cell.baseline)
    rounds = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = {r["round"]: mean_of(d) for r in rounds if (d := _dice_of(r["metrics"]))}
    patients = finished.patients()
    return Row(
        part=cell.part,
        strategy=cell.strategy,
        data=cell.data,
        seed=cell.seed,
        dice=finished.federated(),
        pooled=_pooled(patients),
        curve=curve,
        local=finished.local() if cell.baseline else {},
        central=finished.central() if cell.baseline else {},
        num_scored={hospital: len(scores) for hospital, scores in patients.items()},
        seconds=round(finished.seconds, 1),
    )


def _dice_of(metrics: Mapping[str, Mapping]) -> dict[str, float]:
    return {hospital: own["dice"]["value"] for hospital, own in metrics.items() if "dice" in own}


def _pooled(patients: Mapping[str, Sequence[float]]) -> float:
    scores = [score for own in patients.values() for score in own]
    return sum(scores) / len(scores) if scores else float("nan")


def measure(options: Options) -> list[Row]:
    """Run what is not in the folder yet, a few at a time, and return every row."""
    images = hippocampus_folder()
    kept = options.out / "rows.jsonl"
    rows = [Row.of(json.loads(line)) for line in kept.read_text().splitlines()] if kept.is_file() else []
    wanted = cells(options.own.parts.split(","), SEEDS[: options.own.seeds])
    done = {row.key for row in rows}
    missing = [c for c in wanted if c.key not in done and (images is not None or DATA[c.data][0] == PHANTOMS)]
    if images is None:
        print("no hippocampus images: their rows are left out (MEDFL_HIPPOCAMPUS)", file=sys.stderr)
    writing = Lock()

    def work(cell: Cell) -> None:
        row = measure_cell(cell, options, images)
        with writing:
            rows.append(row)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.plain()) + "\n")

    with ThreadPoolExecutor(options.own.workers) as pool:
        list(pool.map(work, missing))
    later = again_at_its_best(rows, wanted, SEEDS[1 : options.own.seeds])
    with ThreadPoolExecutor(options.own.workers) as pool:
        list(pool.map(work, [cell for cell in later if cell.key not in done]))
    return [row for row in rows if row.key in {cell.key for cell in (*wanted, *later)}]


def again_at_its_best(rows: Sequence[Row], wanted: Sequence[Cell], seeds: Sequence[int]) -> list[Cell]:
    """Return the comparison on further seeds: at the rate that suits the federation best on the first one, and at the
    one that suits central training best."""
    best = {row.strategy for row in (*best_central(rows), *best_federated(rows))}
    return [
        replace(cell, seed=seed)
        for cell in wanted
        if cell.part == "central" and cell.strategy in best
        for seed in seeds
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add which parts, how many seeds and how many runs at a time."""
    parser.add_argument("--parts", default=",".join(PARTS), help="parts (default: %(default)s); figures of others stay")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: %(default)s)")


def publish(rows: Sequence[Row], file: Path) -> None:
    """Write the tables of what was measured beside the file of the figures."""
    for ending, text in pages(rows).items():
        file.with_name(f"{file.stem}{ending}.md").write_text(text, encoding="utf-8")


def kept_figures(options: Options) -> dict[str, float]:
    """Return the figures of parts that were measured before and not asked for now."""
    if set(options.own.parts.split(",")) == set(PARTS) or not options.json.is_file():
        return {}
    return dict(json.loads(options.json.read_text(encoding="utf-8")))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with benchmark(__doc__, add_options=add_options) as options:
        rows = measure(options)
        figures = figures_of(rows)
        if options.json is not None and options.json.name != "-":
            publish(rows, options.json)
            figures = {**kept_figures(options), **figures}
        report(options, figures, GOALS)
