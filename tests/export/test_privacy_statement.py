"""What a package says of privacy: epsilon with unit, delta and adjacency, or that there was none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from medfl_ray.assembly.lineage import _privacy
from medfl_ray.errors import ExportError
from medfl_ray.export import card_page
from medfl_ray.export.package import load_run, privacy_statement
from medfl_ray.messages import PrivacySpent, Receipt
from medfl_ray.privacy.account import epsilon_words
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.registry.lineage import PrivacyRecord


def receipt(round_number: int, epsilon: float) -> Receipt:
    spent = PrivacySpent(epsilon=epsilon, delta=1e-5, budget=8.0)
    return Receipt(
        job="j", round=round_number, attempt=1, plan_hash="", config_hash="", asked=("a",), trained=("a",), failures=(),
        update_hashes={}, spent={"a": spent}, weights_before="", weights_after=None, published=True, ended_at="",
    )  # fmt: skip


def test_without_a_ledgers_export_the_last_receipt_says_what_was_spent_and_that_it_is_a_receipts(
    make_run: Callable[..., Path],
) -> None:
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0})
    lines = [receipt(1, 1.5).model_dump_json(), receipt(2, 2.5).model_dump_json()]
    (folder / "receipts.jsonl").write_text("\n".join(lines) + "\n")
    statement = privacy_statement(load_run(folder), folder)
    assert statement["spent"]["a"] == {
        "epsilon": 2.5, "delta": 1e-5, "budget": 8.0, "unit": "patient", "adjacency": "add_remove",
        "ledger_head": None, "data_set": "", "run": None, "extra": None, "moment": "receipt",
    }  # fmt: skip
    assert statement["differential_privacy"] is True


def charge(job: str) -> dict[str, object]:
    """One step over all patients with noise 1, as a ledger's row holds it."""
    mechanism = {"noise_multiplier": 1.0, "sample_rate": 1.0, "num_steps": 1, "delta": 1e-5, "unit": "patient"}
    return {"kind": "reserve", "job": job, "reservation": job, "adjacency": "add_remove", **mechanism}


def write_ledger(folder: Path, rows: list[dict[str, object]], budget: float | None = None) -> None:
    spent = {"epsilon": 1.0, "delta": 1e-5, "budget": budget}
    export = {"hospital": "a", "data_set": "scans", "spent": spent, "events": rows, "head": f"{len(rows)}:{'0' * 64}"}
    (folder / "ledger.json").write_text(json.dumps({"a": export, "without": {}}))
    (folder / "job").write_text("j")


def test_hole_the_statement_counts_baselines_that_were_charged_after_the_last_receipt(
    make_run: Callable[..., Path],
) -> None:
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0})
    (folder / "receipts.jsonl").write_text(receipt(1, 1.5).model_dump_json() + "\n")
    write_ledger(folder, [charge("j"), charge("j/local"), charge("j/central")], budget=40.0)
    entry = privacy_statement(load_run(folder), folder)["spent"]["a"]
    one = Segment(1.0, 1.0, 1)
    assert entry["epsilon"] == epsilon_spent([one] * 3, 1e-5)
    assert entry["run"] == {"epsilon": epsilon_spent([one], 1e-5), "delta": 1e-5, "budget": 8.0}
    assert entry["extra"]["epsilon"] == epsilon_spent([one] * 2, 1e-5)
    assert (entry["budget"], entry["moment"], entry["data_set"]) == (40.0, "ledger", "scans")
    page = "\n".join(card_page._privacy(privacy_statement(load_run(folder), folder)))
    assert f"| a | {epsilon_words(entry['epsilon'], 3)} | 1e-05 | patient | add/remove |" in page
    assert "budget of the run (`privacy.epsilon`)" in page


@pytest.mark.parametrize("enable_dp", [True, False])
def test_hole_data_that_were_used_without_protection_make_the_statement_infinite(
    make_run: Callable[..., Path], enable_dp: bool
) -> None:
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0} if enable_dp else {"enable_dp": False})
    row = {"kind": "unprotected", "job": "another", "reason": "trained without differential privacy"}
    write_ledger(folder, [charge("j"), row])
    statement = json.loads(json.dumps(privacy_statement(load_run(folder), folder), allow_nan=False))
    assert statement["unprotected"] == ["a"]
    page = "\n".join(card_page._privacy(statement))
    assert "Data of a were used without patient-level differential privacy" in page
    assert "infinite (unprotected)" in page
    record = _privacy(statement)
    assert record.unprotected == ("a",)
    assert "infinite (unprotected)" in record.text
    if enable_dp:
        assert statement["spent"]["a"]["epsilon"] == "Infinity"
        assert record.spent["a"].epsilon == math.inf
        assert record.spent["a"].run is not None
        assert record.spent["a"].run.epsilon < 10  # this run itself was private
    assert PrivacyRecord.model_validate_json(json.dumps(record.model_dump(mode="json"), allow_nan=False)) == record


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', '{"a": {"events": [{}]}}', '{"a": {"events": 3}}'])
def test_a_damaged_ledger_says_nothing_of_what_was_spent(make_run: Callable[..., Path], text: str) -> None:
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0})
    (folder / "ledger.json").write_text(text)
    with pytest.raises(ExportError, match=r"ledger\.json.*damaged"):
        privacy_statement(load_run(folder), folder)


def test_without_dp_it_says_so(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    assert "may reveal patients" in privacy_statement(load_run(folder), folder)["note"]


def test_a_torn_line_is_passed_over_but_not_the_last(make_run: Callable[..., Path]) -> None:
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0})
    first, second = receipt(1, 1.5).model_dump_json(), receipt(2, 2.5).model_dump_json()
    (folder / "receipts.jsonl").write_text(f"{first}\n{second[:40]}\n{second}\n")
    assert privacy_statement(load_run(folder), folder)["spent"]["a"]["epsilon"] == 2.5
    (folder / "receipts.jsonl").write_text(f"{first}\n{second[:40]}\n")
    with pytest.raises(ExportError, match=r"receipts\.jsonl.*damaged.*epsilon is not known"):
        privacy_statement(load_run(folder), folder)
