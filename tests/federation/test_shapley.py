"""Shapley values of games whose solution is known."""

import math

import pytest

from medfl_ray.federation.studies.shapley import draw_orders, shapley_values

WEIGHTS = {"a": 0.3, "b": 0.1, "c": 0.05, "d": 0.2, "e": 0.0}


class Game:
    """A value for every coalition; counts what it was asked."""

    def __init__(self, value):
        self.value, self.asked, self.calls = value, [], 0

    def __call__(self, coalitions):
        self.calls += 1
        self.asked += coalitions
        return {coalition: self.value(coalition) for coalition in coalitions}


def additive(coalition):
    return 0.25 + sum(WEIGHTS[player] for player in coalition)


@pytest.mark.parametrize("num_orders", [7, 1000])
def test_an_additive_game_gives_the_weights(num_orders):
    game = Game(additive)
    found = shapley_values(list(WEIGHTS), game, num_orders, truncation=0.0, seed=1)
    assert found.values == pytest.approx(WEIGHTS)
    assert found.all_orders == (num_orders == 1000)
    if num_orders == 7:
        assert found.standard_errors == pytest.approx(dict.fromkeys(WEIGHTS, 0.0), abs=1e-12)
    else:
        assert set(found.standard_errors.values()) == {None}
    assert len(game.asked) == len(set(game.asked)) <= 2 ** len(WEIGHTS)
    assert game.calls <= 1 + len(WEIGHTS)  # all orders together, a size at a time


def test_the_glove_game():
    """One left glove, two right ones; a pair is worth 1: 2/3, 1/6, 1/6 (a textbook solution)."""
    found = shapley_values(["l", "r", "s"], Game(lambda c: float("l" in c and len(c) > 1)), 6, truncation=0.0, seed=0)
    assert found.values == pytest.approx({"l": 2 / 3, "r": 1 / 6, "s": 1 / 6})


def test_sampled_orders_come_close_and_say_how_close():
    players = [f"h{n}" for n in range(8)]
    found = shapley_values(players, Game(lambda c: math.sqrt(len(c))), 60, truncation=0.0, seed=3)
    assert sum(found.values.values()) == pytest.approx(math.sqrt(8))  # efficiency holds in every order
    for player in players:
        assert abs(found.values[player] - math.sqrt(8) / 8) < 4 * found.standard_errors[player]


def test_truncation_saves_coalitions_and_changes_little():
    game, whole = Game(lambda c: min(len(c), 2) / 2), Game(lambda c: min(len(c), 2) / 2)
    players = [f"h{n}" for n in range(5)]
    cut = shapley_values(players, game, 10, truncation=0.01, seed=2)
    full = shapley_values(players, whole, 10, truncation=0.0, seed=2)
    assert cut.values == pytest.approx(full.values)
    assert cut.num_truncated == 10
    assert len(game.asked) < len(whole.asked)


def test_orders_are_seeded():
    players = ["a", "b", "c", "d"]
    assert draw_orders(players, 5, 1) == draw_orders(players, 5, 1)
    assert draw_orders(players, 5, 1) != draw_orders(players, 5, 2)
    orders, complete = draw_orders(players, 24, 1)
    assert complete
    assert len(set(orders)) == 24
