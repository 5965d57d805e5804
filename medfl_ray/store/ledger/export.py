"""A ledger's export as others hold it: checked with the hospital's public key, without its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medfl_ray.errors import LedgerError
from medfl_ray.store.ledger.events import LedgerEvent, LedgerHead, check_chain, genesis

EXPORT_FORMAT = "medfl-ray privacy ledger v1"


def read_export(export: Mapping[str, Any]) -> tuple[LedgerEvent, ...]:
    """Return the checked rows of an export.

    Raises:
      LedgerError: it is no export, or names the first bad row.
    """
    account, rows = (export.get("hospital"), export.get("data_set")), export.get("events")
    if export.get("format") != EXPORT_FORMAT or not isinstance(rows, Sequence):
        raise LedgerError(f"this is not an export of a privacy ledger; expected format {EXPORT_FORMAT!r}")
    if not all(isinstance(row, Mapping) for row in rows):
        raise LedgerError("the export holds a row that is not a mapping of fields")
    events = tuple(LedgerEvent.from_mapping(row) for row in rows)
    check_chain((str(account[0]), str(account[1])), (), events, str(export.get("public_key")))
    return events


def verify_export(export: Mapping[str, Any]) -> LedgerHead:
    """Check an export's rows and that it ends where it says; return its head.

    Raises:
      LedgerError: names the first bad row, or says that the end is missing.
    """
    events = read_export(export)
    head = events[-1].head if events else genesis(str(export["hospital"]), str(export["data_set"]))
    if export.get("head") != str(head):
        raise LedgerError(
            f"the export of hospital {export['hospital']!r}, data set {export['data_set']!r}, ends at row "
            f"{head.sequence} and not at the head it names: rows are missing at its end"
        )
    return head
