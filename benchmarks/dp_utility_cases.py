"""Who is scored in dp_utility.py and who only helps to choose its settings; decided by case names alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

STRATUM = "intensity_stratum"
SHARE = 0.25


def write_case_lists(images: Path, out: Path) -> tuple[Path, Path]:
    """Write two Decathlon folders that point at the images: (for scoring, for choosing settings).

    A quarter of every hospital's cases is held out for scoring. The second folder lacks these, and holds a quarter
    of the rest out in their place.
    """
    raw = json.loads((images / "dataset.json").read_text(encoding="utf-8"))
    scored = {e["image"] for group in _by_stratum(raw["training"]) for e in _first_quarter(group, "scored")}
    rest = [entry for entry in raw["training"] if entry["image"] not in scored]
    chosen = {e["image"] for group in _by_stratum(rest) for e in _first_quarter(group, "screened")}
    folders = (out / "scoring", out / "screening")
    for folder, entries, held_out in zip(folders, (raw["training"], rest), (scored, chosen), strict=True):
        document = {
            **raw,
            "training": [_absolute(e, images) for e in entries if e["image"] not in held_out],
            "validation": [_absolute(e, images) for e in entries if e["image"] in held_out],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(document), encoding="utf-8")
    return folders


def _by_stratum(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [[e for e in entries if e[STRATUM] == stratum] for stratum in sorted({e[STRATUM] for e in entries})]


def _first_quarter(entries: list[dict[str, Any]], salt: str) -> list[dict[str, Any]]:
    ordered = sorted(entries, key=lambda e: hashlib.sha256(f"{salt}:{e['image']}".encode()).digest())
    return ordered[: round(SHARE * len(entries))]


def _absolute(entry: dict[str, Any], images: Path) -> dict[str, Any]:
    return {**entry, "image": str(images / entry["image"]), "label": str(images / entry["label"])}
