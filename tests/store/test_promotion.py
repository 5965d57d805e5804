"""The promotion gate, figure by figure."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_registry import PARITY, SPENT, figure, lineage

from medfl_ray.store.registry.lineage import EpsilonSpent, PrivacyRecord
from medfl_ray.store.registry.promotion import Gate, decide

PASSES = Gate(least=0.7, tolerance=0.01, worst_hospital=0.6)


def outcome(decision, name):
    return next(check.outcome for check in decision.checks if check.name == name)


def test_a_sound_version_passes_every_check():
    decision = decide(lineage(0.8), lineage(0.805), PASSES)
    assert decision.allowed
    assert {check.outcome for check in decision.checks} == {"passed"}
    assert (decision.reasons, decision.unknown) == ((), ())


@pytest.mark.parametrize(
    ("candidate", "champion", "name"),
    [
        (lineage(0.69), None, "metric"),
        (lineage(0.8), lineage(0.82), "champion"),
        (lineage(0.8, task="classification"), lineage(0.8), "champion"),
        (lineage(0.8, hospital_metrics={"north": {"dice": figure(0.9)}, "south": {"dice": figure(0.5)}}), None,
         "worst hospital"),
        (lineage(0.8, parity=None), None, "parity"),
        (lineage(0.8, parity=PARITY.model_copy(update={"agreement": 0.99})), None, "parity"),
        (lineage(0.8, parity=PARITY.model_copy(update={"dice": 0.9})), None, "parity"),
        (lineage(0.8, parity=PARITY.model_copy(update={"num_patches": 0})), None, "parity"),
    ],
)  # fmt: skip
def test_what_fails_is_named(candidate, champion, name):
    decision = decide(candidate, champion, PASSES)
    assert not decision.allowed
    assert outcome(decision, name) == "failed"
    assert len(decision.reasons) == 1


@pytest.mark.parametrize("gap", ["epsilon", "delta", "unit", "adjacency"])
def test_an_epsilon_without_its_terms_is_no_privacy_statement(gap):
    spent = {"north": SPENT, "south": SPENT.model_copy(update={gap: None})}
    privacy = PrivacyRecord(differential_privacy=True, unit="patient", spent=spent)
    decision = decide(lineage(privacy=privacy), None, Gate())
    assert not decision.allowed
    assert "south lacks" in decision.reasons[0]
    assert gap in decision.reasons[0]


@pytest.mark.parametrize(
    ("spent", "unit"),
    [
        ({}, "patient"),
        ({"north": SPENT}, "patient"),  # south trained too
        ({"north": SPENT, "south": SPENT}, None),
        ({"federation": SPENT}, "hospital"),  # an epsilon of patients in a statement on hospitals
        ({"north": SPENT, "south": EpsilonSpent(epsilon=1, delta=1.0, unit="patient", adjacency="add_remove")},
         "patient"),
    ],
)  # fmt: skip
def test_gaps_of_the_privacy_statement_fail(spent, unit):
    privacy = PrivacyRecord(differential_privacy=True, unit=unit, spent=spent)
    assert outcome(decide(lineage(privacy=privacy), None, Gate()), "privacy") == "failed"


def test_without_differential_privacy_the_declaration_is_the_statement():
    privacy = PrivacyRecord(differential_privacy=False)
    assert decide(lineage(privacy=privacy), None, Gate()).allowed


@pytest.mark.parametrize(
    "changes",
    [
        {"differential_privacy": False},
        {"differential_privacy": True, "unit": "patient", "spent": {"north": SPENT, "south": SPENT}},
    ],
)
def test_hole_a_model_of_data_that_were_used_without_protection_is_refused(changes):
    privacy = PrivacyRecord(**changes, unprotected=("south",))
    decision = decide(lineage(privacy=privacy), None, Gate())
    assert not decision.allowed
    assert "data of south were used without patient-level protection: epsilon is infinite" in decision.reasons[0]


def test_hole_an_infinite_epsilon_is_no_privacy_statement():
    spent = {"north": SPENT, "south": SPENT.model_copy(update={"epsilon": math.inf})}
    decision = decide(
        lineage(privacy=PrivacyRecord(differential_privacy=True, unit="patient", spent=spent)), None, Gate()
    )
    assert not decision.allowed
    assert "the epsilon of south is infinite" in decision.reasons[0]
    with pytest.raises(ValueError, match="no number"):
        EpsilonSpent(epsilon=math.nan, delta=1e-5, unit="patient", adjacency="add_remove")


def test_at_hospital_level_unprotected_updates_are_named_and_the_model_passes():
    spent = {"federation": EpsilonSpent(epsilon=3, delta=1e-3, unit="hospital", adjacency="zero_out")}
    privacy = PrivacyRecord(differential_privacy=True, unit="hospital", spent=spent, unprotected=("north",))
    decision = decide(lineage(privacy=privacy), None, Gate())
    assert decision.allowed
    (check,) = (check for check in decision.checks if check.name == "privacy")
    assert "the patient-level epsilon of north is infinite (unprotected)" in check.text


def test_at_hospital_level_the_federation_has_the_epsilon():
    spent = {"federation": EpsilonSpent(epsilon=3, delta=1e-3, unit="hospital", adjacency="zero_out")}
    privacy = PrivacyRecord(differential_privacy=True, unit="hospital", spent=spent)
    assert decide(lineage(privacy=privacy), None, Gate()).allowed


def test_suppressed_figures_are_unknown_and_stop_it_unless_the_gate_says_otherwise():
    hidden = lineage(None)
    refused = decide(hidden, lineage(0.8), PASSES)
    assert not refused.allowed
    assert [check.name for check in refused.checks if check.outcome == "unknown"] == [
        "metric",
        "champion",
        "worst hospital",
    ]
    assert "suppressed" in refused.objections
    assert "public images" in refused.objections
    allowed = decide(hidden, lineage(0.8), PASSES.model_copy(update={"when_unknown": "allow"}))
    assert allowed.allowed
    assert len(allowed.unknown) == 3


def test_an_unknown_figure_never_hides_a_failure():
    hidden = lineage(None, parity=None)
    assert not decide(hidden, None, Gate(when_unknown="allow")).allowed


def test_a_hospital_below_the_floor_fails_even_where_another_is_hidden():
    tables = {"north": {"dice": figure(0.1)}, "south": {"dice": figure(None)}}
    decision = decide(lineage(0.8, hospital_metrics=tables), None, PASSES)
    assert outcome(decision, "worst hospital") == "failed"


def test_a_hospital_that_was_not_evaluated_is_unknown():
    decision = decide(lineage(0.8, hospital_metrics={"north": {"dice": figure(0.9)}}), None, PASSES)
    assert outcome(decision, "worst hospital") == "unknown"
    assert "south" in decision.unknown[0]


def test_figures_of_other_images_are_not_compared():
    decision = decide(lineage(0.8), lineage(0.5, metrics_of="12 patients of another evaluation"), Gate())
    assert outcome(decision, "champion") == "unknown"


def test_a_lower_loss_is_better():
    better = lineage(metrics={"loss": figure(0.2)})
    worse = lineage(metrics={"loss": figure(0.5)})
    gate = Gate(metric="loss", least=0.3)
    assert decide(better, worse, gate).allowed
    assert decide(worse, better, gate).reasons == (
        "loss is 0.5000 on held-out patients of north, south; it misses 0.3",
        "loss is 0.5000, the champion's 0.2000: more than 0.01 worse",
    )


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_nothing_more_than_the_tolerance_worse_ever_passes(new, old, tolerance):
    decision = decide(lineage(new), lineage(old), Gate(tolerance=tolerance))
    assert decision.allowed == (new >= old - tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gate_and_a_figure_are_finite(value):
    with pytest.raises(ValueError, match="finite"):
        Gate(least=value)
    with pytest.raises(ValueError, match="finite"):
        figure(value)
