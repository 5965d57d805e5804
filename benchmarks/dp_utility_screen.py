"""Choose the settings of dp_utility.py: many fine-tunings in one process, judged on training patients set aside.

The three hospitals take part in every step with all their patients (q = 1), so that a round of one local SGD step
is one step on the sum over all hospitals with the noise of each: the same numbers as a run's, in less time. Nobody
who is scored in dp_utility.py is read. One seed per setting. Needs --weights FILE from medfl-ray pretrain.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from dp_utility_cases import write_case_lists
from harness import describe_machine
from runs import ROOT, hippocampus_folder

from medfl_ray.aggregation.strategies import build_strategy, released_weights
from medfl_ray.config.files import load_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.export.public_weights import load_public_weights
from medfl_ray.federation.planning import mechanisms
from medfl_ray.params import flatten, load_into
from medfl_ray.training.schedules import learning_rate
from medfl_ray.training.scoring.evaluation import summarise
from medfl_ray.training.trainer import LocalJob, Trainer

CONFIG = ROOT / "configs" / "hippocampus_dp_pretrained.yaml"


def build(run: RunConfig, for_dp: bool) -> Trainer:
    """A trainer of the run's network for three classes and one channel."""
    training = run.training.model_copy(update={"device": "cpu"})
    return Trainer(run.model, training, run.data.task, 3, 1, 3, run.patch_size, for_dp)


def fine_tune(run: RunConfig, data: dict, weights: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Run the rounds of a federation in this process; return the released weights and the mean loss per round."""
    policies = list_hospitals(run)
    planned, strategy, trainer = mechanisms(run, policies), build_strategy(run.aggregation), build(run, True)
    state, losses = strategy.init(trainer.layout.size), []
    total = sum(policy.num_patients for policy in policies)
    for number in range(1, run.federation.rounds + 1):
        mean = np.zeros(trainer.layout.size)
        rate = learning_rate(run.training, number, run.federation.rounds)
        loss = 0.0
        for index, policy in enumerate(policies):
            job = LocalJob(run.federation.local_steps or 1, rate, planned.get(policy.hospital), (1, number, index))
            outcome = trainer.train(weights, data[policy.hospital], job)
            mean += outcome.delta * (policy.num_patients / total)
            loss += outcome.mean_loss * policy.num_patients / total
        state, weights = strategy.apply(state, weights, mean.astype(np.float32))
        losses.append(loss)
    return released_weights(state, weights), losses


def score(run: RunConfig, data: dict, weights: np.ndarray) -> float:
    """Mean Dice over hospitals of the patients set aside."""
    trainer = build(run, False)
    return float(np.mean([summarise(trainer.evaluate(weights, own))["dice"] for own in data.values()]))


def gradient_norms(run: RunConfig, data: dict, weights: np.ndarray) -> list[float]:
    """Quartiles of the training patients' gradient norms at the first weights."""
    trainer, norms = build(run, True), []
    load_into(trainer.network, weights)
    assert np.array_equal(flatten(trainer.network), weights)
    rng = np.random.default_rng(0)
    for own in data.values():
        for index in range(min(12, own.num_train_patients)):
            engine = trainer._choose_engine()
            for gradient, _ in engine(iter([trainer._draw(own, index, rng)])):
                norms.append(float(torch.cat([g.flatten().double() for g in trainer._space.narrow(gradient)]).norm()))
    return [round(float(value), 4) for value in np.percentile(norms, [25, 50, 75])]


def main() -> None:
    """Try each setting of the file, or the one given by --set, and append its line to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("dp_utility_screen.jsonl"))
    parser.add_argument("--settings", type=Path, help="a file with one setting a line, as section.key=value ...")
    given = parser.parse_args()
    images = hippocampus_folder()
    if images is None:
        sys.exit("no hippocampus images: set MEDFL_HIPPOCAMPUS")
    torch.set_num_threads(1)
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        _, screening = write_case_lists(images, Path(scratch))
        common = (f"data.directory={screening}", f"training.initial_weights={given.weights}")
        data: dict = {}
        done = {json.loads(line)["setting"] for line in _lines(given.results)}
        for line in _lines(given.settings):
            if line in done:
                continue
            run = load_run_config(CONFIG, (*common, *line.split()))
            start = load_public_weights(given.weights, build(run, False).layout)
            if not data:
                data = {p.hospital: open_hospital_data(run, (p.hospital,)) for p in list_hospitals(run)}
                print(f"before fine-tuning {score(run, data, start):.4f}", flush=True)
            began = time.perf_counter()
            weights, losses = fine_tune(run, data, start)
            row = {
                "setting": line,
                "dice": round(score(run, data, weights), 4),
                "trained": build(run, True)._space.size,
                "first_norms": gradient_norms(run, data, start),
                "losses": [round(losses[i], 4) for i in (0, len(losses) // 2, -1)],
                "seconds": round(time.perf_counter() - began, 1),
            }
            print(json.dumps(row), flush=True)
            with given.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _lines(path: Path | None) -> list[str]:
    if path is None or not path.is_file():
        return []
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


if __name__ == "__main__":
    main()
