"""Attacks and robust rules in whole runs: what attackers send, what is refused, and that every pool does the same."""

import hashlib
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import Interfering, small_run

from medfl_ray.aggregation.updates import Updates
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.config.aggregation import AggregationConfig, AttackConfig
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError
from medfl_ray.export.model_card import _attack_limits
from medfl_ray.federation.attacks import altered_updates, check_attack
from medfl_ray.messages import ClientFailure, ClientUpdate
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.receipts import read_receipts, receipt_hash, verify_receipts

NAMES = tuple(policy.hospital for policy in list_hospitals(small_run()))


def start(run, tmp_path, change=None):
    policies = tuple(list_hospitals(run))
    output = run.output.model_copy(update={"directory": tmp_path})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    pool = local_pool(hospital_specs(run, policies, folder.path))
    events = []
    pool = Interfering(pool, change) if change else pool
    outcome = run_in_process(run, policies, folder.path, pool, events.append, threading.Event())
    return outcome, folder, events


def weights_of(folder):
    return np.concatenate([part.ravel() for part in load_file(folder.path / "model.safetensors").values()])


def attacked(kind, **options):
    return {"kind": kind, "hospitals": [NAMES[0]], **options}


def update_of(hospital, values, weight=1):
    return ClientUpdate(
        hospital=hospital, round=1, attempt=1, delta=np.array(values, dtype=np.float32), layout_checksum="",
        aggregation_weight=weight, num_steps=1, spent=None, metrics={},
    )  # fmt: skip


def sent(kind, scale=None, honest=((1.0, 2.0), (3.0, 2.0)), **aggregation):
    known = Updates(2)
    for number, row in enumerate(honest):
        known.add(f"h{number}", np.array(row, dtype=np.float32), 3)
    trained = {name: update_of(name, (0.5, -1.0), 2) for name in ("b", "a")}
    attack = AttackConfig(kind=kind, hospitals=("a", "b"), scale=scale)
    return list(altered_updates(attack, known, trained, AggregationConfig(**aggregation), (5, 1)))


def test_what_attackers_send_by_hand():
    for kind, scale, expected in (
        ("sign_flip", None, (-5, 10)),
        ("sign_flip", 2.0, (-1, 2)),
        ("alie", 2.0, (2 - 2 * 1, 2)),
        ("alie", None, (0.5, 2)),
        ("ipm", 0.5, (-1, -1)),
        ("ipm", None, (-20, -20)),
        ("scaled_backdoor", 3.0, (1.5, -3)),
        ("scaled_backdoor", None, (0.5 * 10 / 4, -10 / 4)),
    ):
        found = sent(kind, scale)
        assert [update.hospital for update in found] == ["a", "b"]
        for update in found:
            np.testing.assert_allclose(update.delta, expected, err_msg=f"{kind} {scale}")
    np.testing.assert_allclose(sent("scaled_backdoor", server_learning_rate=0.5)[0].delta, (2.5, -5))
    # With nobody honest in a round the attackers go by themselves.
    np.testing.assert_allclose(sent("ipm", 1.0, honest=())[0].delta, (-0.5, 1))


