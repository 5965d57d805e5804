"""The evaluation of a run: pooled figures, models side by side, pictures and tables, and what stays suppressed."""

import csv
import json

import pytest

from medfl_ray.analytics.evaluation_figures import NAMES, drawings
from medfl_ray.analytics.evaluation_report import contribution_words, evaluation_part, target_words
from medfl_ray.analytics.evaluation_summary import Target, rounds_to, summarise_evaluation
from medfl_ray.analytics.evaluation_tables import write_tables
from medfl_ray.analytics.report import write_report
from medfl_ray.analytics.summary import summarise_run
from medfl_ray.config.files import dump_yaml, load_run_config
from medfl_ray.messages import Metric
from medfl_ray.study_records import ContributionRecord, StoppingRecord, StudiesRecord

HOSPITALS = ("charite", "leuven", "oslo", "porto")  # of conftest.write_run
LOCAL = {"charite": 0.62, "leuven": 0.60, "oslo": 0.66, "porto": 0.70}


def contribution(**changes):
    values = {"charite": 0.11, "leuven": -0.02, "oslo": 0.04, "porto": 0.07}
    record = ContributionRecord(
        method="shapley", values=values, standard_errors=dict.fromkeys(values, 0.01), num_orders=20,
        num_federations=11, rounds=3, value_of_all=0.8, value_of_none=0.6, over_patients=True,
    )  # fmt: skip
    return record.model_copy(update=changes)


def add_studies(folder, **evaluation):
    """Give a run's folder a whole evaluation, figures of two patients per hospital and every study."""
    sites = json.loads((folder / "evaluation.json").read_text())
    for place, site in enumerate(sites.values()):
        rows = [{"dice": 0.6 + 0.1 * place, "hd95": 4.0}, {"dice": 0.7 + 0.1 * place, "hd95": 2.0}]
        site |= {
            "patients": rows,
            "patient_scores": [row["dice"] for row in rows],
            "intervals": {"dice": [0.6 + 0.1 * place, 0.7 + 0.1 * place], "hd95": [2.0, 4.0]},
            "calibration": {"core": {"counts": [8, 2], "sum_probability": [0.8, 1.6], "num_true": [1.0, 1.0]}},
        }
        site["metrics"]["dice"]["value"] = 0.65 + 0.1 * place
        site["metrics"]["hd95"] = {"value": 3.0, "label": "public"}
    (folder / "evaluation.json").write_text(json.dumps(sites))
    matrix = {
        owner: {h: Metric(value=0.5 + 0.1 * (h == owner), label="public") for h in HOSPITALS} for owner in HOSPITALS
    }
    matrix["oslo"]["porto"] = Metric(value=None, label="suppressed")
    record = StudiesRecord(
        cross_site=matrix,
        leave_one_out={h: Metric(value=0.55, label="public") for h in HOSPITALS},
        contributions=contribution(),
        problems=("oslo did not score a federation",),
    )
    (folder / "studies.json").write_text(record.model_dump_json())
    stopping = StoppingRecord(
        best_round=2,
        best_score=0.61,
        last_round=4,
        kept_round=2,
        stopped_early=True,
        reason="ended early after round 4",
    )
    (folder / "stopping.json").write_text(stopping.model_dump_json())
    baselines = json.loads((folder / "baselines.json").read_text())
    baselines["central"]["curve"] = {"1": 0.3, "2": 0.55, "3": 0.7}
    (folder / "baselines.json").write_text(json.dumps(baselines))
    run = load_run_config(folder / "config.yaml")
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"target_dice": 0.5, **evaluation})})
    (folder / "config.yaml").write_text(dump_yaml(run))
    return folder


def read(folder, name):
    with (folder / "tables" / name).open() as file:
        return list(csv.DictReader(file))


def summary_of(folder):
    return summarise_evaluation(folder, summarise_run(folder))


def test_models_side_by_side_by_hand(make_run):
    summary = summary_of(add_studies(make_run()))
    rows = {row.name: row for row in summary.models}
    assert set(rows) == {"federated", "local only", "central", "federated without the hospital"}
    federated = rows["federated"]
    assert federated.mean == pytest.approx(0.8)
    assert (federated.worst, federated.low, federated.high) == ("charite", 0.65, pytest.approx(0.95))
    assert federated.deviation == pytest.approx(0.129099, abs=1e-6)
    assert federated.pooled.mean == pytest.approx(0.8)
    assert federated.pooled.count == 8
    assert federated.pooled.low < 0.8 < federated.pooled.high
    assert rows["local only"].mean == pytest.approx(sum(LOCAL.values()) / 4)
    assert rows["local only"].pooled is None  # its patients are not in the folder
    assert summary.pooled["hd95"].mean == 3.0
    assert summary.reliability["core"].counts == (32, 8)


