"""What crosses a hospital's boundary when its data are private: of patients, charged updates and nothing else."""

import math
from pathlib import Path

import numpy as np
import pytest
from private_hospitals import (
    Clock,
    first_weights,
    plan_for,
    private_hospital,
    private_run,
    write_manifest,
    write_patients,
)

from medfl_ray.errors import GeometryError, ModelError, PrivacyConfigError, StorageError
from medfl_ray.federation.planning import mechanism_for
from medfl_ray.federation.ports import AlonePlan, AloneResult
from medfl_ray.messages import ClientFailure, ClientUpdate, HospitalInfo, SiteEvaluation

NO_DP = {"enable_dp": False, "noise_multiplier": None, "epsilon": None}
HOSPITAL_LEVEL = {"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0, "epsilon": None}


@pytest.fixture
def folder(tmp_path):
    write_patients(tmp_path / "images", 12)
    return tmp_path / "images"


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def crafted(hospital, scale: float) -> np.ndarray:
    """Return weights under which some patients' outputs overflow."""
    return (first_weights(hospital) * np.float32(scale)).astype(np.float32)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("pictures", [False, True])
def test_hole_a_score_that_fails_is_answered_like_one_that_succeeds(tmp_path, state, task, pictures):
    write_patients(tmp_path / "images", 12, task)
    run = private_run(tmp_path / "images", task)
    hospital = private_hospital(run, state)
    honest = first_weights(hospital)
    answers = [
        hospital.evaluate(1, weights, pictures)
        for weights in (honest, np.full_like(honest, np.nan), crafted(hospital, 1e38), crafted(hospital, -1e38))
    ]
    assert isinstance(answers[0], SiteEvaluation)
    assert all(answer == answers[0] for answer in answers)
    assert {metric.value for metric in answers[0].metrics.values()} == {None}
    assert {metric.label for metric in answers[0].metrics.values()} == {"suppressed"}


@pytest.mark.parametrize("pictures", [False, True])
def test_hole_a_scoring_that_raises_is_answered_like_one_that_succeeds(folder, state, pictures, monkeypatch):
    def fail(*given):
        raise KeyError("p007")

    hospital = private_hospital(private_run(folder), state)
    honest = hospital.evaluate(1, first_weights(hospital), pictures)
    broken = private_hospital(private_run(folder), state.with_name("other"))
    monkeypatch.setattr(broken._parts.trainer, "evaluate", fail)
    answer = broken.evaluate(1, first_weights(broken), pictures)
    assert answer == honest


def test_hole_what_an_evaluation_costs_does_not_show_in_its_time(folder, state):
    clock = Clock()
    hospital = private_hospital(private_run(folder), state, clock)
    weights = first_weights(hospital)
    times = []
    for work_s in (0.0, 0.2):
        started = clock.time
        hospital._parts.trainer.evaluate = lambda *given, work_s=work_s: clock.sleep(work_s) or []
        hospital.evaluate(2, weights + np.float32(work_s), pictures=True)
        times.append(clock.time - started)
    assert times == [pytest.approx(0.25), pytest.approx(0.25)]


def test_hole_a_second_model_is_not_scored(folder, state):
    hospital = private_hospital(private_run(folder), state)
    scored = []
    evaluate = hospital._parts.trainer.evaluate
    hospital._parts.trainer.evaluate = lambda weights, data: scored.append(weights) or evaluate(weights, data)
    weights = first_weights(hospital)
    for number, model in enumerate((weights, weights + 1, weights, weights + 2)):
        hospital.evaluate(number, model, pictures=True)
        hospital.evaluate(number, model)
    assert len(scored) == 1
    again = private_hospital(private_run(folder), state)
    again._parts.trainer.evaluate = lambda weights, data: scored.append(weights) or []
    again.evaluate(1, weights + 3, pictures=True)
    assert len(scored) == 1, "a new process must not forget what was scored"


def test_the_last_scores_are_in_the_hospitals_own_report(folder, state):
    hospital = private_hospital(private_run(folder), state)
    hospital.evaluate(2, first_weights(hospital), pictures=True)
    assert list(Path(state).rglob("*.html")), "the local report was not written"


@pytest.mark.parametrize("privacy", [NO_DP, HOSPITAL_LEVEL])
def test_hole_a_declared_budget_binds_what_has_no_patient_level_privacy(folder, state, privacy):
    weighting = {"aggregation": {"weighting": "uniform"}} if privacy is HOSPITAL_LEVEL else {}
    run = private_run(folder, privacy=privacy, **weighting)
    hospital = private_hospital(run, state)
    with pytest.raises(PrivacyConfigError, match="a budget"):
        mechanism_for(run, hospital._parts.policy)
    clip = {"clip_norm": 1.0} if privacy is HOSPITAL_LEVEL else {}
    plan = plan_for(hospital, **clip)
    answers = [hospital.info(), hospital.reserve(plan), hospital.train(plan, first_weights(hospital))]
    assert all(isinstance(answer, ClientFailure) and "a budget" in answer.reason for answer in answers)
    scores = hospital.evaluate(1, first_weights(hospital))
    assert {metric.value for metric in scores.metrics.values()} == {None}
    assert hospital.export_ledger()["events"] == []


def test_hole_a_charge_binds_later_runs_without_privacy(folder, state):
    hospital = private_hospital(private_run(folder), state, max_epsilon=None)
    plan = plan_for(hospital)
    assert not isinstance(hospital.reserve(plan), ClientFailure)
    assert isinstance(hospital.train(plan, first_weights(hospital)), ClientUpdate)
    later = private_hospital(private_run(folder, privacy=NO_DP), state, job="other", max_epsilon=None)
    answer = later.train(plan_for(later, job="other"), first_weights(later))
    assert isinstance(answer, ClientFailure)
    assert "charges in its ledger" in answer.reason


@pytest.mark.parametrize("asked", ["train", "evaluate"])
def test_hole_what_leaves_without_a_charge_makes_epsilon_infinite(folder, state, asked):
    hospital = private_hospital(private_run(folder, privacy=NO_DP), state, max_epsilon=None)
    if asked == "train":
        answer = hospital.train(plan_for(hospital), first_weights(hospital))
        assert isinstance(answer, ClientUpdate)
        assert math.isinf(answer.spent.epsilon)
        assert [rows.hospital for rows in answer.spent.ledger_rows] == ["a"]
    else:
        answer = hospital.evaluate(1, first_weights(hospital))
        assert {metric.label for metric in answer.metrics.values()} == {"unprotected"}
    export = hospital.export_ledger()
    assert [row["kind"] for row in export["events"]] == ["unprotected"]
    assert float(export["spent"]["epsilon"]) == math.inf
    charged = private_hospital(private_run(folder), state, job="next", max_epsilon=None)
    refused = charged.reserve(plan_for(charged, job="next"))
    assert isinstance(refused, ClientFailure)
    assert "unprotected" in refused.reason


def test_a_policy_that_gives_protection_up_trains_and_says_so(folder, state):
    hospital = private_hospital(private_run(folder, privacy=NO_DP), state, allow_unprotected=True)
    assert isinstance(hospital.info(), HospitalInfo)
    assert isinstance(hospital.train(plan_for(hospital), first_weights(hospital)), ClientUpdate)
    assert math.isinf(hospital.info().spent.epsilon)


@pytest.mark.parametrize(
    ("job", "number", "reason"),
    [("job1", 1, "not of the run"), ("job", 3, "outside the 2 rounds"), ("job/local", 1, "does not plan")],
)
def test_hole_a_coordinator_that_renames_adds_or_repeats_gets_nothing(folder, state, job, number, reason):
    hospital = private_hospital(private_run(folder), state)
    plan = plan_for(hospital, number, job=job)
    for answer in (hospital.reserve(plan), hospital.train(plan, first_weights(hospital))):
        assert isinstance(answer, ClientFailure)
        assert reason in answer.reason
    assert hospital.export_ledger()["events"] == []


def test_hole_an_unplanned_baseline_returns_no_weights(folder, state):
    hospital = private_hospital(private_run(folder), state)
    plans = tuple(plan_for(hospital, number, job="never-planned/local") for number in (1, 2))
    answer = hospital.train_alone(AlonePlan(plans, returns_weights=True), first_weights(hospital))
    assert isinstance(answer, ClientFailure)
    assert hospital.export_ledger()["events"] == []


@pytest.mark.parametrize(("extra", "trains"), [(None, False), (0.01, False), (8.0, True)])
def test_hole_baselines_spend_the_extra_epsilon_and_no_more(folder, state, extra, trains):
    run = private_run(folder, privacy={"extra_epsilon": extra}, federation={"baselines": ["local"]})
    hospital = private_hospital(run, state)
    plans = tuple(plan_for(hospital, number, job="job/local") for number in (1, 2))
    answer = hospital.train_alone(AlonePlan(plans, returns_weights=True), first_weights(hospital))
    assert isinstance(answer, AloneResult) is trains
    if trains:
        assert {metric.value for metric in answer.metrics.values()} == {None}
        assert answer.patient_scores is None


def test_hole_a_baseline_leaves_at_a_time_of_declared_figures(folder, state):
    clock = Clock()
    run = private_run(folder, privacy={"extra_epsilon": 8.0}, federation={"baselines": ["local"]})
    hospital = private_hospital(run, state, clock)
    started = clock.time
    plans = tuple(plan_for(hospital, number, job="job/local") for number in (1, 2))
    hospital.train_alone(AlonePlan(plans), first_weights(hospital))
    assert clock.time - started == pytest.approx(0.02 * 10 * 2)


ERRORS = [
    KeyError("p007"),
    ValueError("lesion 4711"),
    OSError("7.png"),
    RuntimeError("p007"),
    GeometryError("case 4711 has three axes"),
    ModelError("p007 does not fit"),
    StorageError("the memory of 4711 cannot be read"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["train", "start"])
def test_hole_no_error_after_the_data_were_opened_tells_what_it_was(folder, state, error, stage, monkeypatch):
    from medfl_ray.data import sources

    def fail(*given, **named):
        raise error

    reasons = set()
    if stage == "start":
        monkeypatch.setattr(sources, "open_hospital_data", fail)
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the message is what matters
            private_hospital(private_run(folder), state)
        reasons.add(str(raised.value))
    else:
        hospital = private_hospital(private_run(folder), state)
        plan = plan_for(hospital)
        hospital.reserve(plan)
        monkeypatch.setattr(hospital._parts.rules, "train", fail)
        reasons.add(hospital.train(plan, first_weights(hospital)).reason)
    (reason,) = reasons
    assert type(error).__name__ not in reason
    assert not any(word in reason for word in ("p007", "4711", "7.png"))
    assert "the hospital's own log" in reason


def test_hole_one_broken_patient_more_changes_no_answer(folder, tmp_path):
    rows = write_patients(folder, 12)
    answers = []
    for name, lines in (("without", rows), ("with", [*rows, "p099,missing.png,1-mask.png"])):
        write_manifest(folder, lines)
        hospital = private_hospital(private_run(folder), tmp_path / name)
        info = hospital.info().model_copy(update={"public_key": None, "spent": None})
        scores = [hospital.evaluate(number, first_weights(hospital), number == 2) for number in (1, 2)]
        answers.append((info, scores))
    assert answers[0] == answers[1]


def test_hole_a_hospital_is_told_the_head_of_its_own_ledger_alone(folder, state):
    hospital = private_hospital(private_run(folder), state)
    heads = {"a": "1:" + "0" * 64, "b": "2:" + "1" * 64}
    assert plan_for(hospital, ledger_heads=heads).addressed_to("a").ledger_heads == {"a": heads["a"]}
    assert plan_for(hospital, ledger_heads=heads, clip_norm=1.0).addressed_to("a").ledger_heads == {"a": heads["a"]}


def test_hole_a_mechanism_in_the_plan_does_not_stand_for_noise_that_a_run_does_not_add(tmp_path, folder, state):
    """A ClientAlgo, or a hospital-level run, would send what it trained, with a charge for noise that nobody adds."""
    charged = mechanism_for(private_run(folder), private_hospital(private_run(folder), state)._parts.policy)
    run = private_run(folder, privacy=NO_DP)
    hospital = private_hospital(run, tmp_path / "other", max_epsilon=None)
    plan = plan_for(hospital, mechanisms={"a": charged.model_copy(update={"noise_multiplier": 1000.0})})
    for answer in (hospital.reserve(plan), hospital.train(plan, first_weights(hospital))):
        assert isinstance(answer, ClientFailure)
        assert "is not noised" in answer.reason
    assert hospital.export_ledger()["events"] == []


def test_hole_a_client_algo_trains_under_no_mechanism():
    from medfl_ray.errors import NotFitForDP
    from medfl_ray.training.rules.client_algo import AlgoData, AlgoTrainer
    from medfl_ray.training.rules.local_job import LocalJob

    trainer = AlgoTrainer.__new__(AlgoTrainer)
    job = LocalJob(1, 0.1, object(), (0, 0, 0))
    with pytest.raises(NotFitForDP, match="its own steps"):
        trainer.train(np.zeros(3, np.float32), AlgoData(("x",), {1: "ill"}), job)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": math.nan},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": 1000.0},
        {"noise_multiplier": math.nan},
        {"sample_rate": math.nan},
        {"delta": math.nan},
        {"noise_multiplier": -1.0},
    ],
    ids=str,
)
def test_hole_a_figure_outside_its_range_is_charged_nowhere(folder, state, changes):
    hospital = private_hospital(private_run(folder), state)
    plan = plan_for(hospital)
    bad = plan.mechanisms["a"].model_copy(update=changes)
    answer = hospital.reserve(plan.model_copy(update={"mechanisms": {"a": bad}}))
    assert isinstance(answer, ClientFailure)
    again = private_hospital(private_run(folder), state)
    assert not isinstance(again.reserve(plan_for(again)), ClientFailure), "the ledger is as it was"


