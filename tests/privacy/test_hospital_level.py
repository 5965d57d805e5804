"""Hospital-level noise, clipping and accounts: of one round, of a tree, and of whole runs."""

from __future__ import annotations

import json
import math
import threading

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from small_runs import small_run

from medfl_ray.assembly.run import RunExtras, hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, LedgerError, PrivacyConfigError
from medfl_ray.federation.hospital_level import FEDERATION, federation_budget, plan_hospital_level
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.accountant import RENYI_ORDERS
from medfl_ray.privacy.hospital_level import (
    AdaptiveClip,
    CentralMechanism,
    clip_update,
    next_clip_norm,
    sample_cohort,
    split_noise,
    tree_cohort,
)
from medfl_ray.privacy.planner import solve_tree_epsilon
from medfl_ray.privacy.tree import TreeNoise
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.run.folder import RunFolder

SIGMA, CLIP = 1.7, 0.25


def test_hospital_level_noise_std() -> None:
    """Within 1 % of sigma C on the sum; the cohort's expected size divides it, whoever was drawn."""
    size, expected = 200_000, 12.5
    mean = CentralMechanism(size, SIGMA, CLIP, expected).release(np.zeros(size), 0, 0)
    assert np.std(mean.astype(float) * expected) == pytest.approx(SIGMA * CLIP, rel=0.01)
    assert abs(mean.mean()) * expected < 5 * SIGMA * CLIP / math.sqrt(size)


def test_the_sum_is_divided_by_the_expected_cohort() -> None:
    total = np.full(1000, 10.0)
    few, many = (CentralMechanism(1000, 1e-6, 1.0, 4.0).release(total, n, n) for n in (1, 9))
    np.testing.assert_allclose(few, 2.5, atol=1e-4)
    np.testing.assert_allclose(many, 2.5, atol=1e-4)


def test_an_update_that_is_too_large_is_clipped_below_the_bound() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.24, 0.26, 1e6):
        update = rng.normal(size=5000).astype(np.float32)
        update *= np.float32(scale / np.linalg.norm(update.astype(float)))
        clipped, within = clip_update(update, CLIP)
        assert np.linalg.norm(clipped.astype(np.float64)) <= CLIP
        assert within == (scale < CLIP)
        assert (scale < CLIP) == np.array_equal(clipped, update)


def test_a_count_takes_its_part_of_the_noise() -> None:
    """Theorem 1 of Andrew et al.: z_updates = (z**-2 - (2 sigma_b)**-2)**-1/2."""
    updates = split_noise(1.0, 10.0)
    assert updates == pytest.approx(1.00125, abs=1e-5)
    assert 1 / updates**2 + 1 / 20.0**2 == pytest.approx(1.0)
    with pytest.raises(PrivacyConfigError, match="count_noise"):
        split_noise(3.0, 1.5)


@pytest.mark.parametrize("quantile", [0.3, 0.5, 0.8])
def test_the_clip_norm_finds_its_quantile(quantile: float) -> None:
    norms = np.random.default_rng(1).lognormal(0.0, 0.5, 4000)
    adaptive, clip = AdaptiveClip(quantile, 0.2, 1.0), 10.0
    for _ in range(300):
        clip = next_clip_norm(clip, float(np.mean(norms <= clip)), adaptive)
    assert clip == pytest.approx(np.quantile(norms, quantile), rel=0.03)


def test_a_tree_pays_per_set_bit() -> None:
    size, std = 40_000, 0.8
    tree, prefix = TreeNoise(size, std), np.zeros(size)
    for step in range(1, 12):
        prefix += tree.next_increment()
        assert np.std(prefix) == pytest.approx(std * math.sqrt(step.bit_count()), rel=0.03)


def test_a_tree_asks_every_hospital_once() -> None:
    names = [f"h{i}" for i in range(23)]
    cohorts = [tree_cohort(names, 1, step, 5, 7) for step in range(1, 6)]
    assert sorted(name for cohort in cohorts for name in cohort) == sorted(names)
    assert cohorts != [tree_cohort(names, 6, step, 5, 7) for step in range(1, 6)]


def test_cohorts_are_drawn_apart_and_may_be_empty() -> None:
    names = [f"h{i}" for i in range(40)]
    sizes = [len(sample_cohort(names, 0.1)) for _ in range(400)]
    assert np.mean(sizes) == pytest.approx(4.0, abs=0.5)
    assert min(sizes) <= 1
    assert len({sample_cohort(names, 0.5) for _ in range(20)}) == 20


