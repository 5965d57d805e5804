"""What a package says of privacy: epsilon with unit, delta and adjacency, or that there was none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from medfl_ray.errors import ExportError
from medfl_ray.export.package import load_run, privacy_statement
from medfl_ray.messages import PrivacySpent, Receipt


def receipt(round_number: int, epsilon: float) -> Receipt:
    spent = PrivacySpent(epsilon=epsilon, delta=1e-5, budget=8.0)
    return Receipt(
        job="j", round=round_number, attempt=1, plan_hash="", config_hash="", asked=("a",), trained=("a",), failures=(),
        update_hashes={}, spent={"a": spent}, weights_before="", weights_after=None, published=True, ended_at="",
    )  # fmt: skip


def test_last_epsilon_of_each_hospital(make_run: Callable[..., Path]) -> None:
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0})
    lines = [receipt(1, 1.5).model_dump_json(), receipt(2, 2.5).model_dump_json()]
    (folder / "receipts.jsonl").write_text("\n".join(lines) + "\n")
    statement = privacy_statement(load_run(folder), folder)
    assert statement["spent"]["a"] == {
        "epsilon": 2.5, "delta": 1e-5, "budget": 8.0, "unit": "patient", "adjacency": "add_remove",
        "ledger_head": None,
    }  # fmt: skip
    assert statement["differential_privacy"] is True


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