def test_hole_what_leaves_without_a_charge_is_written_and_shown_before_it_leaves(folder, state):
    hospital = private_hospital(private_run(folder, privacy=NO_DP), state, max_epsilon=None)
    reserved = hospital.reserve(plan_for(hospital))
    assert math.isinf(reserved.epsilon)
    assert [row["kind"] for rows in reserved.ledger_rows for row in rows.events] == ["unprotected"]
    missing = plan_for(hospital, 2, ledger_heads={"a": "7:" + "ab" * 32})
    answer = hospital.reserve(missing)
    assert isinstance(answer, ClientFailure)
    assert "medfl-ray privacy ledger recover" in answer.reason


def test_hole_under_hospital_level_privacy_the_row_is_shown_at_the_start_and_not_by_who_is_asked(folder, state):
    run = private_run(folder, privacy=HOSPITAL_LEVEL, aggregation={"weighting": "uniform"})
    hospital = private_hospital(run, state, max_epsilon=None)
    info = hospital.info()
    assert math.isinf(info.spent.epsilon)
    assert [row["kind"] for rows in info.spent.ledger_rows for row in rows.events] == ["unprotected"]
    plan = plan_for(hospital, clip_norm=1.0)
    assert hospital.reserve(plan) is None
    assert hospital.train(plan, first_weights(hospital)).spent is None
    assert len(hospital.export_ledger()["events"]) == 1


