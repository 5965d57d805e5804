"""Bad updates of every kind: each is refused with its reason, leaves nothing in the sum, and the round goes on."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import small_run

from medfl_ray import params
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.federation.screening import HUGE, Expected, why_rejected
from medfl_ray.messages import ClientFailure, ClientUpdate, RoundPlan
from medfl_ray.store.run.folder import RunFolder

LAYOUT = params.Layout(("w",), ((6,),))
PLAN = RoundPlan(
    job="job",
    round=3,
    attempt=2,
    config_hash="",
    weights_checksum="",
    hospitals=("a", "b"),
    num_steps={"a": 4, "b": 4},
    learning_rate=0.1,
    mechanisms={},
)
EXPECTED = Expected(PLAN, LAYOUT, {"a": 20, "b": 30}, weights_norm=2.0)
SOUND = np.linspace(-1, 1, 6, dtype=np.float32)


def update(**changes):
    whole = {
        "hospital": "a",
        "round": 3,
        "attempt": 2,
        "delta": SOUND,
        "layout_checksum": LAYOUT.checksum,
        "aggregation_weight": 20,
        "num_steps": 4,
        "spent": None,
    }
    return ClientUpdate(**{**whole, **changes})


def with_value(value):
    delta = SOUND.copy()
    delta[2] = value
    return delta


BAD = {
    "NaN": ({"delta": with_value(np.nan)}, "NaN"),
    "infinite": ({"delta": with_value(-np.inf)}, "infinite"),
    "both": ({"delta": np.array([np.inf, np.nan, 0, 0, 0, 0], np.float32)}, "NaN"),
    "wrong shape": ({"delta": SOUND.reshape(2, 3)}, "shape"),
    "cut off": ({"delta": SOUND[:-1]}, "cut off"),
    "wrong type": ({"delta": SOUND.astype(np.float64)}, "float64"),
    "whole numbers": ({"delta": np.ones(6, np.int32)}, "int32"),
    "no array": ({"delta": SOUND.tobytes()}, "bytes"),
    "other layout": ({"layout_checksum": params.Layout(("v",), ((6,),)).checksum}, "layout"),
    "stale round": ({"round": 2}, "of round 2"),
    "future round": ({"round": 4}, "of round 4"),
    "stale attempt": ({"attempt": 1}, "attempt 1"),
    "zero": ({"delta": np.zeros(6, np.float32)}, "zero"),
    "huge": ({"delta": with_value(2 * HUGE + 1)}, "norm"),
    "huge beyond float32": ({"delta": np.full(6, 3e38, np.float32)}, "norm"),
    "unknown hospital": ({"hospital": "stranger"}, "not asked"),
    "more weight": ({"aggregation_weight": 2000}, "weight 2000"),
    "other steps": ({"num_steps": 40}, "40 steps"),
    "duplicate": ({"hospital": "b", "aggregation_weight": 30}, "already delivered"),
}


def test_a_sound_update_is_taken():
    assert why_rejected(update(), EXPECTED, {"b"}) is None


@pytest.mark.parametrize("delta", [with_value(2 * HUGE - 2), np.full(6, 1e-30, np.float32)])
def test_what_is_only_large_or_tiny_is_taken(delta):
    assert why_rejected(update(delta=delta), EXPECTED, ()) is None


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_update_is_refused_with_its_reason(kind):
    changes, word = BAD[kind]
    assert word in (why_rejected(update(**changes), EXPECTED, {"b"}) or "")


def test_under_hospital_level_privacy_nothing_is_said_of_a_zero_update():
    expected = Expected(PLAN, LAYOUT, EXPECTED.aggregation_weights, 2.0, may_be_zero=True)
    assert why_rejected(update(delta=np.zeros(6, np.float32)), expected, ()) is None


IN_A_ROUND = {
    "NaN": (lambda one: {"delta": one.delta * np.float32(np.nan)}, "NaN"),
    "infinite": (lambda one: {"delta": np.full_like(one.delta, np.inf)}, "infinite"),
    "wrong shape": (lambda one: {"delta": one.delta.reshape(1, -1)}, "shape"),
    "cut off": (lambda one: {"delta": one.delta[: one.delta.size // 2]}, "cut off"),
    "wrong type": (lambda one: {"delta": one.delta.astype(np.float16)}, "float16"),
    "no array": (lambda one: {"delta": one.delta.tobytes()}, "bytes"),
    "other layout": (lambda one: {"layout_checksum": "x"}, "layout"),
    "stale": (lambda one: {"round": one.round - 1}, "of round 0"),
    "other attempt": (lambda one: {"attempt": 9}, "attempt 9"),
    "zero": (lambda one: {"delta": np.zeros_like(one.delta)}, "zero"),
    "huge": (lambda one: {"delta": np.full_like(one.delta, 1e6)}, "norm"),
    "unknown hospital": (lambda one: {"hospital": "stranger"}, "not asked"),
    "more weight": (lambda one: {"aggregation_weight": 10**6}, "weight"),
    "other steps": (lambda one: {"num_steps": 999}, "999 steps"),
    "altered on its way": (lambda one: {"delta": one.delta * np.float32(1.01)}, "signature"),
    "signed for another round": (lambda one: {"signature": one.signature[::-1]}, "signature"),
    "not signed": (lambda one: {"signature": ""}, "signature"),
}


def one_round(tmp_path, change):
    """Run one round in which the first hospital's answer is changed; return its receipt and the weights' checksum."""
    run = small_run(federation={"rounds": 1}, output={"directory": tmp_path, "report": False, "export": False})
    policies = tuple(list_hospitals(run))
    folder = RunFolder.create(run)
    pool = local_pool(hospital_specs(run, policies, folder.path))

    def train(plan, hospitals, weights):
        for answer in pool.train(plan, hospitals, weights):
            yield change(answer) if answer.hospital == policies[0].hospital else answer

    names = ("describe", "reserve", "release", "evaluate", "train_alone", "export_ledgers", "close")
    changed = SimpleNamespace(train=train, **{name: getattr(pool, name) for name in names})
    outcome = run_in_process(run, policies, folder.path, changed, lambda event: None, threading.Event())
    assert outcome.completed
    return folder.results()[0].receipt, outcome.weights_checksum


@pytest.fixture(scope="module")
def without_the_first(tmp_path_factory):
    """The weights of a round in which the first hospital delivers nothing."""

    def lost(answer):
        return ClientFailure(
            hospital=answer.hospital, round=answer.round, attempt=answer.attempt, stage="train", reason="lost"
        )

    return one_round(tmp_path_factory.mktemp("lost"), lost)[1]


@pytest.mark.parametrize("kind", IN_A_ROUND)
def test_the_round_goes_on_as_if_the_bad_update_had_not_come(tmp_path, without_the_first, kind):
    changes, word = IN_A_ROUND[kind]

    def spoil(answer):
        fields = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
        return ClientUpdate(**{**fields, **changes(answer)})

    receipt, weights = one_round(tmp_path, spoil)
    assert receipt.published
    assert len(receipt.trained) == 2
    assert [failure.stage for failure in receipt.failures] == ["screen"]
    assert word in receipt.failures[0].reason
    assert weights == without_the_first
