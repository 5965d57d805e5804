"""What a search may do with private data: on whose account, from which folders, and what stays of the images."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from search_cases import plan_of, private_run, public_images, search_of

from medfl_ray.analytics.search_report import render_search_report
from medfl_ray.data.prepare.cache_folders import locked_folder
from medfl_ray.errors import BudgetExceeded, ConfigError, PrivacyConfigError
from medfl_ray.store.ledger.account import PrivacyLedger
from tune import trial_pool
from tune.journal import Journal, Result, Trial, trial_folder
from tune.report import summarise
from tune.search import Outcome, create_search, open_search, run_search
from tune.trainable import execute, own_spending

NARROW = {"noise_multiplier": {"low": 2.9, "high": 3}}
POINT = {"noise_multiplier": 3.0}
COMPOSED = {"accounting": "compose", "score_data": "public", "space": NARROW, "trials": 2}


def ledger_of(folder: Path) -> PrivacyLedger:
    (folder / "state" / "north").mkdir(parents=True, exist_ok=True, mode=0o700)
    return PrivacyLedger.open(folder / "state" / "north" / "ledger.sqlite", "north", "boxes", 1e-5, 40.0)


def with_own_file(folder: Path, **privacy) -> dict:
    """Return a private run whose hospital has a file of its own, as MEDFL_STATE_DIR has it find its ledger."""
    run = private_run(folder)
    own = {
        "hospital": {"id": "north"},
        "data": {"directory": "north", "data_set": "boxes", "declared": "private"},
        "privacy": {"num_patients": 20, "epsilon": 40.0, **privacy},
    }
    (folder / "north.yaml").write_text(yaml.safe_dump(own))
    del run["output"]
    return {**run, "data": {**run["data"], "hospitals": [{"id": "north", "site_config": str(folder / "north.yaml")}]}}


def test_hole_a_search_on_private_data_whose_epsilon_is_infinite_is_refused(tmp_path):
    ledger_of(tmp_path).mark_unprotected("earlier", "trained without differential privacy")
    search = search_of(tmp_path, private_run(tmp_path), **COMPOSED)
    with pytest.raises(BudgetExceeded, match=r"infinite \(unprotected\).*privacy.allow_unprotected"):
        create_search(search)
    assert not (tmp_path / "out").exists()


def test_hole_where_the_hospital_allows_it_the_report_says_that_its_epsilon_is_infinite(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path / "root"))
    run = with_own_file(tmp_path, enable_dp=False, allow_unprotected=True)
    home = tmp_path / "root" / "medfl-ray" / "north"
    home.mkdir(parents=True, mode=0o700)
    PrivacyLedger.open(home / "ledger.sqlite", "north", "boxes", 1e-5, 40.0).mark_unprotected("earlier", "plain")
    search = create_search(search_of(tmp_path, run, **COMPOSED))
    assert search.terms.worst_case == {"north": math.inf}
    assert "'north' is infinite (unprotected)" in search.terms.words
    assert "fitted every budget." not in search.terms.words
    html = render_search_report(summarise(Outcome(search, [], None, True)))
    assert "<dt>Worst case, north</dt><dd>epsilon infinite (unprotected)</dd>" in html


def test_hole_an_account_that_became_infinite_while_the_search_ran_is_shown_so(tmp_path):
    search = create_search(search_of(tmp_path, private_run(tmp_path), **COMPOSED))
    assert search.terms.worst_case["north"] < 40
    ledger_of(tmp_path).mark_unprotected("another", "trained without differential privacy")
    summary = summarise(Outcome(search, [finished(0)], None, True))
    assert summary.worst_case == {"north": math.inf}
    assert "'north' is infinite (unprotected)" in summary.words


def finished(number: int) -> Trial:
    result = Result(epsilon=2.0, dice=0.5, low=0.4, high=0.6, size_bytes=1e5, rounds=2, spent=2.0)
    return Trial(number=number, state="finished", parameters=POINT, result=result)


def test_hole_a_finished_search_on_private_data_is_never_said_to_have_charged_nothing(tmp_path):
    search = create_search(search_of(tmp_path, private_run(tmp_path), **COMPOSED))
    ledger_of(tmp_path)
    for number in range(2):
        Journal(search.folder).append(finished(number))
    again = open_search(search.folder)
    trials = again.journal.trials()
    summary = summarise(Outcome(again, trials, None, True))
    assert summary.worst_case == {"north": 0.0}  # the ledger is empty here; with charges it is their epsilon
    assert "Worst case, north" in render_search_report(summary)


def test_hole_the_spending_of_a_trial_that_left_an_unprotected_row_is_infinite(tmp_path):
    plan = plan_of(tmp_path, private_run(tmp_path), **COMPOSED)
    run, policies = plan.run_for(POINT)
    ledger = ledger_of(tmp_path)
    ledger.mark_unprotected("here-000", "trained without differential privacy")
    folder = trial_folder(plan.folder, 0)
    folder.mkdir(parents=True)
    (folder / "ledger.json").write_text(json.dumps({"north": ledger.export()}))
    assert own_spending(folder, run, policies, "here-000") == math.inf
    assert own_spending(folder, run, policies, "here-001") == 0


def test_hole_an_infinite_epsilon_of_a_trial_survives_its_json(tmp_path):
    result = finished(0).result.model_copy(update={"spent": math.inf})
    assert '"spent":"Infinity"' in result.model_dump_json()
    Journal(tmp_path).append(finished(0).model_copy(update={"result": result}))
    assert Journal(tmp_path).trials()[0].result == result


@pytest.mark.parametrize("privacy", [{"enable_dp": False}, {"unit": "hospital", "epsilon": 8}])
def test_hole_a_trial_without_patient_level_privacy_refuses_by_itself_and_opens_nothing(tmp_path, privacy):
    run = {**private_run(tmp_path), "privacy": privacy, "aggregation": {"weighting": "uniform"}}
    plan = plan_of(tmp_path, run, **{**COMPOSED, "space": {"learning_rate": {"low": 0.01, "high": 0.1}}})
    with pytest.raises(ConfigError, match="patient-level epsilon"):
        execute(plan, 0, {"learning_rate": 0.05}, lambda report: None)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("place", ["north", "north/inside", "."])
def test_hole_trials_are_not_judged_on_a_folder_of_private_patients(tmp_path, place):
    search = search_of(tmp_path, private_run(tmp_path), **{**COMPOSED, "score_data": place})
    with pytest.raises(PrivacyConfigError, match="score_data is the folder of the private data of hospital 'north'"):
        create_search(search)


def test_hole_trials_do_not_declare_public_what_the_final_run_declares_private(tmp_path):
    run = private_run(tmp_path)
    public = {**run["data"], "hospitals": [{"id": "x", "directory": str(tmp_path / "north"), "declared": "public"}]}
    with pytest.raises(PrivacyConfigError, match="private data of hospital 'north'"):
        create_search(search_of(tmp_path, run, data=public, trials=2, space=NARROW))


def test_hole_a_search_that_charges_nothing_is_refused_where_its_trials_stay_in_a_hospitals_ledger(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path / "root"))
    run = with_own_file(tmp_path)
    text = (tmp_path / "north.yaml").read_text()
    (tmp_path / "north.yaml").write_text(text.replace("declared: private", "declared: public"))
    with pytest.raises(PrivacyConfigError, match="a ledger that outlives the search"):
        create_search(search_of(tmp_path, run, space=NARROW))
    assert create_search(search_of(tmp_path, run, space=NARROW, accounting="compose")).terms.accounting == "compose"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's folder for temporary files, of this test alone; and no images that other tests have opened."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    trial_pool._opened.cache_clear()
    yield folder
    trial_pool._opened.cache_clear()


def without_owner(root: Path):
    """Return a folder of prepared images as a killed process leaves it, and what lets go of the rest of it."""
    folder, release = locked_folder(root)
    (folder / ".lock").unlink()
    (folder / ".lock").touch()  # a lock that nobody holds
    return folder, release


def on_disk(folder: Path, **changes) -> dict:
    run = private_run(folder, **changes)
    public_images(folder)
    return {**run, "data": {**run["data"], "cache": "disk"}}


@pytest.mark.ci
def test_hole_the_next_trial_has_the_images_that_lie_on_the_hospitals_own_disk(tmp_path, temporary):
    plan = plan_of(tmp_path, on_disk(tmp_path), **COMPOSED)
    cache = tmp_path / "state" / "north" / "cache"
    cache.mkdir(parents=True, mode=0o700)
    (tmp_path / "state" / "north").chmod(0o700)
    abandoned, release = without_owner(cache)
    np.save(abandoned / "0.image.npy", np.zeros(3))
    for number in range(2):
        assert execute(plan, number, POINT, lambda report: None).rounds == 2
        assert list(cache.glob("prepared-*/*.image.npy"))
        assert not abandoned.exists()
    assert not list(temporary.rglob("*.npy"))
    trial_pool._opened.cache_clear()
    assert not list(cache.iterdir())
    release()


def test_hole_prepared_images_of_ended_trial_processes_are_swept_and_others_are_left(tmp_path):
    ended, release = without_owner(tmp_path)
    used, release_used = locked_folder(tmp_path)
    trial_pool.sweep_after([tmp_path, tmp_path / "absent"], patience_s=0.0)
    assert (ended.exists(), used.exists()) == (False, True)
    release()
    release_used()


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_hole_a_whole_search_with_images_on_the_disk_leaves_none_there(ray_cluster, tmp_path):
    search = create_search(search_of(tmp_path, on_disk(tmp_path), **COMPOSED))
    before = set(Path(tempfile.gettempdir()).glob("medfl-ray-prepared-*"))
    outcome = run_search(search, ray_cluster.num_cpus)
    assert [trial.state for trial in outcome.trials] == ["finished", "finished"]
    assert not list((tmp_path / "state" / "north" / "cache").iterdir())
    assert set(Path(tempfile.gettempdir()).glob("medfl-ray-prepared-*")) == before
