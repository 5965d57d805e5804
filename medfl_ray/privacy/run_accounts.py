"""The accounts of a run's hospitals, from the run's folder: the one place that says how much a run has spent.

Once a run has ended they are those of ledger.json, which is written after baselines and studies were charged. Before
that, and in folders of versions that wrote none, they are those of the last receipts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError, PrivacyConfigError
from medfl_ray.messages import PrivacySpent, SignedReceipt
from medfl_ray.privacy.account import PrivacyAccount, account_of, account_of_receipt, budgets_of


def accounts_of_run(run_dir: Path, run: RunConfig) -> dict[str, PrivacyAccount]:
    """Return the account of each hospital's data set, by hospital, and under hospital-level privacy the federation's.

    Empty where nothing was charged and nothing private was used. A hospital whose ledger was not exported is there
    with its last receipt's total.

    Raises:
      ConfigError: ledger.json, hospitals.json or the last receipt is damaged.
    """
    document = _read(run_dir / "ledger.json")
    declared = {name: info.get("declared") for name, info in _read(run_dir / "hospitals.json").items()}
    accounts = {name: account_of_receipt(name, spent) for name, spent in _last_receipts(run_dir).items()}
    job = job_of(run_dir)
    for name, export in document.items():
        if export and export.get("events"):
            accounts[name] = _account(run_dir, run, job, export, declared.get(name))
    return dict(sorted(accounts.items()))


def job_of(run_dir: Path) -> str:
    """Return the name under which a run is charged in the ledgers; the folder may be renamed afterwards."""
    kept = run_dir / "job"
    return kept.read_text().strip() if kept.is_file() else run_dir.resolve().name


def _account(
    run_dir: Path, run: RunConfig, job: str, export: Mapping[str, Any], declared: str | None
) -> PrivacyAccount:
    try:
        spent = PrivacySpent.model_validate(export["spent"])
        budgets = budgets_of(run, spent.unit, declared, spent.budget)
        account = (str(export["hospital"]), str(export["data_set"]))
        return account_of(account, export["events"], job, spent.delta, budgets, export.get("head"))
    except (ValidationError, PrivacyConfigError, KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(run_dir / "ledger.json") from None


def _last_receipts(run_dir: Path) -> dict[str, PrivacySpent]:
    path = run_dir / "receipts.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    spent: dict[str, PrivacySpent] = {}
    for number, line in enumerate(lines, start=1):
        try:
            spent.update(SignedReceipt.model_validate_json(line).spent)
        except ValidationError:
            if number < len(lines):
                continue  # torn by a crash; resuming wrote the round again, and epsilon adds up from receipt to receipt
            raise ConfigError(
                f"receipts.jsonl of the run {run_dir.name!r} is damaged, so that the model's epsilon is not known; "
                "restore it from a backup"
            ) from None
    return spent


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(path) from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> ConfigError:
    return ConfigError(
        f"{path.name!r} of run {path.parent.name!r} is damaged or was not written by a run, so that what was spent is "
        "not known; restore it from a backup"
    )