def test_the_report_and_every_picture_in_words_and_as_a_file(make_run):
    folder = add_studies(make_run())
    text = write_report(folder).read_text()
    assert "Best mean score: 0.6100 in round 2. Kept and exported: the weights of round 2." in text
    assert "oslo did not score a federation" in text
    assert "Contributions are Shapley values, estimated from 11 federations of 3 rounds each" in text
    assert "Training again with another seed would move them" in text
    assert {path.stem for path in (folder / "figures").iterdir()} == set(NAMES)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (folder / "figures").iterdir())
    words = {drawing.name: drawing.alt for drawing in drawings(summary_of(folder))}
    assert "oslo, alone: charite 0.500, leuven 0.500, oslo 0.600, porto not shown" in words["cross_site"]
    assert "charite 0.650, gain +0.030" in words["fairness"]
    assert "charite +0.110; porto +0.070; oslo +0.040; leuven -0.020" in words["contributions"]
    assert "core 0.0800" in words["reliability"]  # (|3.2 - 4| + |6.4 - 4|) / 40
    assert "target 0.5 was reached: federated in round" in words["rounds_to_target"]


def test_tables_hold_the_same_figures(make_run):
    folder = add_studies(make_run())
    write_tables(folder, summary_of(folder))
    assert [row["hospital"] for row in read(folder, "patients.csv")] == [h for h in HOSPITALS for _ in range(2)]
    fairness = {row["hospital"]: row for row in read(folder, "fairness.csv")}
    assert float(fairness["porto"]["gain_over_local"]) == pytest.approx(0.95 - 0.70)
    cells = {(row["model_of"], row["scored_on"]): row for row in read(folder, "cross_site.csv")}
    assert len(cells) == 16
    assert (cells["oslo", "porto"]["dice"], cells["oslo", "porto"]["label"]) == ("", "suppressed")
    assert [row["standard_error"] for row in read(folder, "contributions.csv")] == ["0.01"] * 4
    assert read(folder, "rounds.csv")[1]["central"] == "0.55"
    (folder / "studies.json").unlink()
    (folder / "tables" / "my-own.txt").write_text("kept")
    write_tables(folder, summary_of(folder))
    assert not (folder / "tables" / "cross_site.csv").exists()  # of an earlier report
    assert (folder / "tables" / "my-own.txt").exists()


def test_a_run_that_ended_early_by_its_scores_is_not_called_stopped(make_run):
    folder = make_run(complete=False)
    stopping = StoppingRecord(
        best_round=2, best_score=0.6, last_round=4, kept_round=4, stopped_early=True, reason="ended early after round 4"
    )
    (folder / "stopping.json").write_text(stopping.model_dump_json())
    assert "The run stopped early" not in write_report(folder).read_text()


def test_of_private_data_there_is_no_figure_at_all(make_run):
    folder = make_run(private=True)
    part = evaluation_part(folder, summarise_run(folder))
    assert part.is_empty
    assert not (folder / "figures").exists()
    assert {path.name for path in (folder / "tables").iterdir()} == {"hospitals.csv"}
    for row in read(folder, "hospitals.csv"):
        assert (row["mean"], row["low_95"], row["patients"], row["label"]) == ("", "", "", "suppressed")


def test_words_of_contributions_say_where_an_error_comes_from():
    assert "20 random orders were used; the error bars are standard errors over them" in contribution_words(
        contribution()
    )
    everyone = contribution(all_orders=True, num_orders=24, num_truncated=3)
    assert "all 24 orders of the hospitals were used" in contribution_words(everyone)
    assert "3 of them broken off" in contribution_words(everyone)
    once = contribution(method="leave_one_out", standard_errors=dict.fromkeys(HOSPITALS))
    assert "there is no standard error" in contribution_words(once)


def test_rounds_to_a_target():
    assert rounds_to([(1, 0.2), (3, 0.5), (4, 0.4)], 0.5) == 3
    assert rounds_to([(1, 0.2)], 0.5) is None
    assert "did not reach a mean Dice of 0.5" in target_words(Target(0.5, None, 2, True))
    assert "the central model in round 2" in target_words(Target(0.5, 3, 2, True))
    assert "no central baseline" in target_words(Target(0.5, 3, None, False))
