"""The registry's signing key: who may write holds it, who only reads needs its public half."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medfl_ray.errors import LedgerError, RegistryError
from medfl_ray.store.signing_key import SigningKey, create_key, load_key

KEY_NAME = "registry.key"


class RegistryKey:
    """The key in its folder, or a public key alone, under which nothing can be written."""

    def __init__(self, folder: Path, public_key: str | None = None) -> None:
        """Take the folder of `registry.key`; nothing is read or made yet."""
        self.folder = folder
        self._public_key = public_key.lower() if public_key is not None else None
        self._key: SigningKey | None = None

    @property
    def public_key(self) -> str:
        """The public half, 64 hex digits: as given, else that of the key file.

        Raises:
          RegistryError: neither is there.
        """
        if self._public_key is not None:
            return self._public_key
        if self._key is None:
            if not (self.folder / KEY_NAME).exists():
                raise RegistryError(
                    f"the registry's key {KEY_NAME!r} is missing, so that its records cannot be checked; restore it "
                    "from a backup, or give the public half by MEDFL_REGISTRY_PUBLIC_KEY on a machine that only reads"
                )
            self._key = _in_own_words(load_key, self.folder / KEY_NAME)
        return self._key.public_key

    def for_writing(self, is_new: bool) -> SigningKey:
        """Return the key; it is made where the registry is new.

        Raises:
          RegistryError: it is missing, others may read it, or it is not the one whose public half was given.
        """
        path = self.folder / KEY_NAME
        if self._key is None and is_new and not path.exists() and self._public_key is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise RegistryError(f"the folder of {KEY_NAME!r} cannot be made ({error.strerror}); check it") from None
            self._key = _in_own_words(create_key, path)
        if self._key is None and not path.exists():
            raise RegistryError(
                f"the registry's key {KEY_NAME!r} is not on this machine, so that it can read and not write; register "
                "and promote where the key is, or restore it from a backup"
            )
        key = self._key or _in_own_words(load_key, path)
        if key.public_key != self.public_key:
            raise RegistryError(
                f"{KEY_NAME!r} is the key {key.public_key[:16]}..., and {self.public_key[:16]}... was named as the "
                "registry's; correct MEDFL_REGISTRY_PUBLIC_KEY"
            )
        self._key = key
        return key


def _in_own_words(action: Callable[[Path], SigningKey], path: Path) -> SigningKey:
    try:
        return action(path)
    except LedgerError as error:
        raise RegistryError(str(error)) from None
