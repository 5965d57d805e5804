"""Figures of a run, checked by hand on a small folder."""

import json

import pytest

from medfl_ray.analytics.summary import bytes_moved, spread, summarise_run, weights_size_bytes
from medfl_ray.errors import ConfigError
from medfl_ray.privacy.accountant import Segment, epsilon_spent


def test_spread_by_hand():
    known = spread([0.1, None, 0.2, 0.3])
    assert known.mean == pytest.approx(0.2)
    assert known.deviation == pytest.approx(0.1)
    assert (known.low, known.high, known.count) == (0.1, 0.3, 3)
    assert spread([0.5]).deviation == 0
    assert spread([None]) is None


def test_federated_local_central_and_gain(make_run):
    run = summarise_run(make_run())
    assert run.metric == "dice"
    assert run.federated.mean == pytest.approx(0.73)
    assert run.local.mean == pytest.approx(0.645)
    assert run.central.mean == pytest.approx(0.745)
    # Paired by hospital: 0.08, 0.12, 0.08, 0.06.
    assert run.gain.mean == pytest.approx(0.085)
    assert (run.gain.low, run.gain.high) == (pytest.approx(0.06), pytest.approx(0.12))
    assert run.hospitals[0].per_label == {"core": pytest.approx(0.66), "oedema": pytest.approx(0.74)}


def test_rounds_failures_and_who_never_took_part(make_run):
    run = summarise_run(make_run())
    oslo = next(h for h in run.hospitals if h.hospital == "oslo")
    assert (oslo.rounds_asked, oslo.rounds_trained) == (8, 7)
    assert [f.round for f in oslo.failures] == [3]
    assert run.never_took_part == ()
    assert run.wall_time_s == pytest.approx(8 * 21.5)


def test_an_absent_hospital_is_named(make_run):
    assert summarise_run(make_run(absent="oslo")).never_took_part == ("oslo",)


def test_a_hospital_that_never_started_is_named(make_run):
    folder = make_run()
    failure = {"hospital": "rome", "round": 0, "attempt": 0, "stage": "start", "reason": "no images"}
    (folder / "failures.json").write_text(json.dumps([failure]))
    run = summarise_run(folder)
    assert run.never_took_part == ("rome",)
    assert run.hospitals[-1].federated is None


def test_epsilon_of_the_run_of_what_is_beside_it_and_in_all_are_those_of_the_ledgers_rows(make_run):
    charite = summarise_run(make_run()).hospitals[0]
    account, one = charite.account, lambda sigma: Segment(sigma, 1.0, 1)
    assert account.run.epsilon == epsilon_spent([one(0.7)], 1e-5)
    assert account.extra.epsilon == epsilon_spent([one(1.0)], 1e-5)
    assert account.total.epsilon == epsilon_spent([one(0.7), one(1.0), one(4.0)], 1e-5)
    assert (account.run.budget, account.extra.budget, account.total.budget) == (8.0, None, 20.0)
    assert (account.unit, account.adjacency, account.moment) == ("patient", "add_remove", "ledger")
    assert [number for number, _ in charite.spending] == list(range(1, 9))


def test_without_a_ledgers_export_the_last_receipts_total_is_all_that_is_known(make_run):
    account = summarise_run(make_run(complete=False)).hospitals[0].account
    assert account.total.epsilon == pytest.approx(7.9 * 0.5**0.6)
    assert (account.moment, account.run, account.extra) == ("receipt", None, None)


def test_suppressed_figures_enter_no_mean(make_run):
    run = summarise_run(make_run(private=True))
    assert run.num_suppressed == 4
    assert run.federated is None
    assert run.gain is None
    assert run.mean_curve == ()
    assert not any(h.may_show_pictures for h in run.hospitals)


def test_a_suppressed_figure_outweighs_a_public_declaration(make_run):
    folder = make_run(private=True)
    infos = json.loads((folder / "hospitals.json").read_text())
    for info in infos.values():
        info["declared"] = "public"
    (folder / "hospitals.json").write_text(json.dumps(infos))
    assert not any(h.may_show_pictures for h in summarise_run(folder).hospitals)


def test_bytes_are_weights_times_transfers(make_run):
    folder = make_run()
    assert weights_size_bytes(folder / "model.safetensors") == 4000
    # 8 rounds, 4 asked each; oslo is missing once: 32 down, 31 up.
    assert summarise_run(folder).num_bytes == 4000 * 63
    assert bytes_moved([], None) is None


def test_a_run_that_stopped_early_is_summed_up(make_run):
    run = summarise_run(make_run(complete=False))
    assert run.num_published == 4
    assert set(run.missing) == {"hospitals.json", "evaluation.json", "baselines.json", "ledger.json", "model.json"}
    assert run.federated is not None
    assert run.local is None


def test_a_torn_last_line_is_passed_over_and_damage_is_not(make_run):
    folder = make_run()
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    assert summarise_run(folder).num_published == 7
    path.write_text("\n".join([lines[0][:50], *lines[1:]]))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        summarise_run(folder)


@pytest.mark.parametrize("name", ["evaluation.json", "hospitals.json", "ledger.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}'])
def test_damaged_files_are_named(make_run, name, text):
    folder = make_run()
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        summarise_run(folder)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        summarise_run(tmp_path)
