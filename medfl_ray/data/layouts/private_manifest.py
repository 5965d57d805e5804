"""A manifest of private data: every line or entry is read by itself, so that what is wrong with one hides no other.

In a CSV file one line is one row, whatever its quotes say: a quote that nothing closes would else swallow the rows of
other patients. In a JSON file an entry that is not an object cannot be used, and the others stay.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medfl_ray.data.cases import Case, CaseIndex, patient_name, unusable
from medfl_ray.data.layouts.decathlon import UNDECODED, holds_unreadable, label_names, parse_private
from medfl_ray.data.layouts.manifest import case_of_row, find_manifest
from medfl_ray.errors import LayoutError

Row = Mapping[str, Any] | LayoutError
"""What a line or an entry says, or why it says nothing."""


def read_private_manifest(path: Path, named: tuple[str, ...]) -> CaseIndex:
    """List the cases of a manifest, each with its own `problem` where it cannot be used.

    Names come from the first line of a CSV or the top of a JSON file, never from rows or label files.

    Args:
      named: the channels that the run names; of image_<channel> columns or keys no others are read.

    Raises:
      LayoutError: there is no manifest, the first line has no patient_id, or the file is not JSON.
    """
    file = find_manifest(path)
    try:
        content = file.read_bytes()
    except PermissionError:
        raise LayoutError(f"{file.name} may not be read by this user; change its permissions") from None
    if file.suffix.lower() == ".csv":
        rows, header = _lines(content, file.name)
        known = {name.casefold() for name in header}
        channels = named if named and all(name.casefold() in known for name in named) else header
        labels: dict[int, str] = {}
    else:
        rows, channels, labels = _entries(content, file.name)
    cases = tuple(_case(file.parent, row, i, len(rows), channels or named) for i, row in enumerate(rows))
    return CaseIndex(cases, channels, labels)


def _lines(content: bytes, name: str) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a CSV file and the channels that its columns name."""
    first, *lines = re.split(r"\r\n|\r|\n", content.decode("utf-8-sig", errors="surrogateescape"))
    columns = [column.strip() for column in _values(first) or ()]
    if "patient_id" not in columns:
        raise LayoutError(f"the first line of {name} has no column patient_id; expected the names of the columns")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=2):
        values = _values(line)
        if values is None:
            rows.append(LayoutError(f"line {number} of {name} is not CSV in UTF-8; close its quotes, save it as UTF-8"))
        elif values and len(values) != len(columns):
            rows.append(LayoutError(f"line {number} of {name} has more or fewer values than the header has columns"))
        elif values:
            rows.append({column: value.strip() for column, value in zip(columns, values, strict=True)})
    return rows, tuple(column.removeprefix("image_") for column in columns if column.startswith("image_"))


def _values(line: str) -> list[str] | None:
    """Return the values of a line, none for an empty one; None where it cannot be parsed."""
    if UNDECODED.search(line):
        return None
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        return None


def _entries(content: bytes, name: str) -> tuple[list[Row], tuple[str, ...], dict[int, str]]:
    """Return the entries of a JSON file, and the channels and labels that its top names."""
    raw = parse_private(content, name)
    top = raw if isinstance(raw, dict) else {"cases": raw}
    listed, channels = top.get("cases"), top.get("channels") or []
    if not isinstance(listed, list) or not isinstance(channels, list):
        raise LayoutError(f'{name} has no list of cases; expected [{{...}}, ...] or {{"cases": [{{...}}, ...]}}')
    rows = [_entry(row, f"entry {number} of {name}") for number, row in enumerate(listed, start=1)]
    return rows, tuple(str(channel) for channel in channels), label_names(top)


def _entry(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        return LayoutError(f"{where} is not an object")
    if holds_unreadable(row):
        return LayoutError(f"{where} holds text that is no UTF-8, or a number of too many digits")
    return row


def _case(folder: Path, row: Row, position: int, total: int, channels: tuple[str, ...]) -> Case:
    if isinstance(row, LayoutError):
        return unusable(row)
    try:
        known = {**_chosen(row, channels), "patient_id": patient_name(row.get("patient_id"))}
        return case_of_row(folder, known, position, total)
    except Exception as error:  # noqa: BLE001 - whatever a value is, it spoils its own row alone
        where = f"case {position + 1} of {total} in the manifest"
        return unusable(LayoutError(f"{where} cannot be read ({type(error).__name__}); correct its values"))


def _chosen(row: Mapping[str, Any], channels: tuple[str, ...]) -> dict[str, Any]:
    """Return a row whose image_<channel> values are those of the channels, in their order, and no others."""
    kept = {key: value for key, value in row.items() if not key.startswith("image_")}
    if row.get("images") or row.get("image"):
        return kept
    images = {key.removeprefix("image_").casefold(): value for key, value in row.items() if key.startswith("image_")}
    return kept | {f"image_{name}": images.get(name.casefold()) or "" for name in channels}
