"""Bearer tokens: 256 random bits, kept as SHA-256 in a file that its owner alone may read."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from medfl_ray.errors import ConfigError
from medfl_ray.store.durable import sync_folder
from medfl_ray.store.state_folders import state_root
from serve.refusals import Forbidden, Unauthenticated, Unavailable

Role = Literal["infer", "observe", "store"]
TOKEN = re.compile(r"[A-Za-z0-9_-]{20,128}")
RELOAD_S = 1.0
log = structlog.get_logger("medfl_ray.serve")


class Token(BaseModel):
    """One token as the file has it: `infer` may use models, `observe` read metrics, `store` write results to a PACS."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    roles: tuple[Role, ...] = ("infer", "observe")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tokens: tuple[Token, ...]

    @field_validator("tokens")
    @classmethod
    def _names_differ(cls, tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        if len({token.name for token in tokens}) < len(tokens):
            raise ValueError("two tokens have one name")
        return tokens


def default_tokens_file() -> Path:
    """Return where tokens lie when nobody says otherwise."""
    return state_root() / "serve" / "tokens.json"


def tokens_path(given: Path | None) -> Path:
    """Return the file of tokens: the one that is given, otherwise MEDFL_SERVE_TOKENS, otherwise the default."""
    return given or Path(os.environ.get("MEDFL_SERVE_TOKENS") or default_tokens_file())


def read_tokens(path: Path) -> tuple[Token, ...]:
    """Read a file of tokens; none where there is no file.

    Raises:
      ConfigError: the file is damaged, or others may read it.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tokens file {path.name!r} cannot be read ({type(error).__name__})") from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(f"other users may read the tokens file {path.name!r}; run `chmod 600` on it")
    try:
        return _File.model_validate_json(text).tokens
    except ValidationError:
        raise ConfigError(
            f"the tokens file {path.name!r} is damaged; restore it, or delete it and make new tokens"
        ) from None


def add_token(path: Path, name: str, roles: Iterable[Role] = ("infer", "observe")) -> str:
    """Add a token to the file, which is made if absent, and return it; it cannot be read back later.

    Raises:
      ConfigError: the name is taken or not fit, or the file cannot be used.
    """
    secret = secrets.token_urlsafe(32)
    try:
        token = Token(name=name, sha256=digest_of(secret), roles=tuple(roles))
    except ValidationError:
        raise ConfigError(f"{name!r} is no name of a token; use letters, digits, '.', '_' and '-'") from None
    with _changing(path):
        tokens = read_tokens(path)
        if any(token.name == name for token in tokens):
            raise ConfigError(f"there is a token {name!r} already; revoke it first, or choose another name")
        _write(path, (*tokens, token))
    return secret


def revoke_token(path: Path, name: str) -> None:
    """Remove a token; a running service refuses it within seconds.

    Raises:
      ConfigError: there is no such token, or the file cannot be used.
    """
    with _changing(path):
        tokens = read_tokens(path)
        kept = tuple(token for token in tokens if token.name != name)
        if len(kept) == len(tokens):
            known = ", ".join(token.name for token in tokens) or "none"
            raise ConfigError(f"there is no token {name!r}; known: {known}")
        _write(path, kept)


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Hold the file's lock, so that what one process reads and writes brings back no token that another revoked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(path: Path, tokens: tuple[Token, ...]) -> None:
    """Replace the file in one step; the new one is its owner's alone from the first byte."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(_File(tokens=tokens).model_dump_json(indent=1).encode())
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the tokens file {path.name!r} cannot be written ({error.strerror}); free space, or check its folder"
    )


def digest_of(secret: str) -> str:
    """SHA-256 of a token, in hex; 256 random bits need no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


class TokenBook:
    """The tokens that are valid now; the file is read again when it changes, so that revoking needs no restart."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file; `clock` counts the seconds between two looks at it."""
        self._path, self._clock = path, clock
        self._seen = self._state()  # before reading: a change between the two is then read again
        self._tokens = read_tokens(path)
        self._looked_at = clock()

    @property
    def is_empty(self) -> bool:
        """Whether no token is known."""
        return not self._tokens

    def identify(self, authorization: str | None) -> Token:
        """Return the token of an Authorization header.

        Raises:
          Unauthenticated: there is none, or it is not known.
          Unavailable: the file was damaged since; a token that somebody meant to revoke must not stay valid.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not TOKEN.fullmatch(secret.strip()):
            raise Unauthenticated("the request has no token; send the header Authorization: Bearer TOKEN")
        self._reload()
        digest = digest_of(secret.strip())
        # All are compared, each in constant time: the time taken says nothing of which one was near.
        found = [token for token in self._tokens if hmac.compare_digest(token.sha256, digest)]
        if not found:
            raise Unauthenticated("the token is not known; it was mistyped or revoked")
        return found[0]

    def _reload(self) -> None:
        now = self._clock()
        if now - self._looked_at < RELOAD_S:
            return
        self._looked_at = now
        state = self._state()
        if state == self._seen:
            return
        try:
            self._tokens, self._seen = read_tokens(self._path), state
        except ConfigError as error:
            self._looked_at = -math.inf
            log.error("tokens_unreadable", reason=str(error))
            raise Unavailable("the service's file of tokens cannot be used; its operator must repair it") from None

    def _state(self) -> tuple[int, int, int]:
        """What changes with the file: two changes within one tick of the clock are two files."""
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_ino, found.st_size)


def check_role(token: Token, role: Role) -> None:
    """Refuse a token without a role.

    Raises:
      Forbidden: the token lacks it.
    """
    if role not in token.roles:
        raise Forbidden(f"the token {token.name!r} has no role {role!r}; use another, or make one with it")
