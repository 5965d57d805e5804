"""A trial is a whole federation in its folder: charged, scored, continued and never done twice."""

import json

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from search_cases import plan_of, private_run, public_images

from medfl_ray.errors import MedflError
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.events import charged_segments
from medfl_ray.store.run.receipts import read_receipts
from tune.journal import trial_folder
from tune.trainable import execute, read_failure, read_result
from tune.trial_pool import open_once

POINT = {"noise_multiplier": 3.0, "learning_rate": 0.05}


class Interrupted(BaseException):
    """Ends a trial as a kill would: nothing of it is caught."""


def test_a_trial_reports_its_rounds_and_leaves_a_result(tmp_path):
    plan, reports = plan_of(tmp_path), []
    result = execute(plan, 0, POINT, reports.append)
    assert [report["rounds"] for report in reports] == [1, 2, 3]
    assert 0 <= result.low <= result.dice <= result.high <= 1
    assert result.epsilon == result.spent == epsilon_spent([Segment(3.0, 0.5, 6)], 1e-5)
    assert read_result(trial_folder(plan.folder, 0)) == result
    sizes = (trial_folder(plan.folder, 0) / "model.safetensors").stat().st_size
    assert 0 < result.size_bytes <= 2 * 2 * 3 * sizes


def test_a_trial_that_has_ended_is_not_trained_again(tmp_path):
    plan = plan_of(tmp_path)
    first = execute(plan, 0, POINT, lambda report: None)
    before = (trial_folder(plan.folder, 0) / "metrics.jsonl").read_bytes()
    assert execute(plan, 0, POINT, lambda report: None) == first
    assert (trial_folder(plan.folder, 0) / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_trial_goes_on_from_its_checkpoint(tmp_path):
    plan = plan_of(tmp_path)

    def end_after_round_one(report):
        raise Interrupted

    with pytest.raises(Interrupted):
        execute(plan, 0, POINT, end_after_round_one)
    execute(plan, 0, POINT, lambda report: None)
    receipts, _ = read_receipts(trial_folder(plan.folder, 0) / "receipts.jsonl")
    assert [receipt.round for receipt in receipts if receipt.published] == [1, 2, 3]
    assert {receipt.attempt for receipt in receipts} == {1, 2}


def independent_epsilon(sigmas, rate, steps):
    """Compose trials by dp-accounting alone, from what was drawn."""
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    for sigma in sigmas:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
    return accountant.get_epsilon(1e-5)


def test_on_private_data_every_trial_is_charged_to_the_hospitals_own_ledger(tmp_path):
    plan = plan_of(tmp_path, private_run(tmp_path), accounting="compose", score_data=public_images(tmp_path))
    results = [
        execute(plan, number, {**POINT, "noise_multiplier": sigma}, lambda r: None)
        for number, sigma in enumerate((2.0, 3.0))
    ]
    ledger = PrivacyLedger.open(tmp_path / "state" / "north" / "ledger.sqlite", "north", "boxes", 1e-5, 40.0)
    jobs = {event.job for event in ledger.events()}
    assert jobs == {"here-000", "here-001"}
    assert ledger.spent().epsilon == epsilon_spent([Segment(sigma, 0.5, 2) for sigma in (2.0, 3.0)], 1e-5)
    assert ledger.spent().epsilon == pytest.approx(independent_epsilon((2.0, 3.0), 0.5, 2), abs=1e-9)
    assert charged_segments(ledger.events(), "here-000") == (Segment(2.0, 0.5, 1),) * 2
    assert [result.spent for result in results] == [result.epsilon for result in results]
    evaluation = json.loads((trial_folder(plan.folder, 0) / "evaluation.json").read_text())
    assert evaluation["north"]["metrics"]["dice"] == {"value": None, "label": "suppressed"}


def test_the_next_trial_of_a_process_has_the_images_that_are_prepared(tmp_path):
    plan = plan_of(tmp_path)
    runs = [plan.run_for({**POINT, "learning_rate": rate})[0] for rate in (0.05, 0.1)]
    members = (plan.run_for(POINT)[1][0].hospital,)
    assert open_once(runs[0], members) is open_once(runs[1], members)
    other = runs[0].model_copy(update={"training": runs[0].training.model_copy(update={"augment": False})})
    assert open_once(other, members) is not open_once(runs[0], members)


def test_a_trial_that_a_hospital_refuses_says_why(tmp_path):
    plan = plan_of(tmp_path, private_run(tmp_path, max_epsilon=0.5), accounting="compose", score_data="public")
    with pytest.raises(MedflError):
        execute(plan, 0, POINT, lambda report: None)
    assert "its budget is 0.5" in read_failure(trial_folder(plan.folder, 0))
