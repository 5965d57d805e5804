"""Ledgers of one hospital, north, for tests of its mirror; and files of ledgers as the first version left them."""

import shutil
import sqlite3
from pathlib import Path
from typing import Any

from medfl_ray.config.site import SitePolicy
from medfl_ray.messages import LedgerRows, Mechanism
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.budgets import AccountTerms
from medfl_ray.store.ledger.file import KEY_NAME, LedgerFile
from medfl_ray.store.signing_key import load_key

DELTA = 1e-5
ACCOUNT = ("north", "scans")
MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)
POLICIES = [SitePolicy(hospital=name, data_set="scans", num_patients=40) for name in ("north", "south")]
NEW_KEY = "ab" * 32


def opened(folder: Path, heads: Any = ()) -> PrivacyLedger:
    folder.mkdir(exist_ok=True, mode=0o700)
    return PrivacyLedger.open(folder / "ledger.sqlite", *ACCOUNT, DELTA, None, heads)


def with_the_key_of(site: Path, folder: Path) -> PrivacyLedger:
    """Return an empty ledger under the hospital's own key, as somebody makes it who has the key."""
    folder.mkdir(mode=0o700)
    shutil.copy(site / KEY_NAME, folder / KEY_NAME)
    return PrivacyLedger(LedgerFile(folder / "ledger.sqlite", recovering=True), ACCOUNT, AccountTerms(delta=DELTA))


def train(ledger: PrivacyLedger, *rounds: int, settle: bool = True) -> list[str]:
    reserved = [ledger.reserve("study", number, 0, MECHANISM, None) for number in rounds]
    for reservation in reserved if settle else []:
        ledger.settle(reservation)
    return reserved


def rows_of(ledger: PrivacyLedger) -> tuple[LedgerRows, ...]:
    ledger.head()
    return ledger.rows_after({})


def public_key(folder: Path) -> str:
    return load_key(folder / KEY_NAME).public_key


def as_version_one(path: Path) -> None:
    """Give a file the table that ledgers had before there were unprotected rows."""
    connection = sqlite3.connect(path, isolation_level=None)
    (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'ledger_events'").fetchone()
    assert ", 'unprotected'" in sql
    triggers = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'")]
    rows = connection.execute("SELECT * FROM ledger_events ORDER BY id").fetchall()
    connection.execute("DROP TABLE ledger_events")
    connection.execute(sql.replace(", 'unprotected'", ""))
    connection.executemany(f"INSERT INTO ledger_events VALUES ({', '.join('?' * 24)})", rows)
    for trigger in triggers:
        connection.execute(trigger)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
