"""Studies among the hospitals of a run, early stopping and the best round, on small balls in this process."""

import json
import threading

import pytest
from small_runs import balls
from typer.testing import CliRunner

from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.cli.main import app
from medfl_ray.config.files import parse_run_config
from medfl_ray.config.site import SitePolicy
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, FederationError, PrivacyConfigError
from medfl_ray.federation.stopping import best_of, why_stop
from medfl_ray.federation.studies.baselines import check_baselines
from medfl_ray.params import checksum
from medfl_ray.store.run.checkpoints import load_checkpoint
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.study_records import StoppingRecord, StudiesRecord


def tiny(num_hospitals=2, **changes):
    data = {"phantom": {"preset": "balls", "num_hospitals": num_hospitals, "patients_per_hospital": 6,
                        "size_voxels": 16, "seed": 3}, **changes.pop("data", {})}  # fmt: skip
    federation = {"rounds": 2, "pool": "local", "local_epochs": 1, **changes.pop("federation", {})}
    return balls(data=data, federation=federation, **changes)


def start(run, tmp_path, folder=None, watch=None, stop=None):
    policies = tuple(list_hospitals(run))
    folder = folder or RunFolder.create(
        run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path})})
    )
    pool = local_pool(hospital_specs(run, policies, folder.path))
    pool = Watched(pool, watch) if watch else pool
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, stop or threading.Event())
    return outcome, folder


class Watched:
    """A real pool that tells `watch` of every call by name and may be interrupted by it."""

    def __init__(self, pool, watch):
        self._pool, self._watch = pool, watch

    def __getattr__(self, name):
        found = getattr(self._pool, name)

        def call(*args, **options):
            self._watch(name, args)
            return found(*args, **options)

        return call


def studies_of(folder):
    return StudiesRecord.model_validate_json((folder.path / "studies.json").read_text())


def test_models_of_two_hospitals_are_scored_on_both(tmp_path):
    run = tiny(federation={"baselines": ["local"]}, evaluation={"cross_site": True})
    outcome, folder = start(run, tmp_path)
    assert outcome.completed
    matrix = studies_of(folder).cross_site
    baselines = json.loads((folder.path / "baselines.json").read_text())["local"]
    assert set(matrix) == {"hospital-001", "hospital-002"}
    for owner, row in matrix.items():
        assert set(row) == set(matrix)
        assert row[owner].value == pytest.approx(baselines[owner]["metrics"]["dice"]["value"])  # the diagonal is local
        assert all(metric.label == "public" and 0 <= metric.value <= 1 for metric in row.values())
    rows = list(matrix.values())
    assert rows[0]["hospital-002"] != rows[1]["hospital-002"]  # two models


def test_the_federations_of_fewer_hospitals_train_once_and_resume_from_what_is_kept(tmp_path):
    evaluation = {"leave_one_out": True, "contributions": "shapley", "truncation": 0.0}
    run = tiny(3, evaluation=evaluation)
    trained = []

    def note(name, args):
        if name == "train":
            trained.append((args[0].job, args[0].round, tuple(args[1])))

    def fail_in_the_third(name, args):
        note(name, args)
        if len({job for job, _, _ in trained if "/" in job}) == 3:
            raise KeyboardInterrupt

    _, whole = start(run, tmp_path / "whole", watch=note)
    record = studies_of(whole)
    coalitions = [entry for entry in trained if "/" in entry[0]]
    assert len(coalitions) == len(set(coalitions)) == 7 * 2  # every coalition of three but the empty one, two rounds
    assert record.problems == ()
    found = record.contributions
    assert found.all_orders
    assert found.num_orders == 6
    assert sum(found.values.values()) == pytest.approx(found.value_of_all - found.value_of_none)
    assert set(record.leave_one_out) == set(found.values)
    final = json.loads((whole.path / "evaluation.json").read_text())
    scores = [score for site in final.values() for score in site["patient_scores"]]
    assert found.value_of_all == pytest.approx(sum(scores) / len(scores))  # all together are the run itself

    trained.clear()
    with pytest.raises(KeyboardInterrupt):
        start(run, tmp_path / "halted", watch=fail_in_the_third)
    before, trained[:] = {job for job, _, _ in trained if "/" in job}, []
    halted = RunFolder.open(next((tmp_path / "halted").iterdir()))
    start(run, tmp_path, folder=halted, watch=note)
    again = {job.split("/")[1] for job, _, _ in trained if "/" in job}
    finished = {job.split("/")[1] for job in before} - again
    assert len(finished) == 2
    assert len(again) == 5
    assert studies_of(halted) == record


