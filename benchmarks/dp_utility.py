"""Dice on the hippocampus at epsilon 2, 8 and 32, fine-tuned from synthetic pretraining, beside the same without DP.

Three hospitals, three seeds, one fixed quarter of every hospital's cases for scoring; settings were chosen on other
cases (dp_utility_screen.py). Rows are kept in --out as they come, so that a second call with the same folder goes
on where the first one ended. A patient here is a case. Needs the images (see demo.py) and the label maps
(MEDFL_LABELMAPS).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from dp_utility_cases import write_case_lists
from harness import Goal, Options, benchmark, describe_machine, report
from runs import ROOT, hippocampus_folder, mean_of, run

SEEDS = (1, 2, 3)
LABELMAP_PLACES = ("data/labelmaps", "../shared/data/brain_labelmaps_synthseg")
PRETRAINING, CONFIG = "hippocampus_pretrain.yaml", "hippocampus_dp_pretrained.yaml"
# Without noise a smaller server step screened better (0.826 against 0.821): DP is compared with the best, not itself.
NO_DP = ("privacy.enable_dp=false", "aggregation.server_learning_rate=0.01")
ONE_SEED = ("pretrained", "nodp_full")
SETTINGS: dict[str, tuple[str, ...]] = {
    "nodp": NO_DP,
    "eps8": ("privacy.epsilon=8",),
    "eps2": ("privacy.epsilon=2",),
    "eps32": ("privacy.epsilon=32",),
    "nodp_full": (
        *NO_DP,
        "training.trainable=all",
        "training.batch_size=4",
        "training.optimizer=adam",
        "training.momentum=0.9",
        "training.learning_rate=0.002",
        "training.lr_schedule=cosine",
        "federation.local_steps=null",
        "federation.local_epochs=2",
        "aggregation.strategy=fedavg",
        "aggregation.server_learning_rate=1.0",
        "aggregation.ema_decay=0",
    ),
    "pretrained": (*NO_DP, "federation.rounds=1", "aggregation.server_learning_rate=1.0e-12"),
}
TITLES = {
    "pretrained": "synthetic pretraining alone",
    "nodp": "no DP, same procedure",
    "nodp_full": "no DP, all weights, Adam, 40 passes",
}
GOALS = (Goal("loss_at_eps8", at_most=0.02), Goal("loss_at_eps2", at_most=0.05))


def labelmap_folder() -> Path | None:
    """Return the folder of public label maps: MEDFL_LABELMAPS, or one of the usual places."""
    named = os.environ.get("MEDFL_LABELMAPS")
    for place in [named] if named else LABELMAP_PLACES:
        if (ROOT / place / "labels.json").is_file():
            return (ROOT / place).resolve()
    return None


def pretrained_weights(options: Options) -> Path:
    """Pretrain once per --out folder."""
    weights = (options.out / "pretrained.safetensors").resolve()
    if not weights.is_file():
        maps = labelmap_folder()
        if maps is None:
            sys.exit("no label maps: set MEDFL_LABELMAPS to a folder of whole-head label maps with labels.json")
        command = [sys.executable, "-m", "medfl_ray.cli.main", "pretrain", f"configs/{PRETRAINING}"]
        for override in (f"crops.labelmaps={maps}", f"output={weights}"):
            command += ["--set", override]
        subprocess.run([*command, *(["--set", "training.steps=20"] if options.quick else [])], cwd=ROOT, check=True)
    return weights


def measure(options: Options) -> list[dict]:
    """Run what is not in the folder yet, and return every row: setting, seed and Dice per hospital."""
    images = hippocampus_folder()
    if images is None:
        sys.exit("no hippocampus images: fetch them with 'medfl-ray data fetch hippocampus' or set MEDFL_HIPPOCAMPUS")
    weights = pretrained_weights(options)
    scoring, _ = write_case_lists(images, options.out.resolve())
    kept = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    for seed in SEEDS[:1] if options.quick else SEEDS:
        for name, overrides in SETTINGS.items():
            if (name, seed) in {(row["setting"], row["seed"]) for row in rows} or (name in ONE_SEED and seed > 1):
                continue
            common = (
                f"data.directory={scoring}",
                f"training.initial_weights={weights}",
                f"output.state_directory={options.out.resolve() / 'accounts' / f'{name}-{seed}'}",
                f"federation.seed={seed}",
                "federation.pool=local",
                "output.report=false",
                "output.export=false",
            )
            short = ["federation.rounds=1"] if options.quick else []
            finished = run(CONFIG, options.out, [*common, *overrides, *short])
            infos = finished.read("hospitals.json")
            spent = {h: export["spent"] for h, export in finished.read("ledger.json").items() if "spent" in export}
            row = {
                "setting": name,
                "seed": seed,
                "dice": finished.federated(),
                "num_patients": {hospital: info["num_patients"] for hospital, info in infos.items()},
                "spent": spent,
                "seconds": round(finished.seconds, 1),
            }
            rows.append(row)
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return rows


def figures_of(rows: Sequence[Mapping]) -> dict[str, float]:
    """Return mean and standard deviation over seeds of each setting, and what each epsilon loses."""
    figures: dict[str, float] = {}
    for name in SETTINGS:
        scores = [mean_of(row["dice"]) for row in rows if row["setting"] == name]
        if scores:
            figures[f"dice_{name}"] = mean(scores)
        if len(scores) > 1:
            figures[f"dice_{name}_spread"] = stdev(scores)
    for name in ("eps8", "eps2", "eps32"):
        if {"dice_nodp", f"dice_{name}"} <= figures.keys():
            figures[f"loss_at_{name}"] = figures["dice_nodp"] - figures[f"dice_{name}"]
    return figures


def markdown(rows: Sequence[Mapping], figures: Mapping[str, float]) -> str:
    """Return the table: mean over hospitals and seeds, spread, and each hospital's mean over seeds."""
    hospitals = sorted(rows[0]["dice"])
    sizes = rows[0]["num_patients"]
    heads = [f"{hospital} ({sizes[hospital]} training cases)" for hospital in hospitals]
    lines = [
        "| epsilon (patient, delta=1e-5, add/remove) | mean Dice | std over seeds | " + " | ".join(heads) + " |",
        "|" + "---|" * (len(heads) + 3),
    ]
    for name in ("pretrained", "eps2", "eps8", "eps32", "nodp", "nodp_full"):
        own = [row["dice"] for row in rows if row["setting"] == name]
        if own:
            spread = figures.get(f"dice_{name}_spread")
            cells = [f"{figures[f'dice_{name}']:.3f}", "-" if spread is None else f"{spread:.3f}"]
            cells += [f"{mean(dice[hospital] for dice in own):.3f}" for hospital in hospitals]
            lines.append(f"| {TITLES.get(name, name.removeprefix('eps'))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with benchmark(__doc__) as options:
        rows = measure(options)
        figures = figures_of(rows)
        (options.out / "dp_utility.md").write_text(f"{describe_machine()}\n\n{markdown(rows, figures)}\n")
        print(markdown(rows, figures))
        report(options, figures, GOALS)
