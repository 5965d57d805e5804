"""The signing key of a hospital or a coordinator, in a file that its owner alone may read."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfl_ray.errors import LedgerError
from medfl_ray.store.durable import sync_folder
from medfl_ray.store.private_files import OTHERS, open_new

FINGERPRINT_CONTEXT = b"medfl-ray data set fingerprint v1"


class SigningKey:
    """An Ed25519 key pair; the private half never leaves this object and its file."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningKey:
        """Return the key of 32 secret bytes, for a hospital that keeps no state of its own."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def public_key(self) -> str:
        """The public half as 64 hex digits."""
        raw = self._private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return raw.hex()

    def sign(self, digest: str) -> str:
        """Return the signature of a hash, 128 hex digits."""
        return self._private.sign(digest.encode()).hex()

    def fingerprint(self, items: Iterable[str]) -> str:
        """Return an HMAC over what a data set holds, in any order: evidence that the data stayed the same.

        It stays in the hospital's state folder. Whoever sees two of them learns whether the data changed between,
        so that no ledger row, export or message carries one; and it is never the key of a budget, which one added file
        would reset.
        """
        raw = self._private.private_bytes(
            serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        )
        secret = HKDF(hashes.SHA256(), 32, salt=None, info=FINGERPRINT_CONTEXT).derive(raw)
        hashed = sorted(hashlib.sha256(item.encode()).hexdigest() for item in items)
        return hmac.new(secret, "\n".join(hashed).encode(), hashlib.sha256).hexdigest()

    def __repr__(self) -> str:
        """Name the public half only."""
        return f"SigningKey(public_key={self.public_key[:16]!r}...)"


def signature_is_valid(public_key: str, digest: str, signature: str) -> bool:
    """Say whether the owner of a key signed a hash; malformed input is not valid."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), digest.encode())
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def load_key(path: Path) -> SigningKey:
    """Read a key.

    Raises:
      LedgerError: the file is not an Ed25519 key, cannot be read, or others may read it.
    """
    try:
        mode = path.stat().st_mode
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(
            f"the signing key {path.name!r} cannot be read ({type(error).__name__}); restore it from a backup"
        ) from None
    if os.name == "posix" and mode & OTHERS:
        raise LedgerError(
            f"other users may read the signing key {path.name!r}; run `chmod 600` on it, and renew it if they did"
        )
    if not isinstance(private, Ed25519PrivateKey):
        raise LedgerError(f"the signing key {path.name!r} is not an Ed25519 key; restore it from a backup")
    return SigningKey(private)


def create_key(path: Path) -> SigningKey:
    """Make a new key and write it durably with mode 0600; if another process was first, take that one's.

    Raises:
      LedgerError: the file cannot be written.
    """
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # A name that nobody can have prepared: a link or an open file in its place would give the key away.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        with os.fdopen(open_new(temporary), "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # fails where the key exists: two processes never hold two keys
        except FileExistsError:
            return load_key(path)
        finally:
            temporary.unlink()
        sync_folder(path.parent)  # else a power cut could leave signed rows and no key
    except OSError as error:
        raise LedgerError(f"the signing key cannot be written ({error.strerror}); check the state folder") from None
    return SigningKey(private)
