"""How many hospitals are trained at once, and how they are divided."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from medfl_ray.config.model import ModelConfig
from medfl_ray.config.training import TrainingConfig
from medfl_ray.training.grouped import hospital_groups
from medfl_ray.training.grouped.group_forming import (
    MAX_GROUPS,
    PIECES_PER_ACTOR,
    STEP_COST,
    cut_into_pieces,
    form_groups,
)
from medfl_ray.training.grouped.hospital_groups import choose_hospitals_per_group, explain_hospitals_per_group
from medfl_ray.training.trainer import Trainer


def make_trainer(name: str = "unet2d", dims: int = 2, edge: int = 16, **training: object) -> Trainer:
    settings = TrainingConfig(**{"batch_size": 2, "device": "cpu", **training})  # type: ignore[arg-type]
    model = ModelConfig(type=name, features=(4, 8), spatial_dims=dims)  # type: ignore[arg-type]
    return Trainer(model, settings, "segmentation", dims, 1, 2, (edge,) * dims, False)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> float:
        raise AssertionError("measured without need")

    monkeypatch.setattr(hospital_groups, "_timing", refuse)


def pretend(monkeypatch: pytest.MonkeyPatch, per_hospital: dict[int, float]) -> list[int]:
    tried: list[int] = []

    def seconds(size: int) -> float:
        tried.append(size)
        return per_hospital[size]

    monkeypatch.setattr(hospital_groups, "_timing", lambda trainer: seconds)
    return tried


@pytest.mark.usefixtures("unmeasured")
def test_what_is_configured_is_not_measured() -> None:
    choice = explain_hospitals_per_group(make_trainer(hospitals_per_group=5))
    assert choice.size == 5
    assert "configured" in choice.reason


@pytest.mark.usefixtures("unmeasured")
def test_a_network_that_cannot_be_grouped_is_trained_in_turn_whatever_is_configured() -> None:
    trainer = make_trainer("unetr", edge=32, hospitals_per_group=5)
    choice = explain_hospitals_per_group(trainer)
    assert choice.size == choose_hospitals_per_group(trainer) == 1
    assert "has no grouped form" in choice.reason or "have no grouped form" in choice.reason


@pytest.mark.usefixtures("unmeasured")
def test_large_patients_are_never_grouped() -> None:
    choice = explain_hospitals_per_group(make_trainer("unet3d", 3, 64))
    assert choice.size == 1
    assert "voxels" in choice.reason


def test_the_fastest_size_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {1: 1e-3, 4: 6e-4, 8: 4e-4, 12: 3.9e-4, 16: 5e-4})
    choice = explain_hospitals_per_group(make_trainer())
    assert choice.size == 8  # 12 is less than 3 % faster and takes more memory
    assert "2.5 times" in choice.reason


def test_a_size_counts_with_its_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {1: 1e-3, 4: 6e-4, 8: 4e-4, 12: 5e-4, 16: 5e-4}
    tried: list[int] = []

    def disturbed(size: int) -> float:
        tried.append(size)
        return usual[size] * (1 if tried.count(size) == 3 else 5)

    monkeypatch.setattr(hospital_groups, "_timing", lambda trainer: disturbed)
    assert explain_hospitals_per_group(make_trainer()).size == 8
    assert tried[-5:] == [1, 4, 8, 12, 16]  # in turn, so that a disturbance meets every size


def test_a_small_gain_is_not_worth_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, dict.fromkeys((1, 4, 8, 12, 16), 0.97e-3) | {1: 1e-3})
    assert explain_hospitals_per_group(make_trainer()).size == 1


def test_the_measurement_is_short_and_chooses_a_candidate() -> None:
    start = time.process_time()
    assert choose_hospitals_per_group(make_trainer()) in (1, *hospital_groups.CANDIDATES)
    assert time.process_time() - start < 2 * hospital_groups.MEASURING_S


def test_slow_training_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch, {1: 2.0, 4: 0.1})
    assert explain_hospitals_per_group(make_trainer()).size == 1
    assert set(tried) == {1}
    assert len(tried) == 2


def work(groups: list[list[int]], sizes: list[tuple[int, int]], batch_size: int) -> int:
    """Steps and padded samples of groups whose hospitals make one pass over their patients."""
    return sum(
        STEP_COST * max(sizes[i][0] for i in group) + len(group) * max(sizes[i][1] for i in group) for group in groups
    )


def test_groups_hold_every_hospital_once_and_are_not_too_large() -> None:
    sizes = [(-(-n // 8), n) for n in (8 + i * 7919 % 25 for i in range(100))]
    groups = form_groups(sizes, 8, 8)
    assert sorted(itertools.chain(*groups)) == list(range(100))
    assert max(map(len, groups)) == 8
    assert work(groups, sizes, 8) < 1.03 * (sum(n for _, n in sizes) + STEP_COST * sum(s for s, _ in sizes) / 8) * 1.1


def test_no_cut_of_the_sorted_hospitals_is_better() -> None:
    sizes = [(-(-n // 8), n) for n in (8, 9, 31, 16, 8, 17, 30)]
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    found = form_groups(sizes, 3, 8)
    every_way = []
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        groups = [[order[0]]]
        for position, cut in zip(order[1:], cuts, strict=True):
            if cut:
                groups.append([])
            groups[-1].append(position)
        if max(map(len, groups)) <= 3:
            every_way.append(work(groups, sizes, 8))
    assert work(found, sizes, 8) == min(every_way)


def test_nobody_forms_no_group() -> None:
    assert form_groups([], 8, 4) == []


@pytest.mark.parametrize("num_actors", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 9, 84, 900])
def test_pieces_hold_every_group_once_and_the_last_ones_are_small(count, num_actors):
    costs = sorted(np.random.default_rng(count).uniform(1, 4, count), reverse=True)
    pieces = cut_into_pieces(costs, num_actors, evenly=False)
    assert [group for start, end in pieces for group in range(start, end)] == list(range(count))
    assert all(0 < end - start <= MAX_GROUPS for start, end in pieces)
    if num_actors > 1 and count > num_actors:
        assert [end - start for start, end in pieces[-num_actors:]] == [1] * num_actors
        assert sum(costs[slice(*pieces[0])]) <= max(costs[0], sum(costs) * 2 / (3 * num_actors))
    even = cut_into_pieces(costs, num_actors, evenly=True)
    assert [group for start, end in even for group in range(start, end)] == list(range(count))
    assert len(even) <= PIECES_PER_ACTOR * num_actors
    assert len({end - start for start, end in even[:-1]}) <= 1


def test_one_actor_that_waits_for_nobody_has_few_pieces():
    assert cut_into_pieces([1.0] * 15, 1, evenly=False) == [(0, 15)]
    assert cut_into_pieces([1.0] * 20, 1, evenly=False) == [(0, 16), (16, 20)]