def test_hole_a_baseline_is_none_under_the_runs_own_job_or_without_rounds(folder, state):
    hospital = private_hospital(private_run(folder), state)
    for plans in ((), (plan_for(hospital),)):
        answer = hospital.train_alone(AlonePlan(plans, returns_weights=True), first_weights(hospital))
        assert isinstance(answer, ClientFailure)
        assert "a job of its own" in answer.reason
    assert hospital.export_ledger()["events"] == []


def test_hole_a_step_that_was_too_short_stays_doubled_in_the_next_process(folder, state):
    """Else whoever asks again and again could measure how long the work takes."""
    from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes
    from medfl_ray.store.run.scoring_record import AnswerSteps

    clock = Clock()
    state.mkdir(mode=0o700)
    left = []
    for work_s in (3.0, 0.0, 0.0):
        times, started = AnswerTimes(clock.now, clock.sleep, AnswerSteps(state)), clock.time
        with times.padded("describe", 1.0):
            clock.sleep(work_s)
        left.append(clock.time - started)
    assert left == [pytest.approx(4.0)] * 3
    assert {path.stat().st_mode & 0o077 for path in state.iterdir()} == {0}


def test_hole_what_is_trained_is_what_the_signed_row_charges_whatever_a_file_of_reservations_says(folder, state):
    hospital = private_hospital(private_run(folder, privacy={"noise_multiplier": None}), state)
    plan = plan_for(hospital)
    strong = plan.mechanisms["a"].model_copy(update={"noise_multiplier": 100.0})
    assert not isinstance(hospital.reserve(plan.model_copy(update={"mechanisms": {"a": strong}})), ClientFailure)
    weak = strong.model_copy(update={"noise_multiplier": 1e-3})
    ((key, (reservation, _)),) = hospital._reservations.items()
    hospital._reservations[key] = reservation, weak
    answer = hospital.train(plan.model_copy(update={"mechanisms": {"a": weak}}), first_weights(hospital))
    assert isinstance(answer, ClientFailure)
    assert [row["kind"] for row in hospital.export_ledger()["events"]] == ["reserve"]