def test_a_study_that_cannot_be_finished_is_named_and_the_run_stands(tmp_path):
    run = tiny(evaluation={"leave_one_out": True, "cross_site": True})

    def watch(name, args):
        if name == "train" and "/coalition" in args[0].job:
            raise FederationError("the network is down")

    outcome, folder = start(run, tmp_path, watch=watch)
    assert outcome.completed
    record = studies_of(folder)
    assert record.problems == ("the network is down",)
    assert record.cross_site
    assert not record.leave_one_out


def test_early_stopping_ends_the_run_and_resumes_to_the_same(tmp_path):
    federation = {"rounds": 9, "patience": 1, "min_improvement": 0.9, "keep": "best"}
    run = tiny(federation=federation)
    outcome, folder = start(run, tmp_path / "whole")
    assert outcome.completed
    assert outcome.rounds_done == 2
    assert "ended early after round 2 of 9" in outcome.reason
    assert not outcome.reason.startswith("stopped")  # that is what a run is called that somebody stopped
    assert outcome.ending == "ended_early"
    record = StoppingRecord.model_validate_json((folder.path / "stopping.json").read_text())
    scores = [result.score for result in folder.results()]
    assert record.best_score == max(scores)
    assert record.kept_round == record.best_round == 1 + scores.index(max(scores))
    best = load_checkpoint(folder.path / "checkpoints" / f"round-{record.best_round:05d}")
    assert outcome.weights_checksum == checksum(best.weights)

    stop = threading.Event()

    def stop_in_the_first_round(name, args):
        if name == "train":
            stop.set()

    halted, other = start(run, tmp_path / "halted", watch=stop_in_the_first_round, stop=stop)
    assert not halted.completed
    resumed, _ = start(run, tmp_path, folder=other)
    assert (resumed.rounds_done, resumed.weights_checksum) == (outcome.rounds_done, outcome.weights_checksum)
    again, _ = start(run, tmp_path, folder=other)  # a run that has ended early has ended
    assert (again.rounds_done, again.reason) == (outcome.rounds_done, outcome.reason)


def test_the_best_round_is_the_first_that_none_exceeds():
    assert best_of([(1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)]) == (2, 0.7)
    assert best_of([(1, 0.5), (2, 0.52), (3, 0.58)], min_improvement=0.05) == (3, 0.58)
    assert best_of([]) is None


def test_the_central_baseline_has_a_curve_where_there_is_a_target(tmp_path):
    run = tiny(federation={"baselines": ["central"]}, evaluation={"target_dice": 0.2})
    _, folder = start(run, tmp_path)
    curve = json.loads((folder.path / "baselines.json").read_text())["central"]["curve"]
    assert sorted(curve) == ["1", "2"]
    assert all(0 <= value <= 1 for value in curve.values())


PRIVATE = [
    SitePolicy(hospital=name, data_set="d", declared="private", num_patients=50, max_epsilon=8.0) for name in "ab"
]
DP = {"enable_dp": True, "epsilon": 4.0}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"federation": {"patience": 2}}, "federation.patience would decide"),
        ({"federation": {"keep": "best"}}, "federation.keep: best would decide"),
        ({"evaluation": {"target_dice": 0.7}}, "evaluation.target_dice would decide"),
        ({"evaluation": {"leave_one_out": True}}, "could not be shown"),
        ({"evaluation": {"contributions": "shapley"}}, "could not be shown"),
        ({"evaluation": {"cross_site": True}}, "nothing of it could be shown"),
    ],
)
def test_suppressed_scores_decide_nothing(sections, words):
    def run(dp):
        raw = {"name": "r", "data": {"directory": "x", "declared": "private"}, "privacy": dp, **sections}
        return parse_run_config(raw)

    with pytest.raises(PrivacyConfigError, match=words):
        check_baselines(run(DP), PRIVATE)
    check_baselines(run({"enable_dp": False}), PRIVATE)
    shown = [policy.model_copy(update={"declared": "public"}) for policy in PRIVATE]
    check_baselines(run(DP), shown)


