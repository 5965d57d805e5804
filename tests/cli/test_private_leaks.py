"""What a finished run on private data leaves at the coordinator: no figure of the data without a label."""

import json
import math

from cli_runs import DP, configuration, run_folders, write_config, write_patients

LABELS = {"public", "charged", "suppressed", "unprotected"}
# Every number that is no metric, by the key it stands under: settings, declarations, the ledger's own figures, and the
# coordinator's clock. None is computed from images or labels. The clock is named in docs/privacy.md as visible.
SETTINGS = {"round", "attempt", "num_steps", "total_rounds", "done", "total", "step", "patient_group_size"}
DECLARED = {"num_patients", "num_channels", "labels", "in_channels", "out_channels"}
ACCOUNTED = {"epsilon", "delta", "budget", "noise_multiplier", "sample_rate", "max_grad_norm", "sequence"}
CLOCK = {"duration_s"}
NETWORK = {"update_bytes"}  # four bytes per parameter, whatever was trained on


def documents(folder):
    """Yield (name, document) of every JSON document and of every line of a JSONL file."""
    for path in sorted(folder.rglob("*.json")):
        yield str(path.relative_to(folder)), json.loads(path.read_text())
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield str(path.relative_to(folder)), json.loads(line)


def unlabelled(document, key="", metrics=None):
    """Yield (key, number) of every number that stands in no metric; collect the metrics."""
    if isinstance(document, dict):
        if set(document) == {"value", "label"}:
            metrics.append(document)
            return
        for name, value in document.items():
            # A class index or a hospital's name is a key of its mapping, whose own name says what it holds.
            yield from unlabelled(value, key if name.isdecimal() else name, metrics)
    elif isinstance(document, list):
        for value in document:
            yield from unlabelled(value, key, metrics)
    elif isinstance(document, (int, float)) and not isinstance(document, bool):
        yield key, document


def private_figures(monkeypatch):
    """Let the trainer tell this test, and nobody else, what it computes from the patients."""
    from medfl_ray.training.trainer import Trainer

    figures = []
    train, evaluate = Trainer.train, Trainer.evaluate

    def watched_train(self, *arguments):
        outcome = train(self, *arguments)
        figures.append(outcome.mean_loss)
        return outcome

    def watched_evaluate(self, *arguments):
        scores = evaluate(self, *arguments)
        figures.extend(score.headline for score in scores)
        figures.append(sum(score.headline for score in scores) / len(scores))
        return scores

    monkeypatch.setattr(Trainer, "train", watched_train)
    monkeypatch.setattr(Trainer, "evaluate", watched_evaluate)
    return figures


def test_a_private_run_leaves_no_unlabelled_number(medfl, monkeypatch, tmp_path):
    from medfl_ray.cli.progress import RunDisplay

    events = []
    update = RunDisplay.update
    monkeypatch.setattr(RunDisplay, "update", lambda self, event: (events.append(event), update(self, event)))
    figures = private_figures(monkeypatch)
    names = ("north", "south")
    hospitals = [
        {"id": name, "directory": str(write_patients(tmp_path / name)), "num_patients": 20, "max_epsilon": 50.0}
        for name in names
    ]
    raw = configuration(
        data={"hospitals": hospitals, "labels": {1: "box"}, "channels": ["T1"], "holdout_fraction": 0.5},
        privacy={**DP, "epsilon": None, "noise_multiplier": 2.0, "extra_epsilon": 10.0},
        federation={"rounds": 2, "local_steps": 2, "baselines": ["local"]},
        output={"report": True, "export": False},
    )
    answer = medfl("run", write_config(tmp_path / "run.yaml", raw))
    assert answer.code == 0, answer
    (folder,) = run_folders()

    metrics, found = [], set()
    sources = [*documents(folder), *(("event", event.model_dump(mode="json")) for event in events)]
    for name, document in sources:
        found |= {(name, key) for key, _ in unlabelled(document, metrics=metrics)}
    allowed = SETTINGS | DECLARED | ACCOUNTED | CLOCK | NETWORK
    assert sorted(pair for pair in found if pair[1] not in allowed) == []

    assert {metric["label"] for metric in metrics} == {"suppressed"}
    assert all(metric["value"] is None for metric in metrics)
    assert len(metrics) > 4 * len(names)

    shown = [value for value in figures if math.isfinite(value) and 0.0 < value < 1e3 and value != 1.0]
    assert shown
    texts = {path.name: path.read_text() for path in folder.rglob("*") if path.suffix in (".html", ".json", ".jsonl")}
    assert {"report.html", "metrics.jsonl", "receipts.jsonl", "hospitals.json", "evaluation.json"} <= set(texts)
    for text in (*texts.values(), answer.out, answer.err):
        assert not [value for value in shown if f"{value:.4f}" in text or repr(value) in text]
    assert not list(folder.rglob("*.png"))


def test_the_search_finds_a_bare_figure_wherever_it_stands():
    metrics = []
    document = {"north": {"dice": {"value": None, "label": "suppressed"}}, "scores": [{"1": 0.7}], "ok": True}
    assert list(unlabelled(document, metrics=metrics)) == [("scores", 0.7)]
    assert metrics == [{"value": None, "label": "suppressed"}]