@pytest.mark.parametrize(
    "content", ['{"evaluate": 1', "null", "[]", '{"evaluate": Infinity}', '{"evaluate": 2000}', "x" * 9]
)
def test_hole_a_damaged_record_of_steps_decides_over_no_answer(folder, state, content):
    from medfl_ray.store.run.scoring_record import MAX_DOUBLINGS, AnswerSteps

    state.mkdir(mode=0o700)
    (state / "answer_steps.json").write_text(content)
    steps = AnswerSteps(state)
    assert steps.get("evaluate", 0) in (0, MAX_DOUBLINGS)
    steps["describe"] = 3
    assert steps["describe"] == 3


def test_hole_a_record_that_cannot_be_written_neither_fails_nor_hastens_an_answer(folder, state, monkeypatch):
    from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes
    from medfl_ray.store.run import scoring_record

    def full(*given, **named):
        raise StorageError("the disk is full")

    clock = Clock()
    state.mkdir(mode=0o700)
    monkeypatch.setattr(scoring_record, "replace_file", full)
    times = AnswerTimes(clock.now, clock.sleep, scoring_record.AnswerSteps(state))
    left = []
    for work_s in (0.3, 3.0):
        started = clock.time
        with times.padded("evaluate", 1.0):
            clock.sleep(work_s)
        left.append(clock.time - started)
    assert left == [pytest.approx(1.0), pytest.approx(4.0)]


