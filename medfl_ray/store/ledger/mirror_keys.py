"""Which key each hospital's ledger is signed with, as a mirror pins it: every key that was ever pinned, in order.

The first is that of the first contact, or of the enrolment before it. Each later one was accepted by an operator, and
has a receipt; see key_receipts.py. Rows are signed by the coordinator, so that only it can pin.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence

from medfl_ray.errors import LedgerError
from medfl_ray.store.ledger.events import LedgerEvent, is_genuine
from medfl_ray.store.signing_key import SigningKey, signature_is_valid

PIN_LABEL = "medfl-ray ledger key v1"
Account = tuple[str, str]
Pin = tuple[str, str, int, str, str]
"""A row of the table: hospital, data set, number, public key, signature."""


def pinned_keys(
    connection: sqlite3.Connection, key: SigningKey, account: Account, checked: set[Pin]
) -> tuple[str, ...]:
    """Return the keys pinned for an account, the newest last.

    Args:
      checked: rows whose signature was checked before; checked ones are added.

    Raises:
      LedgerError: a row was altered or taken out.
    """
    query = "SELECT number, public_key, signature FROM keys WHERE hospital = ? AND data_set = ? ORDER BY number"
    keys: list[str] = []
    for number, public_key, signature in connection.execute(query, account):
        pin = (*account, number, public_key, signature)
        genuine = pin in checked or signature_is_valid(
            key.public_key, _signed_text(account, number, public_key), signature
        )
        if number != len(keys) + 1 or not genuine:
            raise LedgerError(
                f"key {number} that the coordinator's mirror has for hospital {account[0]!r}, data set {account[1]!r}, "
                "is not what the coordinator pinned: it was altered. Restore the mirror's folder from a backup"
            )
        checked.add(pin)
        keys.append(public_key)
    return tuple(keys)


def add_key(connection: sqlite3.Connection, key: SigningKey, account: Account, number: int, public_key: str) -> None:
    """Pin a key as the account's newest, number from 1; it counts once the surrounding transaction ends."""
    signature = key.sign(_signed_text(account, number, public_key))
    connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", (*account, number, public_key, signature))


def signer_of(rows: Sequence[LedgerEvent], keys: Sequence[str]) -> str | None:
    """Return which of an account's pinned keys signed a history that is not empty; None where none of them did."""
    return next((public_key for public_key in reversed(keys) if is_genuine(rows[0], public_key)), None)


def unpinned_rows(account: Account) -> LedgerError:
    """Return the refusal of a mirror that holds rows under a key which was never pinned."""
    return LedgerError(
        f"the mirrored rows of hospital {account[0]!r}, data set {account[1]!r}, are signed with a key that the "
        "coordinator has never pinned: the mirror was altered. Restore its folder from a backup"
    )


def other_key(account: Account, pinned: str, shown: str) -> LedgerError:
    """Return the refusal of rows, or of a hospital, under another key than the pinned one."""
    hospital, data_set = account
    return LedgerError(
        f"the ledger of hospital {hospital!r}, data set {data_set!r}, is signed with another key ({shown[:16]}...) "
        f"than the one pinned for it ({pinned[:16]}...): its state folder was replaced, or somebody else answers for "
        "it. Nothing of it is taken. Where the hospital confirms its new key over another channel, run `medfl-ray "
        f"privacy ledger accept-key --hospital {hospital} --data-set {data_set} --key KEY` at the coordinator"
    )


def _signed_text(account: Account, number: int, public_key: str) -> str:
    text = json.dumps([PIN_LABEL, *account, number, public_key])
    return hashlib.sha256(text.encode()).hexdigest()
