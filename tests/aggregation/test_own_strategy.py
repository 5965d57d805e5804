"""A strategy of the user's own goes through the same door as the catalogue's."""

import sys

import numpy as np
import pytest
from pydantic import ValidationError

from medfl_ray.aggregation.strategies import build_strategy
from medfl_ray.config.aggregation import AggregationConfig
from medfl_ray.errors import ConfigError

SOURCE = """
import numpy as np
from medfl_ray.aggregation.strategies import Strategy

def halving(config):
    return Strategy(lambda size: {"rounds": np.zeros(1, np.float32)},
                    lambda state, weights, update: ({"rounds": state["rounds"] + 1}, weights + update / 2))

def nothing(config):
    return "a strategy"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_strategies_of_a_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_strategies_of_a_test", None)
    return "my_strategies_of_a_test"


def test_it_turns_the_mean_update_into_weights_and_keeps_its_state(module):
    strategy = build_strategy(AggregationConfig(strategy="custom", factory=f"{module}:halving"))
    state, weights = strategy.apply(strategy.init(2), np.zeros(2, np.float32), np.array([2, 4], np.float32))
    assert weights.tolist() == [1, 2]
    assert state["rounds"].tolist() == [1]


@pytest.mark.parametrize(
    ("factory", "said"),
    [("no_such_module:f", "cannot be imported"), ("{}:absent", "cannot be imported"), ("{}:nothing", "returned a str")],
)
def test_what_is_wrong_is_said(module, factory, said):
    with pytest.raises(ConfigError, match=said):
        build_strategy(AggregationConfig(strategy="custom", factory=factory.format(module)))


def test_custom_and_its_factory_belong_together():
    with pytest.raises(ValidationError, match="belong together"):
        AggregationConfig(strategy="custom")
    with pytest.raises(ValidationError, match="belong together"):
        AggregationConfig(factory="a:b")
