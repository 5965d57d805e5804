"""Signed receipts: a changed, dropped, added or foreign one is found, by the library and by the command."""

import json
import shutil

import pytest
from cli_runs import assert_one_clear_error, command_line
from small_runs import small_run

from medfl_ray.config.files import dump_yaml
from medfl_ray.errors import ReceiptError
from medfl_ray.messages import PrivacySpent, Receipt
from medfl_ray.store.run.receipts import FIRST, receipt_hash, sign_receipt, verify_receipts
from medfl_ray.store.signing_key import SigningKey

KEY, OTHER = SigningKey.from_seed(bytes(32)), SigningKey.from_seed(b"1" * 32)


def receipt(number, published=True, attempt=1):
    return Receipt(
        job="j", round=number, attempt=attempt, plan_hash="p", config_hash="c", asked=("a", "b"), trained=("a",),
        failures=(), update_hashes={"a": "x"}, spent={"a": PrivacySpent(epsilon=1.5, delta=1e-5, budget=8.0)},
        weights_before=f"w{number - 1}", weights_after=f"w{number}" if published else None, published=published,
        ended_at="2026-01-01T00:00:00+00:00", reason="" if published else "too few",
    )  # fmt: skip


def chain(receipts, key=KEY):
    signed, previous = [], FIRST
    for one in receipts:
        done, previous = sign_receipt(one, previous, key)
        signed.append(done)
    return signed


WHOLE = chain([receipt(1), receipt(2, published=False), receipt(2, attempt=2), receipt(3)])


def test_a_whole_chain_verifies():
    verify_receipts(WHOLE)
    verify_receipts(WHOLE, KEY.public_key)
    verify_receipts([])


def test_a_round_trained_again_after_a_damaged_checkpoint_verifies():
    again = receipt(3, attempt=2).model_copy(update={"weights_after": "w3b"})
    verify_receipts(chain([receipt(1), receipt(2), receipt(3), again, receipt(4).model_copy(
        update={"weights_before": "w3b"})]))  # fmt: skip


@pytest.mark.parametrize("field", sorted(set(Receipt.model_fields) - {"failures"}))
def test_a_change_of_any_field_is_found(field):
    before = getattr(WHOLE[2], field)
    after = not before if isinstance(before, bool) else before + 1 if isinstance(before, int) else type(before)()
    if after == before:
        after = {str: "x", dict: {"a": 1}, tuple: ("x",)}[type(before)]
    changed = WHOLE[2].model_copy(update={field: after})
    with pytest.raises(ReceiptError, match="changed after it was signed"):
        verify_receipts([*WHOLE[:2], changed, WHOLE[3]])


@pytest.mark.parametrize(
    ("receipts", "word"),
    [
        ([*WHOLE[:1], *WHOLE[2:]], "does not follow"),
        (WHOLE[1:], "does not follow"),
        ([WHOLE[0], WHOLE[0], *WHOLE[1:]], "does not follow"),
        ([WHOLE[1], WHOLE[0], *WHOLE[2:]], "does not follow"),
        (chain([receipt(1), receipt(2).model_copy(update={"weights_before": "other"})]), "other weights"),
        ([*WHOLE[:3], sign_receipt(receipt(3), receipt_hash(WHOLE[2]), OTHER)[0]], "key"),
    ],
)
def test_a_chain_with_a_gap_or_a_stranger_is_refused(receipts, word):
    with pytest.raises(ReceiptError, match=word):
        verify_receipts(receipts)


def test_a_chain_of_another_coordinator_is_refused():
    with pytest.raises(ReceiptError, match="not the coordinator's"):
        verify_receipts(chain([receipt(1)], OTHER), KEY.public_key)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished private run, its folder's files as bytes."""
    import threading

    from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.store.run.folder import RunFolder

    run = small_run(privacy={"enable_dp": True, "noise_multiplier": 30.0}, federation={"local_steps": 1})
    output = run.output.model_copy(update={"directory": tmp_path_factory.mktemp("runs")})
    folder = RunFolder.create(run.model_copy(update={"output": output}))
    policies = tuple(list_hospitals(run))
    pool = local_pool(hospital_specs(run, policies, folder.path))
    run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    return folder.path


@pytest.fixture
def medfl(monkeypatch, capsys):
    return command_line(monkeypatch, capsys)


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path / "run")


def test_the_command_verifies_a_run_and_shows_who_trained(medfl, copied):
    answer = medfl("receipts", "verify", "run")
    assert answer.code == 0, answer.err
    assert "2 receipts are whole, in order and signed; 2 rounds were published" in answer.out
    assert "the ledgers of 3 hospitals hold every row" in answer.out
    public = json.loads((copied / "receipts.jsonl").read_text().splitlines()[0])["public_key"]
    assert public in answer.out
    assert medfl("receipts", "verify", "run", "--key", public).code == 0
    shown = medfl("receipts", "show", "run")
    assert "round 2, attempt 1" in shown.out
    assert "patient-level, add/remove, delta" in shown.out


def edited(copied, change):
    path = copied / "receipts.jsonl"
    lines = change(path.read_text().splitlines())
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1:], ("round 2", "left out")),
        (lambda lines: lines[:1], ("round 2", "cut off")),
        (lambda lines: [lines[0].replace('"published":true', '"published":false'), lines[1]], ("round 1", "changed")),
        (lambda lines: [], ("no receipts",)),
    ],
)
def test_the_command_names_what_is_wrong(medfl, copied, change, words):
    edited(copied, change)
    assert_one_clear_error(medfl("receipts", "verify", "run"), 1, *words)


def test_the_command_compares_with_the_ledgers_and_a_known_key(medfl, copied):
    assert_one_clear_error(medfl("receipts", "verify", "run", "--key", "0" * 64), 1, "not the coordinator's")
    ledgers = json.loads((copied / "ledger.json").read_text())
    hospital = sorted(ledgers)[0]
    ledgers[hospital]["events"] = ledgers[hospital]["events"][:-1]
    (copied / "ledger.json").write_text(json.dumps(ledgers))
    assert_one_clear_error(medfl("receipts", "verify", "run"), 1, "rows are missing at its end", hospital)
    last = ledgers[hospital]["events"][-1]  # where nothing in the export says so, mirror and receipts do
    ledgers[hospital]["head"] = f"{last['sequence']}:{last['hash']}"
    (copied / "ledger.json").write_text(json.dumps(ledgers))
    assert_one_clear_error(medfl("receipts", "verify", "run"), 1, "the export was cut", hospital)
    shutil.rmtree(copied / "mirror")
    assert_one_clear_error(medfl("receipts", "verify", "run"), 1, "names a row", hospital)
    (copied / "ledger.json").unlink()
    assert_one_clear_error(medfl("receipts", "verify", "run"), 1, "export", "is missing", hospital)
    (copied / "config.yaml").write_text(dump_yaml(small_run()))
    (copied / "receipts.jsonl").write_text("no receipt\n")
    assert "no receipts" in medfl("receipts", "show", "run").err