def test_a_tree_costs_what_the_accounting_library_says() -> None:
    accountant = RdpAccountant(RENYI_ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_event.SingleEpochTreeAggregationDpEvent(4.0, 8), 2)
    accountant.compose(dp_event.SingleEpochTreeAggregationDpEvent(4.0, 4))
    assert solve_tree_epsilon(4.0, 1e-5, 20, 8) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def central_run(tmp_path, hospitals=3, fraction=1.0, rounds=2, **level):  # type: ignore[no-untyped-def]
    run = small_run(
        data={"phantom": {"num_hospitals": hospitals, "patients_per_hospital": 3, "size_voxels": 16, "seed": 3}},
        federation={"rounds": rounds, "local_steps": 1, "fraction": fraction},
        privacy={"enable_dp": True, "unit": "hospital", "noise_multiplier": 2.0, "hospital_level": level},
    )
    return run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path / "runs"})})


def finish(run, tmp_path):  # type: ignore[no-untyped-def]
    policies = tuple(list_hospitals(run))
    folder, events, root = RunFolder.create(run), [], tmp_path / "state"
    pool = local_pool(hospital_specs(run, policies, folder.path, root))
    outcome = run_in_process(run, policies, folder.path, pool, events.append, threading.Event(), RunExtras(root=root))
    assert outcome.completed, outcome.reason
    receipts = [json.loads(line) for line in (folder.path / "receipts.jsonl").read_text().splitlines()]
    return receipts, events, folder


def test_a_run_is_charged_by_round_and_warned_of(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = central_run(tmp_path, clip_norm=0.5)
    receipts, events, folder = finish(run, tmp_path)
    spent = receipts[-1]["spent"][FEDERATION]
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_event.GaussianDpEvent(2.0 / math.sqrt(2)))
    assert spent["unit"] == "hospital"
    assert spent["adjacency"] == "add_remove"
    assert spent["epsilon"] == pytest.approx(accountant.get_epsilon(spent["delta"]), rel=0.01)
    assert receipts[0]["spent"][FEDERATION]["epsilon"] < spent["epsilon"]
    assert all(receipt["update_hashes"] == {} for receipt in receipts)
    warnings = [e.message for e in events if "hospital-level" in getattr(e, "message", "")]
    assert any("3 hospitals" in words and "unit hospital" in words for words in warnings)
    assert FEDERATION in json.loads((folder.path / "ledger.json").read_text())


def test_a_secret_cohort_is_in_no_receipt(tmp_path) -> None:  # type: ignore[no-untyped-def]
    receipts, events, _ = finish(central_run(tmp_path, fraction=0.3, rounds=3), tmp_path)
    for receipt in receipts:
        assert receipt["published"]
        assert receipt["secret_cohort"]
        assert receipt["asked"] == receipt["trained"] == []
    rounds = [e for e in events if type(e).__name__ == "HospitalState" and e.state in ("training", "done", "left_out")]
    assert rounds == []


def test_an_empty_cohort_is_noised_and_charged(tmp_path) -> None:  # type: ignore[no-untyped-def]
    receipts, _, _ = finish(central_run(tmp_path, fraction=1e-6, rounds=1), tmp_path)
    (receipt,) = receipts
    assert receipt["published"]
    assert receipt["weights_after"] != receipt["weights_before"]
    assert receipt["spent"][FEDERATION]["epsilon"] >= 0
    assert receipt["spent"][FEDERATION]["ledger_head"] is not None


