"""What every signed chain shares: the hash of a record, and whether a row follows the one before it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

from medfl_ray.store.signing_key import signature_is_valid


class ChainRow(Protocol):
    """A numbered row that holds the hash of the row before it, its own hash and a signature of that."""

    @property
    def sequence(self) -> int:
        """Number of the row, from 1."""

    @property
    def previous_hash(self) -> str:
        """Hash of the row before."""

    @property
    def hash(self) -> str:
        """Hash of the row."""

    @property
    def signature(self) -> str:
        """Signature of the hash."""

    def digest(self) -> str:
        """Return what the hash must be."""


def digest_of(label: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of a record, in hex; the label says what kind it is, so that none passes for one of another kind."""
    # A damaged file may hold bytes where text was: shown as such they have another hash, which is the point.
    return digest_of_text(label, json.dumps(body, sort_keys=True, separators=(",", ":"), default=repr))


def digest_of_text(label: str, text: str) -> str:
    """SHA-256 of a record's text under its label, in hex."""
    return hashlib.sha256(f"{label}\n{text}".encode(errors="backslashreplace")).hexdigest()


def link_problem(row: ChainRow, sequence: int, previous_hash: str, public_key: str, signer: str) -> str | None:
    """Return what is wrong with a row that has to follow the row of a number and hash; None where it does."""
    if row.sequence != sequence + 1:
        return f"it is numbered {row.sequence}, so that a row is missing or doubled"
    if row.previous_hash != previous_hash:
        return "it does not follow the row before it"
    if row.digest() != row.hash:
        return "its contents do not match its hash"
    if not signature_is_valid(public_key, row.hash, row.signature):
        return f"its signature is not {signer}"
    return None