def test_of_some_private_hospitals_the_matrix_has_the_others(tmp_path):
    public = PRIVATE[1].model_copy(update={"declared": "public"})
    check_baselines(tiny(privacy={**DP, "extra_epsilon": 5.0}, evaluation={"cross_site": True}), [PRIVATE[0], public])
    for too_little in (None, 3.0):
        privacy = {**DP, "extra_epsilon": too_little}
        with pytest.raises(PrivacyConfigError, match="beside the run's own epsilon"):
            check_baselines(tiny(privacy=privacy, evaluation={"cross_site": True}), [PRIVATE[0], public])
    with pytest.raises(ConfigError, match="compare hospitals"):
        check_baselines(tiny(evaluation={"cross_site": True}), PRIVATE[:1])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"federation": {"pool": "virtual"}, "evaluation": {"cross_site": True}}, "pool: virtual"),
        ({"federation": {"pool": "virtual"}, "evaluation": {"metrics": ["dice", "hd95"]}}, "pool: virtual"),
        ({"evaluation": {"metrics": ["hd95"]}}, "has no dice"),
        ({"privacy": {**DP, "unit": "hospital"}, "evaluation": {"leave_one_out": True}}, "does not cover"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        parse_run_config({"name": "r", "data": {"phantom": {}}, "privacy": {"enable_dp": False}, **sections})


def test_with_dp_each_local_model_and_coalition_is_charged_once_even_when_resumed(tmp_path):
    run = tiny(
        privacy={"enable_dp": True, "noise_multiplier": 20.0, "sample_rate": 0.5},
        evaluation={"cross_site": True, "leave_one_out": True, "study_rounds": 1},
        training={"patient_group_size": 1},
    )
    _, folder = start(run, tmp_path)
    start(run, tmp_path, folder=folder)
    for export in json.loads((folder.path / "ledger.json").read_text()).values():
        jobs = [event["job"] for event in export["events"] if event["kind"] == "settle"]
        kinds = [job.partition("/")[2].partition("-")[0] for job in jobs]
        assert sorted(kinds) == ["", "", "coalition", "local", "local"]  # two rounds, one without the other, two alone


def test_the_last_evaluation_has_every_figure_with_intervals(tmp_path):
    metrics = ["dice", "precision", "recall", "volume_error", "hd95", "surface_dice"]
    run = tiny(federation={"rounds": 1}, evaluation={"metrics": metrics, "calibration": True})
    _, folder = start(run, tmp_path)
    for site in json.loads((folder.path / "evaluation.json").read_text()).values():
        assert {name for name in site["metrics"] if "/" not in name} == set(metrics)
        assert set(site["intervals"]) == set(site["metrics"])
        assert len(site["patients"]) == len(site["patient_scores"])
        for name, (low, high) in site["intervals"].items():
            assert low <= site["metrics"][name]["value"] <= high
        assert sum(site["calibration"]["ball"]["counts"]) == 16 * 16 * len(site["patients"])
    for table in folder.results()[0].metrics.values():  # what takes time is left to the last evaluation
        assert {"dice", "dice/ball"} <= set(table) <= {"dice", "dice/ball", "train_loss"}


def test_confidential_figures_leave_by_name_alone():
    from medfl_ray.federation.hospital_rules.private_answers import suppressed_evaluation

    raw = {"name": "r", "data": {"directory": "x", "declared": "private"}, "privacy": DP,
           "evaluation": {"metrics": ["dice", "hd95"], "calibration": True}}  # fmt: skip
    run = parse_run_config(raw)
    for is_last, names in ((False, {"dice", "dice/core"}), (True, {"dice", "dice/core", "hd95", "hd95/core"})):
        site = suppressed_evaluation(run, PRIVATE[0], {1: "core"}, 1, is_last)
        assert set(site.metrics) == names
        assert {metric.value for metric in site.metrics.values()} == {None}
        assert {metric.label for metric in site.metrics.values()} == {"suppressed"}
        assert site.pictures == ()
        assert {site.intervals, site.patients, site.calibration, site.patient_scores} == {None}


def test_why_stop_needs_a_score_that_may_be_shown():
    assert why_stop(tiny(federation={"patience": 1}), [], 1) == ""
    assert why_stop(tiny(), [], 1) == ""


def test_further_studies_of_a_finished_run_by_command(tmp_path):
    run = tiny()
    _, folder = start(run, tmp_path)
    folder.close()
    before = (folder.path / "model.safetensors").read_bytes()
    result = CliRunner().invoke(app, ["evaluate", str(folder.path), "--cross-site"])
    assert result.exit_code == 0, result.output
    assert set(studies_of(folder).cross_site) == {"hospital-001", "hospital-002"}
    assert (folder.path / "tables" / "cross_site.csv").is_file()
    assert (folder.path / "figures" / "cross_site.png").is_file()
    assert (folder.path / "model.safetensors").read_bytes() == before
    assert RunFolder.open(folder.path).run.evaluation.cross_site


@pytest.mark.parametrize("options", [[], ["--data", "x", "--cross-site"]])
def test_evaluate_takes_a_folder_or_studies(tmp_path, options):
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), *options])
    assert isinstance(result.exception, ConfigError)
    assert "give either --data" in str(result.exception)
