"""Receipts of the keys that an operator has accepted for hospitals' ledgers: one signed, chained line each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfl_ray.errors import LedgerError, StorageError
from medfl_ray.store.durable import append_line
from medfl_ray.store.hash_chain import digest_of, link_problem
from medfl_ray.store.private_files import make_private
from medfl_ray.store.signing_key import SigningKey

KEY_RECEIPTS = "key_receipts.jsonl"
LABEL = "medfl-ray key receipt v1"
FIRST = "0" * 64


@dataclass(frozen=True, kw_only=True)
class KeyReceipt:
    """That an operator accepted `new_key` for an account in place of `earlier_key`; None where it was the first."""

    sequence: int
    hospital: str
    data_set: str
    earlier_key: str | None
    new_key: str
    accepted_at: str
    previous_hash: str
    hash: str = ""
    signature: str = ""

    def digest(self) -> str:
        """SHA-256 over every other field, the hash of the receipt before included."""
        return digest_of(LABEL, {name: of for name, of in vars(self).items() if name not in ("hash", "signature")})


def append_receipt(
    folder: Path, key: SigningKey, account: tuple[str, str], earlier_key: str | None, new_key: str
) -> KeyReceipt:
    """Write down durably that a key was accepted; what a crash kept from being pinned is not written twice.

    Raises:
      LedgerError: the receipts were altered, or the file cannot be written.
    """
    receipts = read_receipts(folder)
    verify_receipts(receipts, key.public_key)
    last = next((one for one in reversed(receipts) if (one.hospital, one.data_set) == account), None)
    if last is not None and (last.earlier_key, last.new_key) == (earlier_key, new_key):
        return last
    unsigned = KeyReceipt(
        sequence=len(receipts) + 1,
        hospital=account[0],
        data_set=account[1],
        earlier_key=earlier_key,
        new_key=new_key,
        accepted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        previous_hash=receipts[-1].hash if receipts else FIRST,
    )
    digest = unsigned.digest()
    receipt = dataclasses.replace(unsigned, hash=digest, signature=key.sign(digest))
    path = folder / KEY_RECEIPTS
    try:
        make_private(path)
        append_line(path, json.dumps(vars(receipt)))
    except (StorageError, OSError) as error:
        raise LedgerError(f"the receipt of the accepted key cannot be written: {error}. No key was accepted") from None
    return receipt


def read_receipts(folder: Path) -> tuple[KeyReceipt, ...]:
    """Return the receipts beside a mirror, unchecked; a last line that a crash has torn is none.

    Raises:
      LedgerError: the file cannot be read, or holds a line that is no receipt.
    """
    path = folder / KEY_RECEIPTS
    if not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"{KEY_RECEIPTS!r} beside the mirror cannot be read ({type(error).__name__})") from None
    return tuple(_parsed(number, line) for number, line in enumerate(lines[:-1], start=1))


def verify_receipts(receipts: Sequence[KeyReceipt], public_key: str) -> None:
    """Check that receipts follow each other and are signed by the coordinator.

    Raises:
      LedgerError: names the first that does not fit.
    """
    number, previous = 0, FIRST
    for receipt in receipts:
        problem = link_problem(receipt, number, previous, public_key, "the coordinator's")
        if problem:
            raise LedgerError(
                f"receipt {number + 1} of {KEY_RECEIPTS!r} is bad: {problem}. A key in it may never have been "
                "accepted; restore the mirror's folder from a backup"
            )
        number, previous = receipt.sequence, receipt.hash


def check_key_receipts(folder: Path, key: SigningKey, account: tuple[str, str], pinned: Sequence[str]) -> None:
    """Check the receipts beside a mirror, and that they and the pinned keys of one account say the same.

    The first key may have none: it was taken at the first contact.

    Args:
      pinned: the account's keys, the newest last.

    Raises:
      LedgerError: a receipt was altered; a later key has no receipt, or a receipt's key was not pinned.
    """
    receipts = read_receipts(folder)
    verify_receipts(receipts, key.public_key)
    accepted = [(one.earlier_key, one.new_key) for one in receipts if (one.hospital, one.data_set) == account]
    changes = list(zip((None, *pinned), pinned, strict=False))
    if accepted in (changes, changes[1:]):
        return
    hospital, data_set = account
    if accepted[:-1] in (changes, changes[1:]):  # a crash between receipt and pin
        raise LedgerError(
            f"the newest receipt of a key of hospital {hospital!r}, data set {data_set!r}, names one that is not "
            f"pinned; run `medfl-ray privacy ledger accept-key --hospital {hospital} --data-set {data_set} --key "
            f"{accepted[-1][1]}` again"
        )
    raise LedgerError(
        f"the keys that the mirror has pinned for hospital {hospital!r}, data set {data_set!r}, and the receipts of "
        f"accepted keys in {KEY_RECEIPTS!r} contradict each other: one of them was altered. Restore the mirror's "
        "folder from a backup"
    )


def _parsed(number: int, line: str) -> KeyReceipt:
    try:
        fields: dict[str, Any] = json.loads(line)
        return KeyReceipt(**fields)
    except (ValueError, TypeError):
        raise LedgerError(f"line {number} of {KEY_RECEIPTS!r} is no receipt of a key: it was altered") from None
