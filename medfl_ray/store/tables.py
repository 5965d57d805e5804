"""The tables of a hospital's privacy ledger, of a run's rounds, and of registry and audit log."""

from __future__ import annotations

from sqlalchemy import (
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

LEDGER_APPLICATION_ID = 0x6D666C31
LEDGER_SCHEMA_VERSION = 2
LEDGER_READABLE_VERSIONS = (1, 2)
"""Version 1 knew no `unprotected` rows; a file of it becomes one of version 2 when it is to take the first of them."""

ledger_metadata = MetaData()

ledger_events = Table(
    "ledger_events",
    ledger_metadata,
    Column("id", Integer, primary_key=True),
    Column("hospital", String(64), nullable=False),
    Column("data_set", String(64), nullable=False),
    Column("sequence", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("at", String(32), nullable=False),
    Column("job", Text),
    Column("round", Integer),
    Column("attempt", Integer),
    Column("reservation", String(32), unique=True),
    Column("closes", String(32), ForeignKey("ledger_events.reservation")),
    Column("noise_multiplier", Float),
    Column("sample_rate", Float),
    Column("num_steps", Integer),
    Column("max_grad_norm", Float),
    Column("num_patients", Integer),
    Column("delta", Float),
    Column("unit", String(16)),
    Column("adjacency", String(16)),
    Column("fingerprint", String(64)),
    Column("reason", Text),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
    UniqueConstraint("hospital", "data_set", "sequence"),
    CheckConstraint("kind IN ('reserve', 'settle', 'release', 'recover', 'unprotected')"),
)

# The application never changes a row; these stop whoever opens the file with another program by mistake.
APPEND_ONLY_TRIGGERS = tuple(
    f"CREATE TRIGGER ledger_events_no_{verb.lower()} BEFORE {verb} ON ledger_events "
    f"BEGIN SELECT RAISE(ABORT, 'the privacy ledger is append-only'); END"
    for verb in ("UPDATE", "DELETE")
)

ROUND_STATES = ("open", "collecting", "aggregated", "published", "abandoned")
rounds_metadata = MetaData()

round_attempts = Table(
    "round_attempts",
    rounds_metadata,
    Column("id", Integer, primary_key=True),
    Column("job", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("plan", Text, nullable=False),
    Column("opened_at", String(32), nullable=False),
    Column("weights_after", String(64)),
    UniqueConstraint("job", "round", "attempt"),
    CheckConstraint(f"state IN {ROUND_STATES}"),
)

round_deliveries = Table(
    "round_deliveries",
    rounds_metadata,
    Column("id", Integer, primary_key=True),
    Column("job", Text, nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("hospital", String(64), nullable=False),
    UniqueConstraint("job", "round", "attempt", "hospital"),
)

# Registry and audit log; store/migrations makes them, and a test holds both to each other.
registry_metadata = MetaData()

audit_log = Table(
    "audit_log",
    registry_metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("actor", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(64), nullable=False, index=True),
    Column("details", Text, nullable=False),
    Column("previous_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
)

model_versions = Table(
    "model_versions",
    registry_metadata,
    Column("name", String(64), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("record", Text, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
)

model_stages = Table(
    "model_stages",
    registry_metadata,
    Column("name", String(64), primary_key=True),
    Column("state", Text, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
)
