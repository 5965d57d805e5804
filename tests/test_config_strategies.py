"""Strategies that do not go with the rest of a run are refused with the reason, when the configuration is read."""

import pytest
from small_runs import small_run

from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError

SGD = {"training": {"optimizer": "sgd"}}
PATIENT = {"privacy": {"enable_dp": True, "noise_multiplier": 1.0}}
HOSPITAL = {"privacy": {"enable_dp": True, "noise_multiplier": 1.0, "unit": "hospital"}}
KEEP = {"federation": {"deadline_s": 60, "stragglers": "keep"}}
ATTACK = {"attack": {"kind": "sign_flip", "hospitals": ["hospital-1"]}}
MORE = {"federation": {"over_selection": 0.5}}


def run_of(strategy: str, aggregation: dict | None = None, **sections) -> RunConfig:
    return small_run(aggregation={"strategy": strategy, **(aggregation or {})}, **sections)


REFUSED = [
    ("fedavg", {"local_parameters": ["*.bias"]}, {}, "local_parameters does not go with strategy 'fedavg'"),
    ("fedper", {"head_steps": 2}, {}, "head_steps belongs to strategy 'fedrep'"),
    ("scaffold", {"proximal_mu": 0.1}, SGD, "proximal_mu does not go with strategy 'scaffold'"),
    ("feddyn", {"proximal_mu": 0.1}, SGD, "proximal_mu does not go with strategy 'feddyn'"),
    ("scaffold", {}, {"training": {"optimizer": "adam"}}, "set training.optimizer: sgd"),
    ("fednova", {}, {"training": {"optimizer": "adamw"}}, "which adamw does not say"),
    ("scaffold", {}, {**SGD, **KEEP}, "set stragglers: drop"),
    ("qfedavg", {}, KEEP, "set stragglers: drop"),
    ("feddyn", {}, {**SGD, **MORE}, "over_selection does not go with aggregation.strategy 'feddyn'"),
    ("qfedavg", {}, PATIENT, "sends the loss of a hospital's patients"),
    ("afl", {}, PATIENT, "sends the loss of a hospital's patients"),
    ("afl", {}, HOSPITAL, "sends the loss of a hospital's patients"),
    ("scaffold", {}, {**SGD, **HOSPITAL}, "does not go with privacy.unit: hospital"),
    ("fednova", {}, {**SGD, **HOSPITAL}, "does not go with privacy.unit: hospital"),
    ("fedbn", {}, HOSPITAL, "does not go with privacy.unit: hospital"),
    ("ditto", {}, HOSPITAL, "does not go with privacy.unit: hospital"),
    ("ditto", {}, {"federation": {"keep": "best"}}, "keep: best does not go with aggregation.strategy 'ditto'"),
    ("ditto", {}, {"evaluation": {"leave_one_out": True}}, "remembers things of the whole federation"),
    ("flower", {}, {"evaluation": {"contributions": "shapley"}}, "remembers things of the whole federation"),
    ("fedavg", {"mode": "robust"}, {"evaluation": {"contributions": "shapley"}}, "does not go with aggregation.mode"),
    ("fedavg", {}, {**ATTACK, "evaluation": {"cross_site": True}}, "do not go with attack"),
]


@pytest.mark.parametrize(("strategy", "aggregation", "sections", "reason"), REFUSED)
def test_it_is_refused_with_the_reason(strategy, aggregation, sections, reason):
    with pytest.raises(ConfigError, match=reason):
        run_of(strategy, aggregation, **sections)


@pytest.mark.parametrize(
    ("strategy", "sections"),
    [
        *((name, {**SGD, **PATIENT}) for name in ("fedprox", "scaffold", "feddyn", "fednova", "fedbn", "fedrep")),
        *((name, PATIENT) for name in ("ditto", "apfl", "fedper")),
        *((name, HOSPITAL) for name in ("fedavg", "fedadam", "fedavgm", "fedyogi", "fedprox")),
        *((name, KEEP) for name in ("fedbn", "ditto", "fedprox")),
        *((name, MORE) for name in ("fedbn", "apfl", "fedprox")),
    ],
)
def test_what_is_sound_is_accepted(strategy, sections):
    assert run_of(strategy, **sections).aggregation.strategy == strategy


def test_a_pattern_goes_with_every_strategy_that_shares_a_part():
    for strategy in ("fedbn", "silobn", "fedper", "fedrep"):
        assert run_of(strategy, {"local_parameters": ["*.bias"]}).aggregation.local_parameters == ("*.bias",)