def test_hole_who_asks_for_a_baseline_does_not_choose_the_step_of_its_answer(folder, state):
    run = private_run(folder, privacy={"extra_epsilon": 8.0}, federation={"baselines": ["local"]})
    clock = Clock()
    hospital = private_hospital(run, state, clock)
    once = plan_for(hospital, job="job/local")
    times = []
    for plans in ((once,), (once,) * 7):
        started = clock.time
        answer = hospital.train_alone(AlonePlan(plans), first_weights(hospital))
        times.append(clock.time - started)
    assert times[0] == times[1] == pytest.approx(0.02 * 10 * 2)
    assert isinstance(answer, ClientFailure)
    assert "one of them twice" in answer.reason


@pytest.mark.parametrize("privacy", [{}, NO_DP])
def test_hole_a_job_with_an_empty_kind_is_no_job_of_the_run(folder, state, privacy):
    run = private_run(folder, privacy=privacy or {"extra_epsilon": 4.0})
    hospital = private_hospital(run, state, max_epsilon=None)
    answer = hospital.train_alone(AlonePlan((plan_for(hospital, job="job/"),), True), first_weights(hospital))
    assert isinstance(answer, ClientFailure)
    assert "does not plan" in answer.reason


def test_hole_a_hospital_that_only_scores_shows_its_row_at_the_start(folder, state):
    hospital = private_hospital(private_run(folder, privacy=NO_DP), state, max_epsilon=None)
    info = hospital.info()
    assert math.isinf(info.spent.epsilon)
    assert [row["kind"] for rows in info.spent.ledger_rows for row in rows.events] == ["unprotected"]
