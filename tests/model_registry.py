"""What the registry's tests register: packages of a few bytes, and a lineage to change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from medfl_ray.store.registry.lineage import DataSet, EpsilonSpent, Figure, Lineage, ParityRecord, PrivacyRecord

PARITY = ParityRecord(max_abs_difference=1e-6, agreement=1.0, dice=1.0, num_patches=4, images="2 phantoms")
SPENT = EpsilonSpent(epsilon=2.0, delta=1e-5, unit="patient", adjacency="add_remove")


def write_package(folder: Path, content: bytes = b"weights") -> Path:
    """Write a package with two variants, and beside it files of a run that never belong to one."""
    folder.mkdir(parents=True, exist_ok=True)
    variants = {}
    for variant, name in (("float32", "model.onnx"), ("int8", "model.int8.onnx")):
        (folder / name).write_bytes(content + variant.encode())
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        variants[variant] = {"file": name, "sha256": digest, "size_bytes": len(content)}
    (folder / "model.json").write_text(json.dumps({"format": 2, "variants": variants}))
    (folder / "card.md").write_text("# A card")
    (folder / "coordinator.key").write_text("a secret")
    (folder / "ledger.json").write_text("{}")
    return folder


def figure(value: float | None) -> Figure:
    """A figure that is shown, or one that differential privacy keeps back."""
    return Figure(value=value, label="public" if value is not None else "suppressed")


def lineage(dice: float | None = 0.8, **changes: Any) -> Lineage:
    """A complete lineage of two hospitals with differential privacy."""
    data_set = DataSet(name="scans", declared="private", num_patients=20, fingerprint="0" * 64, of="declaration")
    fields: dict[str, Any] = {
        "task": "segmentation",
        "run": "20260101-trial",
        "round": 3,
        "config_hash": "c" * 64,
        "strategy": "fedavg",
        "weights_checksum": "a" * 64,
        "receipts_head": "b" * 64,
        "receipts_key": "d" * 64,
        "data_sets": {"north": data_set, "south": data_set},
        "privacy": PrivacyRecord(differential_privacy=True, unit="patient", spent={"north": SPENT, "south": SPENT}),
        "metrics": {"dice": figure(dice)},
        "metrics_of": "held-out patients of north, south",
        "hospital_metrics": {"north": {"dice": figure(dice)}, "south": {"dice": figure(dice)}},
        "parity": PARITY,
        "medfl_ray": "0",
    }
    return Lineage(**{**fields, **changes})
