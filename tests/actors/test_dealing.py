"""Work dealt to actors that die: who ends a process is lost, and nobody else with it."""

from __future__ import annotations

import os
import time

import pytest

from actors.simulation.dealer import GONE, Dealer

pytestmark = pytest.mark.timeout(300)


class Worker:
    """Returns what it gets; a piece with a killer ends the process."""

    def process_id(self):
        return os.getpid()

    def work(self, piece, suffix):
        if "killer" in piece:
            time.sleep(0.5)  # so that what is dealt beside it has arrived
            os._exit(1)
        return tuple(name + suffix for name in piece)


def dealer(num_actors):
    import ray

    remote = ray.remote(Worker).options(num_cpus=0, max_restarts=-1)
    actors = [remote.remote() for _ in range(num_actors)]
    return Dealer(actors), actors


def one_by_one(piece, last):
    return [(name,) for name in piece]


def halved_then_singly(piece, last):
    middle = len(piece) // 2
    return one_by_one(piece, last) if last else [piece[:middle], piece[middle:]]


@pytest.mark.parametrize("apart", [one_by_one, halved_then_singly])
@pytest.mark.parametrize("num_actors", [1, 2])
def test_a_piece_that_ends_its_process_takes_no_other_with_it(ray_cluster, num_actors, apart):
    import ray

    dealt, actors = dealer(num_actors)
    pieces = [("a", "b", "killer", "c"), ("d", "e"), ("f",), ("g",)]
    found = list(dealt.deal("work", pieces, "!", tries=3, apart=apart))
    lost = [piece for piece, result in found if result is GONE]
    done = sorted(name for _, result in found if result is not GONE for name in result)
    for actor in actors:
        ray.kill(actor)
    assert lost == [("killer",)]
    assert done == ["a!", "b!", "c!", "d!", "e!", "f!", "g!"]


def test_what_may_be_done_once_only_is_lost_with_its_process_begun_or_not(ray_cluster):
    import ray

    dealt, actors = dealer(1)
    found = dict(dealt.deal("work", [("killer", "a"), ("b",), ("c",)], "!", tries=1, apart=one_by_one))
    ray.kill(actors[0])
    assert found[("killer", "a")] is GONE
    assert found[("b",)] is GONE
    assert found[("c",)] == ("c!",)