def test_noise_is_the_same_for_the_same_seed_and_another_for_each_attacker():
    first, second = (np.stack([update.delta for update in sent("gaussian", 3.0)]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first[0], first[1])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run of one round without attackers."""
    return start(small_run(federation={"rounds": 1}), tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("kind", ["label_flip", "sign_flip", "gaussian", "alie", "ipm", "scaled_backdoor"])
def test_an_attack_moves_the_plain_mean_and_is_said_everywhere(clean, tmp_path, kind):
    honest, without, _ = clean
    run = small_run(federation={"rounds": 1}, attack=attacked(kind))
    outcome, folder, events = start(run, tmp_path / "attacked")
    assert outcome.completed
    assert outcome.weights_checksum != honest.weights_checksum
    receipts, _ = read_receipts(folder.path / "receipts.jsonl")
    verify_receipts(receipts)
    assert NAMES[0] in receipts[0].attackers
    assert kind in receipts[0].attackers
    assert receipts[0].trained == tuple(sorted(NAMES))
    before, after = (f.results()[0].receipt.update_hashes for f in (without, folder))
    assert {name for name in NAMES if before[name] != after[name]} == {NAMES[0]}
    assert any("contains attackers" in event.message for event in events if event.type == "notice")
    assert kind in _attack_limits(run)[0]


def test_a_receipt_without_attackers_has_the_hash_it_always_had(clean):
    _, folder, _ = clean
    receipts, _ = read_receipts(folder.path / "receipts.jsonl")
    assert receipts[0].attackers == ""
    content = receipts[0].model_dump(mode="json", exclude={"signature", "attackers"})
    canonical = json.dumps(["medfl-ray receipt v1", content], sort_keys=True, separators=(",", ":"))
    assert receipt_hash(receipts[0]) == hashlib.sha256(canonical.encode()).hexdigest()
    assert receipt_hash(receipts[0].model_copy(update={"attackers": "somebody"})) != receipt_hash(receipts[0])


@pytest.mark.ci
def test_norm_bounding_keeps_the_weights_near_those_without_an_attack(tmp_path):
    robust, once = {"mode": "robust"}, {"rounds": 1}
    _, clean, _ = start(small_run(aggregation=robust, federation=once), tmp_path / "clean")
    attack = attacked("gaussian", scale=1.0)
    _, bounded, _ = start(small_run(aggregation=robust, attack=attack, federation=once), tmp_path / "bounded")
    _, plain, _ = start(small_run(attack=attack, federation=once), tmp_path / "plain")
    expected = weights_of(clean)
    near, far = (np.linalg.norm(weights_of(folder) - expected) for folder in (bounded, plain))
    assert near < 0.1 * far


@pytest.mark.ci
def test_a_server_optimizer_and_the_last_aggregate_survive_a_resumed_run(tmp_path):
    rule = {"rule": "centered_clipping", "iterations": 1}
    aggregation = {"mode": "robust", "strategy": "fedadam", "server_learning_rate": 0.01, "robust": rule}
    run = small_run(aggregation=aggregation, federation={"rounds": 3})
    whole, _, _ = start(run, tmp_path / "whole")
    stop = threading.Event()

    def stop_in_second_round(update):
        if update.round == 2:
            stop.set()
        yield update

    policies = tuple(list_hospitals(run))
    output = run.output.model_copy(update={"directory": tmp_path / "halted"})
    folder = RunFolder.create(run.model_copy(update={"output": output}))

    def go(change, flag):
        pool = local_pool(hospital_specs(run, policies, folder.path))
        pool = Interfering(pool, change) if change else pool
        return run_in_process(run, policies, folder.path, pool, lambda event: None, flag)

    assert go(stop_in_second_round, stop).rounds_done == 2
    resumed = go(None, threading.Event())
    assert resumed.completed
    assert resumed.weights_checksum == whole.weights_checksum
    forgetful = {**aggregation, "robust": {"rule": "norm_bound"}}
    other, _, _ = start(small_run(aggregation=forgetful, federation={"rounds": 3}), tmp_path / "other")
    assert other.weights_checksum != whole.weights_checksum


def test_a_round_with_too_few_updates_for_the_rule_is_not_published(tmp_path):
    def lost_in_round_one(update):
        if update.hospital == NAMES[1] and (update.round, update.attempt) == (1, 1):
            yield ClientFailure(
                hospital=update.hospital, round=1, attempt=1, stage="train", reason="its cable was pulled"
            )
        else:
            yield update

    run = small_run(
        aggregation={"mode": "robust", "robust": {"rule": "median", "num_hostile": 1}},
        federation={"rounds": 1, "min_clients": 1, "min_available_clients": 1},
    )
    outcome, folder, _ = start(run, tmp_path, lost_in_round_one)
    assert outcome.completed
    first, second = (result.receipt for result in folder.results())
    assert not first.published
    assert "median needs more than 2f updates: 3 updates with f=1" in first.reason
    assert second.published


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"aggregation": {"mode": "robust", "robust": {"rule": "krum"}}}, "krum needs 2f \\+ 3 updates: 5 updates"),
        ({"attack": {"kind": "ipm", "hospitals": ["nobody"]}}, "names nobody, which the run has not"),
    ],
)
def test_what_cannot_work_stops_before_round_one(tmp_path, sections, words):
    with pytest.raises(ConfigError, match=words):
        start(small_run(**sections), tmp_path)


def test_private_data_are_not_attacked():
    run = small_run(attack=attacked("sign_flip"))
    policies = [policy.model_copy(update={"declared": "private"}) for policy in list_hospitals(run)]
    with pytest.raises(ConfigError, match="public or synthetic"):
        check_attack(run, policies)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {
                "aggregation": {"mode": "robust"},
                "privacy": {"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0, "delta": 1e-3},
                "federation": {"min_clients": 1},
            },
            "its noise covers what one hospital can change a mean",
        ),
        (
            {"aggregation": {"mode": "robust"}, "federation": {"stragglers": "keep", "deadline_s": 9}},
            "count twice in a round",
        ),
        ({"attack": {"kind": "label_flip", "hospitals": ["a"], "scale": 2}}, "attack.scale does nothing"),
        ({"attack": {"kind": "ipm", "hospitals": ["a", "a"]}}, "names a hospital twice"),
        ({"attack": {"kind": "ipm", "hospitals": ["a"]}, "federation": {"baselines": ["local"]}}, "without attack"),
        ({"attack": {"kind": "magic", "hospitals": ["a"]}}, "attack.kind"),
    ],
)
def test_sections_that_do_not_go_together_are_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        small_run(**sections)


def test_robust_mode_goes_with_patient_level_privacy(tmp_path):
    run = small_run(
        privacy={"enable_dp": True, "noise_multiplier": 20.0, "sample_rate": 0.5},
        aggregation={"mode": "robust", "robust": {"rule": "median"}},
        federation={"rounds": 1},
    )
    outcome, folder, _ = start(run, tmp_path)
    assert outcome.completed
    assert set(folder.results()[0].receipt.spent) == set(NAMES)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, False),
        ({"attack": attacked("label_flip")}, False),
        ({"attack": attacked("scaled_backdoor")}, True),
        ({"aggregation": {"mode": "robust"}}, True),
    ],
)
def test_updates_come_one_by_one_where_a_rule_or_an_attack_needs_them(sections, expected):
    assert small_run(**sections).needs_every_update == expected
