"""Where each actor of hospitals runs, and what it reserves there: a pure rule over the cluster's nodes.

A hospital whose node offers the resource `hospital:<id>` stays on that node. The others are spread over the nodes
or packed, as `federation.placement` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medfl_ray.errors import ClusterError, ConfigError

Policy = Literal["spread", "pack"]
PIN = 0.001
"""How much of its hospital's resource an actor takes; several runs may hold it at once."""
# Ray's own rule fills a node to half of its processors before it goes on to the next.
STRATEGIES: Mapping[Policy, str] = {"spread": "SPREAD", "pack": "DEFAULT"}


@dataclass(frozen=True)
class Place:
    """What one actor asks Ray for."""

    num_cpus: float
    num_gpus: float
    pins: tuple[str, ...]
    strategy: str

    def options(self) -> dict[str, Any]:
        """Return the options of `ray.remote`; no task is tried again, for a second training is a second release."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": dict.fromkeys(self.pins, PIN) or None,
            "scheduling_strategy": self.strategy,
            "max_restarts": -1,
            "max_task_retries": 0,
        }


@dataclass(frozen=True)
class Crew:
    """The actors that share a simulation's hospitals, and what each asks Ray for."""

    num_actors: int
    num_cpus: float
    num_gpus: float


def resource_of(hospital: str) -> str:
    """Return the name of the resource that a hospital's node offers."""
    return f"hospital:{hospital}"


def place_actors(
    groups: Sequence[tuple[str, ...]],
    nodes: Sequence[Mapping[str, float]],
    policy: Policy = "spread",
    gpus_per_actor: float = 0.0,
) -> dict[tuple[str, ...], Place]:
    """Return each actor's place, such that all fit at once: half of the processors, and all of the GPUs, are shared.

    Args:
      homes: the hospitals of each actor.
      nodes: the resources of each node that is alive.
      gpus_per_actor: share of a GPU that each actor takes where its node has one; 0 shares them evenly.

    Raises:
      ClusterError: hospitals of different nodes share an actor.
    """
    where = {group: _nodes_of(group, nodes) for group in groups}
    loose = [group for group in groups if not where[group]]
    everything = _total(nodes)
    crowds = [
        (nodes[index], sum(where[group] == [index] for group in groups) + len(loose)) for index in range(len(nodes))
    ]
    places = {}
    for group in groups:
        offered = {name for index in where[group] for name in nodes[index]}
        pins = tuple(resource_of(name) for name in group if resource_of(name) in offered)
        pinned = len(where[group]) == 1
        shared: list[tuple[Mapping[str, float], int]] = (
            [crowds[where[group][0]]] if pinned else [(everything, len(groups))]
        )
        if not pinned and len(loose) < len(groups):  # so that no actor takes what a pinned one cannot find elsewhere
            shared += [crowd for crowd in crowds if crowd[1] > len(loose)]
        places[group] = Place(
            num_cpus=min(_cpus(*crowd) for crowd in shared),
            num_gpus=_gpus([crowd for crowd in shared if crowd[0].get("GPU")], gpus_per_actor),
            pins=pins,
            strategy=STRATEGIES[policy],
        )
    return places


def _nodes_of(group: tuple[str, ...], nodes: Sequence[Mapping[str, float]]) -> list[int]:
    """Return the nodes that offer an actor's hospitals; none where no node names them."""
    named = [name for name in group if any(resource_of(name) in node for node in nodes)]
    if not named:
        return []
    found = [index for index, node in enumerate(nodes) if all(resource_of(name) in node for name in named)]
    if not found:
        raise ClusterError(
            f"hospitals {', '.join(named)} are to share an actor, but no node of the cluster offers all of them; "
            "leave out federation.num_actors (--actors), so that each has an actor on its own node"
        )
    return found


def _total(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


def _cpus(node: Mapping[str, float], num_actors: int) -> float:
    return min(1.0, max(0.01, math.floor(100 * node.get("CPU", 1.0) / (2 * num_actors)) / 100))


def _gpus(crowds: Sequence[tuple[Mapping[str, float], int]], asked: float) -> float:
    """Return an actor's share where it may run; what was asked for wins where there is a GPU at all."""
    if not crowds:
        return 0.0
    if asked:
        return asked
    return min(gpu_share(num_actors, node["GPU"]) for node, num_actors in crowds)


def gpu_share(num_actors: int, num_gpus: float) -> float:
    """Return the share of a GPU with which so many actors fit on so many GPUs, none of them on parts of two."""
    return math.floor(10_000 / math.ceil(num_actors / num_gpus)) / 10_000


def plan_simulation_actors(
    nodes: Sequence[Mapping[str, float]],
    num_hospitals: int,
    num_actors: int | None = None,
    gpus_per_actor: float = 0.0,
) -> Crew:
    """Return a simulation's actors, one per core or as many as asked for, such that all fit on the nodes at once.

    Where a node has a GPU, all actors are on such nodes; an actor is on one node and on one GPU (or on whole ones).

    Args:
      nodes: the resources of each node that is alive.
      gpus_per_actor: share of a GPU that each takes where there is one; 0 shares them evenly.

    Raises:
      ConfigError: more actors are asked for than have such a share of the GPUs.
    """
    with_gpu = [node for node in nodes if node.get("GPU")]
    cpus = [node.get("CPU", 1.0) for node in with_gpu or nodes]
    cores = max(1, sum(int(of_node) for of_node in cpus))
    if not with_gpu:
        count = min(num_actors or cores, num_hospitals)
        return Crew(count, num_cpus=0.9 * min(1.0, largest_share(cpus, count)), num_gpus=0.0)
    gpus = [node["GPU"] for node in with_gpu]
    fitting = sum(slots(of_node, gpus_per_actor) for of_node in gpus) if gpus_per_actor else cores
    count = min(num_actors or max(1, fitting), num_hospitals)
    if gpus_per_actor and count > fitting:
        raise ConfigError(
            f"{count} actors (federation.num_actors, --actors) are to have training.gpus_per_hospital="
            f"{gpus_per_actor:g} of a GPU each, and the cluster's {sum(gpus):g} have room for {fitting}; "
            "lower one of the two"
        )
    share = gpus_per_actor or gpu_share(count, sum(gpus))
    crowded = [(node, min(count, slots(of_node, share))) for node, of_node in zip(cpus, gpus, strict=True)]
    room = min(node / actors for node, actors in crowded if actors)
    return Crew(count, num_cpus=0.9 * min(1.0, room), num_gpus=share)


def slots(num_gpus: float, share: float) -> int:
    """Return how many actors with such a share a node's GPUs hold; a share of one GPU is never parts of two."""
    exact = 1e-9  # 1 / 0.1 is a little more than 10, or a little less
    return int(num_gpus / share + exact) if share >= 1 else int(num_gpus) * int(1 / share + exact)


def largest_share(sizes: Sequence[float], count: int) -> float:
    """Return the largest share of which so many fit, each within one of the sizes."""
    possible = sorted({size / parts for size in sizes for parts in range(1, count + 1)}, reverse=True)
    return next(
        (share for share in possible if share and sum(int(size / share + 1e-9) for size in sizes) >= count), 0.01
    )
