"""A ledger's export as others hold it: checked with the hospital's public key, without its file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medfl_ray.errors import LedgerError
from medfl_ray.store.durable import replace_file
from medfl_ray.store.ledger_events import LedgerEvent, LedgerHead, check_chain, genesis, holds

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


class LedgerMirror:
    """The coordinator's copies of the hospitals' ledgers, each checked and never replaced by a shorter history."""

    def __init__(self, folder: Path) -> None:
        """Keep the copies in a folder, which is made where it is missing."""
        self._folder = folder

    def keep(self, export: Mapping[str, Any]) -> LedgerHead:
        """Take over a hospital's newest export and return its head.

        Raises:
          LedgerError: the export is damaged, or leaves out rows that this mirror has seen.
        """
        head = verify_export(export)
        known = self.head(str(export["hospital"]), str(export["data_set"]))
        if known is not None and not holds(read_export(export), known):
            raise LedgerError(
                f"the ledger of hospital {export['hospital']!r}, data set {export['data_set']!r}, no longer holds row "
                f"{known.sequence} that it showed before; it must be recovered from this mirror first"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(str(export["hospital"]), str(export["data_set"])), json.dumps(export).encode())
        return head

    def head(self, hospital: str, data_set: str) -> LedgerHead | None:
        """Return the last row seen of an account: what its ledger must still hold; None where nothing was seen.

        Raises:
          LedgerError: the copy is damaged.
        """
        export = self.export(hospital, data_set)
        return verify_export(export) if export is not None else None

    def export(self, hospital: str, data_set: str) -> dict[str, Any] | None:
        """Return the copy of an account, for recovery.

        Raises:
          LedgerError: the copy is damaged.
        """
        path = self._path(hospital, data_set)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LedgerError(f"the mirror {path.name!r} cannot be read ({type(error).__name__})") from None
        if not isinstance(content, dict):
            raise LedgerError(f"the mirror {path.name!r} holds no export of a ledger")
        return content

    def _path(self, hospital: str, data_set: str) -> Path:
        return self._folder / f"{hospital}+{data_set}.json"
