"""Actors stay on their hospital's node, the others are spread or packed, and all of them fit at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.placement import PIN, gpu_share, place_actors, plan_simulation_actors
from medfl_ray.errors import ClusterError, ConfigError

PROCESS = Path(__file__).parent / "two_nodes.py"


def test_an_actor_is_pinned_to_its_hospitals_node_and_shares_its_gpu():
    nodes = [
        {"CPU": 4.0},
        {"CPU": 8.0, "GPU": 1.0, "hospital:a": 1.0, "hospital:b": 1.0},
        {"CPU": 2.0, "hospital:c": 1},
    ]
    places = place_actors([("a",), ("b",), ("c",)], nodes)
    assert places["a",].options()["resources"] == {"hospital:a": PIN}
    assert (places["a",].num_gpus, places["a",].num_cpus) == (0.5, 1.0)
    assert places["c",].num_gpus == 0.0  # its node has none; asking for one would wait for ever
    assert places["c",].num_cpus == 1.0
    assert places["c",].options()["max_task_retries"] == 0


def test_actors_without_a_node_are_spread_or_packed():
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}]
    groups = [("a",), ("b",), ("c",)]
    assert {place.strategy for place in place_actors(groups, nodes).values()} == {"SPREAD"}
    assert {place.strategy for place in place_actors(groups, nodes, "pack").values()} == {"DEFAULT"}
    # Three actors on two GPUs: two thirds each would leave the third without a GPU that has so much left.
    assert {place.num_gpus for place in place_actors(groups, nodes).values()} == {0.5}
    assert place_actors(groups, nodes, gpus_per_actor=0.25)["b",].num_gpus == 0.25
    assert place_actors(groups, [{"CPU": 4.0}], gpus_per_actor=0.25)["b",].num_gpus == 0.0
    assert place_actors(groups, nodes)["a",].options()["resources"] is None


def test_no_actor_needs_parts_of_two_gpus():
    assert [gpu_share(count, 2.0) for count in (1, 2, 3, 4, 5, 16)] == [1.0, 1.0, 0.5, 0.5, 0.3333, 0.125]


def test_hospitals_of_two_nodes_do_not_share_an_actor():
    nodes = [{"CPU": 1.0, "hospital:a": 1.0}, {"CPU": 1.0, "hospital:b": 1.0}]
    with pytest.raises(ClusterError, match=r"a, b are to share an actor.*num_actors"):
        place_actors([("a", "b")], nodes)
    both = [{"CPU": 1.0, "hospital:a": 1.0, "hospital:b": 1.0}]
    assert place_actors([("a", "b")], both)["a", "b"].pins == ("hospital:a", "hospital:b")


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4),
    st.lists(st.integers(-1, 3), min_size=1, max_size=8),
)
def test_all_actors_fit_on_their_nodes_at_once(machines, pins):
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    groups = []
    for number, pin in enumerate(pins):
        groups.append((f"h{number}",))
        if pin >= 0:
            nodes[pin % len(nodes)][f"hospital:h{number}"] = 1.0
    places = place_actors(groups, nodes)
    for node in nodes:
        here = [place for home, place in places.items() if f"hospital:{home[0]}" in node]
        assert sum(place.num_gpus for place in here) <= node["GPU"]
        assert sum(place.num_cpus for place in here) <= node["CPU"]
    assert sum(place.num_gpus for place in places.values()) <= sum(node["GPU"] for node in nodes)
    assert sum(place.num_cpus for place in places.values()) <= sum(node["CPU"] for node in nodes)


def test_a_simulations_actors_fit_on_nodes_of_different_size():
    crew = plan_simulation_actors([{"CPU": 3.0}, {"CPU": 2.0}], num_hospitals=100)
    assert (crew.num_actors, crew.num_cpus, crew.num_gpus) == (5, 0.9, 0.0)
    # Four fifths of a processor each would leave the fifth on parts of two nodes.
    assert plan_simulation_actors([{"CPU": 2.0}, {"CPU": 2.0}], 100, num_actors=5).num_cpus == pytest.approx(
        0.9 * 2 / 3
    )
    # The head has no GPU: its processors hold none of the actors, all of which have a share of one.
    nodes = [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}]
    crew = plan_simulation_actors(nodes, num_hospitals=100)
    assert (crew.num_actors, crew.num_cpus, crew.num_gpus) == (6, 0.9, 0.5)
    assert plan_simulation_actors(nodes, 100, gpus_per_actor=0.4).num_actors == 6
    assert plan_simulation_actors(nodes, num_hospitals=2).num_actors == 2
    assert plan_simulation_actors([{"CPU": 16.0, "GPU": 1.0}], 100, gpus_per_actor=0.1).num_actors == 10


def test_more_shares_of_a_gpu_than_there_are_is_refused():
    # 2 / 0.4 = 5, but the fifth would have parts of two GPUs, and would be waited for without an end.
    with pytest.raises(ConfigError, match=r"5 actors.*gpus_per_hospital=0\.4.*2 have room for 4"):
        plan_simulation_actors([{"CPU": 8.0, "GPU": 2.0}], 100, num_actors=5, gpus_per_actor=0.4)
    assert plan_simulation_actors([{"CPU": 8.0}], 100, num_actors=5, gpus_per_actor=0.4).num_gpus == 0.0


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4),
    st.none() | st.integers(1, 12),
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0]),
    st.randoms(use_true_random=False),
)
def test_a_simulations_actors_fit_wherever_ray_puts_them(machines, num_actors, asked, chance):
    free = [(float(cpus), [1.0] * gpus) for cpus, gpus in machines]
    nodes = [{"CPU": cpus, "GPU": float(len(gpus))} for cpus, gpus in free]
    try:
        crew = plan_simulation_actors(nodes, 20, num_actors, asked)
    except ConfigError:
        assert num_actors is not None
        return
    assert crew.num_actors <= 20
    for _ in range(crew.num_actors):
        room = [
            (node, gpu)
            for node, (cpus, gpus) in enumerate(free)
            for gpu in (range(len(gpus)) if crew.num_gpus else [-1])
            if cpus >= crew.num_cpus - 1e-9 and (gpu < 0 or gpus[gpu] >= crew.num_gpus - 1e-9)
        ]
        node, gpu = chance.choice(room)
        cpus, gpus = free[node]
        free[node] = (cpus - crew.num_cpus, [left - crew.num_gpus * (gpu == at) for at, left in enumerate(gpus)])


@pytest.mark.long
def test_on_two_nodes_each_hospital_trains_on_its_own_also_after_its_process_was_killed(tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROCESS), str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    nodes = seen["nodes"]
    assert len(set(nodes.values())) == 2
    assert set(seen["hospitals"]["a"]) == {nodes["a"]}
    assert set(seen["hospitals"]["b"]) == {nodes["b"]}
    assert seen["killed"] not in seen["processes"]["a"][-1:]
    assert seen["coordinator"] == nodes["head"]
    assert seen["failed"] == ["a"]
    assert seen["completed"]
