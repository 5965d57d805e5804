"""Tokens: random, kept as a hash, revocable while the service runs."""

import json
import os
import threading
import time

import pytest

from medfl_ray.errors import ConfigError
from serve import auth
from serve.auth import TokenBook, add_token, check_role, read_tokens, revoke_token, tokens_path
from serve.refusals import Forbidden, Unauthenticated, Unavailable


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "tokens.json"


def test_a_token_has_256_random_bits_and_only_its_hash_is_kept(path):
    first, second = add_token(path, "one"), add_token(path, "two")
    assert len(first) == 43  # 256 bits in base64
    assert first != second
    assert first not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [token.name for token in read_tokens(path)] == ["one", "two"]


def test_a_valid_token_is_identified(path):
    secret = add_token(path, "one")
    book = TokenBook(path)
    assert book.identify(f"Bearer {secret}").name == "one"
    assert book.identify(f"bearer  {secret} ").name == "one"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer short", "Bearer " + "x" * 43, "Bearer " + "y" * 5000]
)
def test_any_other_header_is_refused(path, header):
    add_token(path, "one")
    with pytest.raises(Unauthenticated):
        TokenBook(path).identify(header)


def test_a_revoked_token_is_refused_without_a_restart(path, monkeypatch):
    secret = add_token(path, "one")
    book = TokenBook(path)
    monkeypatch.setattr(auth, "RELOAD_S", 0.0)
    revoke_token(path, "one")
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    with pytest.raises(Unauthenticated):
        book.identify(f"Bearer {secret}")


def test_a_token_that_is_revoked_while_another_is_added_stays_revoked(path, monkeypatch):
    add_token(path, "lost")
    held, go_on = threading.Event(), threading.Event()
    read = auth.read_tokens

    def read_slowly(file):
        tokens = read(file)
        if threading.current_thread() is adding:
            held.set()
            go_on.wait(10)
        return tokens

    monkeypatch.setattr(auth, "read_tokens", read_slowly)
    adding = threading.Thread(target=add_token, args=(path, "new"))
    revoking = threading.Thread(target=revoke_token, args=(path, "lost"))
    adding.start()
    assert held.wait(10)
    revoking.start()
    revoking.join(0.3)  # without the lock it is through by now, and what is added next brings the token back
    go_on.set()
    for thread in (adding, revoking):
        thread.join(10)
    assert [token.name for token in read(path)] == ["new"]
    assert sorted(file.name for file in path.parent.iterdir()) == [".tokens.json.lock", "tokens.json"]


def test_a_token_that_is_revoked_while_the_service_reads_the_file_is_refused(path, monkeypatch):
    secret = add_token(path, "one")
    read = auth.read_tokens

    def revoke_after_reading(file):
        monkeypatch.setattr(auth, "read_tokens", read)
        tokens = read(file)
        revoke_token(file, "one")
        return tokens

    monkeypatch.setattr(auth, "read_tokens", revoke_after_reading)
    monkeypatch.setattr(auth, "RELOAD_S", 0.0)
    book = TokenBook(path)
    with pytest.raises(Unauthenticated):
        book.identify(f"Bearer {secret}")


def test_a_change_within_one_tick_of_the_clock_is_seen(path, monkeypatch):
    secret = add_token(path, "one")
    os.utime(path, ns=(1, 1))
    book = TokenBook(path)
    monkeypatch.setattr(auth, "RELOAD_S", 0.0)
    revoke_token(path, "one")
    os.utime(path, ns=(1, 1))
    with pytest.raises(Unauthenticated):
        book.identify(f"Bearer {secret}")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written") as raised:
        add_token(tmp_path / "file" / "tokens.json", "one")
    assert str(tmp_path) not in str(raised.value)


def test_a_file_that_is_damaged_while_the_service_runs_shuts_everybody_out_until_it_is_repaired(path, monkeypatch):
    secret = add_token(path, "one")
    book = TokenBook(path)
    monkeypatch.setattr(auth, "RELOAD_S", 0.0)
    good = path.read_text()
    path.write_text("{")
    os.utime(path, ns=(1, 1))
    for _ in range(2):
        with pytest.raises(Unavailable):
            book.identify(f"Bearer {secret}")
    path.write_text(good)
    assert book.identify(f"Bearer {secret}").name == "one"


def test_a_file_that_others_may_read_is_refused(path):
    add_token(path, "one")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_tokens(path)


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"tokens": [{"name": "a", "sha256": "b"}]})])
def test_a_damaged_file_is_refused(path, text):
    add_token(path, "one")
    path.write_text(text)
    with pytest.raises(ConfigError, match="damaged"):
        read_tokens(path)


def test_names_are_unique_and_plain(path):
    add_token(path, "one")
    with pytest.raises(ConfigError, match="already"):
        add_token(path, "one")
    with pytest.raises(ConfigError, match="no name"):
        add_token(path, "Dr. X")
    with pytest.raises(ConfigError, match="known: one"):
        revoke_token(path, "two")


def test_a_role_is_needed(path):
    add_token(path, "scraper", ("observe",))
    (token,) = read_tokens(path)
    check_role(token, "observe")
    with pytest.raises(Forbidden, match="scraper"):
        check_role(token, "infer")


def test_the_file_is_the_given_one_else_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFL_SERVE_TOKENS", str(tmp_path / "b"))
    assert tokens_path(tmp_path / "a") == tmp_path / "a"
    assert tokens_path(None) == tmp_path / "b"
    monkeypatch.delenv("MEDFL_SERVE_TOKENS")
    monkeypatch.setenv("MEDFL_STATE_DIR", str(tmp_path))
    assert tokens_path(None) == tmp_path / "medfl-ray" / "serve" / "tokens.json"


def test_two_tokens_of_one_name_are_refused(tmp_path):
    path = tmp_path / "tokens.json"
    add_token(path, "one")
    words = json.loads(path.read_text())
    words["tokens"].append({**words["tokens"][0], "sha256": "0" * 64})
    path.write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="damaged"):
        read_tokens(path)
