"""Signed receipts of a run: each line holds the hash of the one before, so that none can be changed or left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from medfl_ray.errors import ReceiptError
from medfl_ray.messages import Receipt, SignedReceipt
from medfl_ray.store.signing_key import SigningKey, signature_is_valid

FIRST = "0" * 64
_CONTEXT = "medfl-ray receipt v1"


def sign_receipt(receipt: Receipt, previous: str, key: SigningKey) -> tuple[SignedReceipt, str]:
    """Chain a receipt to the hash of the one before, `FIRST` for none, and sign it; return it and its own hash."""
    fields = receipt.model_dump()
    unsigned = SignedReceipt(**fields, previous=previous, public_key=key.public_key, signature="")
    digest = receipt_hash(unsigned)
    return unsigned.model_copy(update={"signature": key.sign(digest)}), digest


def receipt_hash(receipt: SignedReceipt) -> str:
    """Return the SHA-256, in hex, of all that is signed: every field, the hash of the receipt before and the key."""
    content = receipt.model_dump(mode="json", exclude={"signature"})
    if not receipt.attackers:  # as receipts were before there was a name for it
        del content["attackers"]
    canonical = json.dumps([_CONTEXT, content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_receipts(path: Path) -> tuple[list[SignedReceipt], list[int]]:
    """Return the receipts of a file, and the numbers of the lines that hold none: torn by a crash, or tampered with."""
    receipts, unreadable = [], []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else [], start=1):
        try:
            receipts.append(SignedReceipt.model_validate_json(line))
        except ValidationError:
            unreadable.append(number)
    return receipts, unreadable


def verify_receipts(receipts: Sequence[SignedReceipt], public_key: str | None = None) -> None:
    """Check that every receipt is signed by one key and follows the one before.

    Args:
      public_key: the coordinator's, 64 hex digits, from a source other than the run; the first receipt's when absent.

    Raises:
      ReceiptError: one was changed, left out, put in, or signed with another key; it names the first that is wrong.
    """
    previous = FIRST
    weights: dict[int, str | None] = {}
    expected_key = public_key or (receipts[0].public_key if receipts else "")
    for receipt in receipts:
        where = f"the receipt of round {receipt.round}, attempt {receipt.attempt}"
        if receipt.public_key != expected_key:
            raise ReceiptError(f"{where} is signed with the key {receipt.public_key[:16]}..., not the coordinator's")
        if not signature_is_valid(receipt.public_key, receipt_hash(receipt), receipt.signature):
            raise ReceiptError(f"{where} was changed after it was signed: its signature does not fit")
        if receipt.previous != previous:
            raise ReceiptError(f"{where} does not follow the one before it; a receipt was left out or put in")
        if receipt.published and weights.get(receipt.round - 1) not in (None, receipt.weights_before):
            raise ReceiptError(f"{where} starts from other weights than the published round before it left")
        previous = receipt_hash(receipt)
        if receipt.published:
            weights[receipt.round] = receipt.weights_after
