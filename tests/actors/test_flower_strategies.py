"""A Flower strategy through the adapter gives what Flower's own arithmetic gives, and a resumed run goes on from it."""

import sys
import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower_strategies
from safetensors.numpy import load, save
from small_runs import balls, small_run

from actors.flower.aggregation import FlowerAggregation, _Delivered
from actors.flower.rule import with_flower
from actors.simulation.run import simulate
from medfl_ray.aggregation.strategies import build_strategy
from medfl_ray.aggregation.updates import Updates
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, StorageError
from medfl_ray.params import Layout, to_tensors
from medfl_ray.store.run.folder import RunFolder

LAYOUT = Layout(("conv.weight", "conv.bias", "scale"), ((3, 2, 2), (3,), ()))
WEIGHTS = (3, 5, 4)
ONE = {"min_train_nodes": 1, "min_available_nodes": 1}
CASES = [
    ("FedAvg", {}),
    ("FedAvgM", {"server_learning_rate": 0.7, "server_momentum": 0.8}),
    ("FedAdam", {"eta": 0.05, "beta_1": 0.9, "beta_2": 0.99}),
    ("FedYogi", {"eta": 0.05, "beta_1": 0.9, "beta_2": 0.99}),
    ("FedAdagrad", {"eta": 0.1}),
    ("FedMedian", {}),
    ("FedTrimmedAvg", {"beta": 0.34}),
    ("Krum", {"num_malicious_nodes": 0}),
    ("MultiKrum", {"num_nodes_to_select": 2}),
]


def run_with(strategy, options=None, **sections):
    flower = {"strategy": strategy, "options": options or {}}
    return small_run(aggregation={"strategy": "flower", "flower": flower}, **sections)


def aggregation_of(run, weights, said=None):
    built = FlowerAggregation(run, (said if said is not None else []).append)
    built.checked(lambda channels, outputs: (LAYOUT, weights))(1, 2)
    return built


def random_rounds(num_rounds=3, seed=0):
    draw = np.random.default_rng(seed)
    first = draw.normal(size=LAYOUT.size).astype(np.float32)
    rounds = [draw.normal(scale=0.1, size=(3, LAYOUT.size)).astype(np.float32) for _ in range(num_rounds)]
    return first, rounds


def updates_of(rows):
    updates = Updates(LAYOUT.size)
    for number in (2, 0, 1):  # the order in which they arrive says nothing
        updates.add(f"hospital-{number}", rows[number], WEIGHTS[number])
    return updates


def record(vector):
    return ArrayRecord({name: Array(np.asarray(part)) for name, part in to_tensors(vector, LAYOUT).items()})


def flower_alone(name, options, first, rounds):
    """Drive the strategy as Flower's own `Strategy.start` does, with the same updates."""
    strategy = getattr(flower_strategies, name)(**ONE, **options)
    arrays, found = record(first), []
    for number, rows in enumerate(rounds, start=1):
        sent = np.concatenate([array.numpy().ravel() for array in arrays.values()])
        requests = list(strategy.configure_train(number, arrays, ConfigRecord(), _Delivered(3)))
        replies = []
        for node in range(3):
            content = {"arrays": record(sent + rows[node]), "metrics": MetricRecord({"num-examples": WEIGHTS[node]})}
            replies.append(Message(RecordDict(content), reply_to=requests[node]))
        arrays, _ = strategy.aggregate_train(number, replies)
        found.append(np.concatenate([array.numpy().ravel() for array in arrays.values()]))
    return found


def ours(run, first, rounds):
    """Run rounds through the adapter; the server's state goes through the bytes of a checkpoint between any two."""
    weights, state, found = first, {}, []
    apply = build_strategy(run.aggregation).apply
    for rows in rounds:
        aggregation = aggregation_of(run, first)  # a new process
        change, kept = aggregation(updates_of(rows), load(save(dict(state))) if state else {}, weights)
        _, weights = apply({}, weights, change)
        state = kept
        found.append(weights)
    return found, state


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_rounds_through_the_adapter_are_flowers_own(name, options):
    first, rounds = random_rounds()
    found, _ = ours(run_with(name, options), first, rounds)
    for own, flowers in zip(found, flower_alone(name, options, first, rounds), strict=True):
        np.testing.assert_allclose(own, flowers, rtol=0, atol=1e-6)


def test_the_state_is_what_the_next_round_needs():
    first, rounds = random_rounds()
    run = run_with("FedYogi", {"eta": 0.05, "beta_1": 0.9, "beta_2": 0.99})
    _, state = ours(run, first, rounds)
    aggregation = aggregation_of(run, first)
    with_memory, _ = aggregation(updates_of(rounds[0]), state, first)
    without, _ = aggregation(updates_of(rounds[0]), {}, first)
    assert np.abs(with_memory - without).max() > 1e-3
    damaged = {**state, "robust/flower/state": state["robust/flower/state"][:-3]}
    with pytest.raises(StorageError, match="was the class changed"):
        aggregation(updates_of(rounds[0]), damaged, first)


