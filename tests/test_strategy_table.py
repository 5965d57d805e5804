"""A strategy is one row and two functions: names, functions and documents agree, and an empty row permits nothing."""

from dataclasses import fields
from typing import get_args

import pytest
from small_runs import small_run

from medfl_ray.aggregation.strategies import SERVER_STRATEGIES
from medfl_ray.config.aggregation import AggregationConfig, StrategyName
from medfl_ray.config.compatibility import (
    client_algo_problem,
    hospital_level_problem,
    rule_problem,
    strategy_problem,
    study_problem,
)
from medfl_ray.config.run import RunConfig
from medfl_ray.config.strategies import STRATEGIES, StrategyTraits
from medfl_ray.training.rules.client_rules import CLIENT_RULES, average, shared_model
from medfl_ray.training.rules.kept_parameters import KEPT_BY_STRATEGY

PATIENT = {"enable_dp": True, "noise_multiplier": 1.0}
HOSPITAL = {**PATIENT, "unit": "hospital"}


def run_of_bare_row(monkeypatch, traits: StrategyTraits | None = None, **sections) -> RunConfig:
    """Return a run whose strategy has the row of a newcomer who set nothing, or what `traits` says."""
    monkeypatch.setitem(STRATEGIES, "bare", traits or StrategyTraits())
    run = small_run(**sections)
    return run.model_copy(update={"aggregation": run.aggregation.model_copy(update={"strategy": "bare"})})


def problem_of(run: RunConfig) -> str | None:
    return strategy_problem(run.aggregation, run.federation, run.privacy, run.training.optimizer)


def test_schema_and_table_have_the_same_names_in_the_same_order():
    assert list(STRATEGIES) == list(get_args(StrategyName))


@pytest.mark.parametrize("functions", [SERVER_STRATEGIES, CLIENT_RULES], ids=["server", "hospital"])
def test_every_row_has_its_function(functions):
    assert list(functions) == list(STRATEGIES)


def test_what_stays_in_the_hospital_is_named_for_every_partial_strategy():
    assert set(KEPT_BY_STRATEGY) == {name for name, traits in STRATEGIES.items() if traits.partial}


def test_a_hospital_uses_a_model_of_its_own_with_the_personal_strategies_alone():
    own = {name for name, rule in CLIENT_RULES.items() if rule.use is not shared_model}
    assert own == {name for name, traits in STRATEGIES.items() if traits.personal}


def test_a_strategy_that_trains_as_fedavg_remembers_and_reveals_nothing():
    plain = [STRATEGIES[name] for name, rule in CLIENT_RULES.items() if rule.train is average]
    assert len(plain) == 8
    assert not [traits for traits in plain if traits.stateful or traits.sends_loss or traits.needs_sgd]


def test_no_trait_is_set_until_somebody_sets_it():
    assert [field.name for field in fields(StrategyTraits) if field.default] == []


def test_rows_do_not_contradict_themselves():
    for name, row in STRATEGIES.items():
        assert not (row.sends_loss and (row.patient_dp_ok or row.hospital_level_dp_ok)), name
        assert not (row.stateful and (row.hospital_level_dp_ok or row.client_algo_ok or row.coalitions_ok)), name
        assert not (row.hospital_level_dp_ok and not row.sum_suffices), name
        assert not (row.partial and not (row.personal and row.stateful)), name
        assert not (row.head_first and not row.partial), name


def test_an_empty_row_is_refused_under_patient_level_privacy(monkeypatch):
    problem = problem_of(run_of_bare_row(monkeypatch, privacy=PATIENT))
    assert problem == (
        "aggregation.strategy 'bare' is not known to send only what the noise of patient-level differential privacy "
        "covers; switch privacy.enable_dp off, or use another strategy"
    )
    proved = run_of_bare_row(monkeypatch, StrategyTraits(patient_dp_ok=True), privacy=PATIENT)
    assert problem_of(proved) is None


def test_an_empty_row_is_refused_under_hospital_level_privacy(monkeypatch):
    run = run_of_bare_row(monkeypatch, privacy=HOSPITAL, federation={"min_clients": 1})
    problem = problem_of(run)
    assert problem is not None
    assert "does not go with privacy.unit: hospital" in problem
    refused = hospital_level_problem(run.aggregation, run.federation, run.privacy)
    assert refused is not None
    assert "needs the plain mean" in refused
    both = StrategyTraits(hospital_level_dp_ok=True, sum_suffices=True)
    proved = run_of_bare_row(monkeypatch, both, privacy=HOSPITAL, federation={"min_clients": 1})
    assert problem_of(proved) is None
    assert hospital_level_problem(proved.aggregation, proved.federation, proved.privacy) is None


@pytest.mark.parametrize("privacy", [PATIENT, HOSPITAL])
def test_a_loss_is_never_sent_beside_noise_whatever_else_a_row_permits(monkeypatch, privacy):
    traits = StrategyTraits(sends_loss=True, sum_suffices=True, patient_dp_ok=True, hospital_level_dp_ok=True)
    problem = problem_of(run_of_bare_row(monkeypatch, traits, privacy=privacy))
    assert problem is not None
    assert "sends the loss of a hospital's patients" in problem


def test_an_empty_row_takes_no_late_updates_no_coalitions_and_no_client_algos(monkeypatch):
    run = run_of_bare_row(monkeypatch, federation={"deadline_s": 60, "stragglers": "keep"})
    assert run.needs_every_update
    assert "federation.stragglers: keep" in (rule_problem(run.aggregation, run.federation) or "")
    run = run_of_bare_row(monkeypatch, evaluation={"leave_one_out": True})
    found = study_problem(run.evaluation, run.federation, run.privacy, run.aggregation, None, "segmentation")
    assert "remembers things of the whole federation" in (found or "")
    data = run.data.model_copy(update={"labels": {0: "background", 1: "ball"}, "channels": ("image",)})
    found = client_algo_problem(data, run.federation, run.privacy, run.aggregation)
    assert found == (
        "training.client_algo does not go with aggregation.strategy 'bare', which asks for more than weights; use one "
        "of fedavg, fedavgm, fedadam, fedyogi, fedadagrad, flower, custom"
    )


def test_an_empty_row_takes_no_robust_rule(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "fedavg", StrategyTraits())
    with pytest.raises(ValueError, match="'robust' does not go with strategy 'fedavg'"):
        AggregationConfig(mode="robust")