def test_a_tree_run_is_charged_once_per_tree(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = central_run(tmp_path, hospitals=3, rounds=3, mechanism="tree", rounds_per_tree=3)
    receipts, _, _ = finish(run, tmp_path)
    spent = [receipt["spent"][FEDERATION] for receipt in receipts]
    expected = solve_tree_epsilon(2.0, spent[0]["delta"], 3, 3)
    assert [entry["epsilon"] for entry in spent] == pytest.approx([expected] * 3)
    assert {entry["adjacency"] for entry in spent} == {"zero_out"}
    assert sorted(name for receipt in receipts for name in receipt["trained"]) == sorted(
        policy.hospital for policy in list_hospitals(run)
    )


def test_an_adaptive_clip_norm_moves_and_is_kept(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = central_run(tmp_path, adaptive_clip=True, clip_norm=5.0, count_noise=1.5)
    _, _, folder = finish(run, tmp_path)
    kept = RunFolder.open(folder.path).resume()
    (clip,) = (value[0] for name, value in kept.server_state.items() if name.endswith("clip_norm"))
    assert clip != 5.0
    assert clip > 0


def test_a_hospital_that_demands_patient_level_refuses(tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = central_run(tmp_path)
    policies = [policy.model_copy(update={"require_dp": True}) for policy in list_hospitals(run)]
    with pytest.raises(PrivacyConfigError, match="patient-level"):
        plan_hospital_level(run, policies)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"aggregation": {"weighting": "patients"}}, "uniform"),
        ({"federation": {"min_clients": 2}}, "min_clients"),
        ({"privacy": {"enable_dp": True, "unit": "hospital", "epsilon": 8, "sample_rate": 0.5}}, "federation.fraction"),
        ({"privacy": {"enable_dp": False, "unit": "hospital"}}, "enable_dp"),
        ({"privacy": {"enable_dp": True, "epsilon": 8, "hospital_level": {"clip_norm": 2}}}, "unit: hospital"),
    ],
)
def test_what_does_not_fit_is_refused(sections, words) -> None:  # type: ignore[no-untyped-def]
    base = {"privacy": {"enable_dp": True, "unit": "hospital", "epsilon": 8}}
    if "aggregation" in sections:
        base["aggregation"] = {}
    with pytest.raises(ConfigError, match=words):
        small_run(**{**base, **sections})


def test_a_secret_cohort_and_a_deadline_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="who is still busy after a deadline would tell"):
        small_run(
            privacy={"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0},
            aggregation={"weighting": "uniform"},
            federation={"fraction": 0.5, "deadline_s": 10},
        )


def test_private_hospitals_without_any_budget_are_refused() -> None:
    run = small_run(
        privacy={"enable_dp": True, "unit": "hospital", "noise_multiplier": 1.0}, aggregation={"weighting": "uniform"}
    )
    private = [policy.model_copy(update={"declared": "private"}) for policy in list_hospitals(run)]
    with pytest.raises(PrivacyConfigError, match="the federation no budget"):
        federation_budget(run, private)
    assert federation_budget(run, list_hospitals(run)) == (None, False)


def test_an_older_copy_of_the_federations_account_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    import shutil

    sections = {
        "privacy": {"enable_dp": True, "unit": "hospital", "noise_multiplier": 5.0},
        "aggregation": {"weighting": "uniform"},
        "federation": {"rounds": 2, "local_steps": 1},
        "output": {"directory": tmp_path / "runs", "state_directory": tmp_path / "state"},
    }
    sections["privacy"]["hospital_level"] = {"max_epsilon": 1e6}
    run = small_run(**sections)
    policies = tuple(policy.model_copy(update={"declared": "private"}) for policy in list_hospitals(run))

    def start() -> None:
        folder = RunFolder.create(run)
        pool = local_pool(hospital_specs(run, policies, folder.path))
        run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())

    start()
    account = tmp_path / "state" / "_federation"
    shutil.copytree(account, tmp_path / "backup")
    start()
    shutil.rmtree(account)
    shutil.copytree(tmp_path / "backup", account)
    with pytest.raises(LedgerError, match="its end is missing"):
        start()


@pytest.mark.parametrize("changes", [{"unit": "patient"}, {"unit": "patient", "adjacency": "zero_out"}])
def test_an_account_is_charged_in_its_own_unit_alone(tmp_path, changes) -> None:  # type: ignore[no-untyped-def]
    mechanism = Mechanism(
        noise_multiplier=1.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2000, num_patients=40, delta=1e-5,
        unit="hospital", adjacency="zero_out",
    )  # fmt: skip
    federation = PrivacyLedger.open(tmp_path / "a.sqlite", "federation", "x", 1e-5, None, unit="hospital")
    federation.reserve("job", 1, 1, mechanism, None)
    with pytest.raises(LedgerError, match=r"another unit|add/remove"):
        federation.reserve("job", 2, 1, mechanism.model_copy(update=changes), None)
    (tmp_path / "site").mkdir()
    own = PrivacyLedger.open(tmp_path / "site" / "b.sqlite", "north", "x", 1e-5, 25.0)
    for wrong in (mechanism, mechanism.model_copy(update={"unit": "patient"})):
        with pytest.raises(LedgerError, match=r"another unit|add/remove"):
            own.reserve("job", 1, 1, wrong, None)
    assert own.events() == ()