OWN = '''
import numpy as np
import threading
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

class Halving(FedAvg):
    """Goes half way, and counts the rounds and keeps every round's mean of the bias."""

    def __init__(self, share=0.5, **options):
        super().__init__(**options)
        self.share, self.seen, self.history = share, {"rounds": np.int64(0)}, []

    def configure_train(self, server_round, arrays, config, grid):
        self.before = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        after, metrics = super().aggregate_train(server_round, replies)
        self.seen["rounds"] += 1
        self.history.append(after["conv.bias"].numpy().mean())
        assert server_round == self.seen["rounds"] == len(self.history)
        mixed = {k: self.before[k].numpy() * (1 - self.share) + v.numpy() * self.share for k, v in after.items()}
        return ArrayRecord({k: Array(np.asarray(v)) for k, v in mixed.items()}), metrics

class Locked(FedAvg):
    def __init__(self, **options):
        super().__init__(**options)
        self.lock = threading.Lock()

class Stubborn(FedAvg):
    def aggregate_train(self, server_round, replies):
        return None, None

class NoStrategy:
    pass
'''


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "flower_strategies_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("flower_strategies_of_a_test", None)
    return "flower_strategies_of_a_test"


def test_a_subclass_of_the_users_own_keeps_its_memory(own_module):
    first, rounds = random_rounds()
    found, state = ours(run_with(f"{own_module}:Halving", {"share": 0.25}), first, rounds)
    weights = first
    for own, rows in zip(found, rounds, strict=True):
        mean = np.average(rows.astype(np.float64), axis=0, weights=WEIGHTS)
        weights = weights + 0.25 * mean
        np.testing.assert_allclose(own, weights, atol=1e-6)
    assert sum(name.startswith("robust/flower/") for name in state) == len(state)


def test_no_result_leaves_the_weights_and_says_so(own_module):
    first, rounds = random_rounds(1)
    said = []
    aggregation = aggregation_of(run_with(f"{own_module}:Stubborn"), first, said)
    change, _ = aggregation(updates_of(rounds[0]), {}, first)
    assert not change.any()
    assert "made nothing of 3 updates" in said[0].message


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("FedFoo", {}, "cannot be imported"),
        ("no_such_module:FedAvg", {}, "cannot be imported"),
        ("{}:NoStrategy", {}, "no subclass"),
        ("{}:Locked", {}, r"Locked.lock is a lock.*checkpoint cannot hold"),
        ("FedAvg", {"learning": 1}, "options do not fit FedAvg"),
        ("FedTrimmedAvg", {"beta": 0.9}, "options do not fit FedTrimmedAvg"),
        ("FedAvg", {"min_available_nodes": 9}, "waits for more hospitals"),
        ("FedProx", {"proximal_mu": 0.1}, r"asks hospitals for proximal-mu.*aggregation.proximal_mu"),
        ("QFedAvg", {"client_learning_rate": 0.1}, r"cannot aggregate.*strategy: qfedavg"),
        ("DifferentialPrivacyServerSideFixedClipping", {"noise_multiplier": 1}, "no ledger"),
    ],
)
def test_what_would_not_work_is_refused_before_anything_is_trained(own_module, name, options, said):
    first, _ = random_rounds(1)
    with pytest.raises(ConfigError, match=said):
        aggregation_of(run_with(name.format(own_module), options), first)


def test_it_does_not_go_with_hospital_level_noise_or_a_second_rate():
    private = {"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0, "delta": 1e-3}
    with pytest.raises(ConfigError, match=r"privacy\.unit: hospital"):
        small_run(aggregation={"strategy": "flower", "weighting": "uniform"}, privacy=private)
    run = small_run(aggregation={"strategy": "flower", "server_learning_rate": 0.5})
    with pytest.raises(ConfigError, match="own rate"):
        FlowerAggregation(run, print)


@pytest.mark.ci
def test_virtual_hospitals_and_one_process_give_a_strategy_the_same_updates(ray_cluster, tmp_path):
    checksums = []
    for pool in ("local", "virtual"):
        flower = {"strategy": "FedAdam", "options": {"eta": 0.01}}
        run = balls(federation={"pool": pool, "exact": True}, aggregation={"strategy": "flower", "flower": flower})
        run = run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path / pool})})
        folder, policies = RunFolder.create(run), tuple(list_hospitals(run))
        if pool == "virtual":
            outcome = simulate(run, policies, folder.path, lambda event: None)
        else:
            specs = hospital_specs(run, policies, folder.path)
            pool, extras = local_pool(specs), with_flower(run, lambda event: None)
            outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event(), extras)
        assert outcome.completed
        checksums.append(outcome.weights_checksum)
    assert len(set(checksums)) == 1


def test_a_run_without_its_flower_rule_is_refused_and_not_averaged(tmp_path):
    run = small_run(aggregation={"strategy": "flower"})
    with pytest.raises(ConfigError, match="needs its rule"):
        run_in_process(run, tuple(list_hospitals(run)), tmp_path, local_pool([]), print, threading.Event())
