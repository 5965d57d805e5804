"""Whether the ledgers exported with a run are those that its hospitals signed, held against all who have seen them.

An export names the key that it is signed with, so that by itself it proves nothing: whoever can write the file can
sign it anew. Its key has to come from elsewhere, and its rows have to be those that mirror and receipts have seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfl_ray.errors import ConfigError, LedgerError
from medfl_ray.messages import SignedReceipt
from medfl_ray.privacy.run_accounts import job_of
from medfl_ray.store.ledger.budgets import run_of
from medfl_ray.store.ledger.events import LedgerEvent, LedgerHead, unprotected_jobs
from medfl_ray.store.ledger.export import read_export, verify_export
from medfl_ray.store.ledger.histories import is_beginning
from medfl_ray.store.ledger.mirror import History, LedgerMirror
from medfl_ray.store.run.folder import RECEIPTS, RunFolder
from medfl_ray.store.run.receipts import read_receipts, verify_receipts
from medfl_ray.store.state_folders import MIRROR_FOLDER, MIRROR_IN_RUN, state_root

LEDGERS = "ledger.json"
HOSPITALS = "hospitals.json"
Export = Mapping[str, Any]


@dataclass(frozen=True)
class Mirrored:
    """What one mirror says of an account; `is_of_run` where it was made by the run alone and ended with it."""

    name: str
    keys: tuple[str, ...]
    histories: tuple[History, ...]
    is_of_run: bool


@dataclass(frozen=True)
class Evidence:
    """All that can be held against a run's exports.

    `expected` are the hospitals that must have an export, each with the reason. `given_keys` are ledger keys from
    elsewhere: of a hospital by its name, of any under an empty name.
    """

    job: str
    receipts: Sequence[SignedReceipt]
    mirrors: Mapping[tuple[str, str], Sequence[Mirrored]]
    expected: Mapping[str, str]
    given_keys: Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Verified:
    """One account whose export agrees with all that it was compared with.

    `only_in_run` says that all of this lay in the run's folder itself.
    """

    hospital: str
    data_set: str
    head: LedgerHead
    public_key: str
    compared: tuple[str, ...]
    only_in_run: bool


def gather(run: Path, mirror: Path | None = None, given_keys: Iterable[str] = ()) -> Evidence:
    """Read what a run's folder and the mirrors of this machine say of its ledgers.

    Args:
      mirror: folder of a coordinator's mirror, beside those in the run's folder and in the state folder.
      given_keys: ledger keys, each 64 hex digits or HOSPITAL=KEY.

    Raises:
      LedgerError: a mirror was altered or cannot be read; a key is none; or there is no mirror in `mirror`.
      ReceiptError: a receipt was altered.
    """
    receipts, _ = read_receipts(run / RECEIPTS)
    verify_receipts(receipts)
    infos = _read_object(run / HOSPITALS)
    declared = {name: str(info.get("declared")) for name, info in infos.items()}
    places = [(run / MIRROR_IN_RUN, "the mirror in the run's folder", True)]
    if mirror is not None and mirror.resolve() != (run / MIRROR_IN_RUN).resolve():
        if not LedgerMirror(mirror).accounts():
            raise LedgerError(f"there is no mirror of any ledger in {mirror.name!r}; check --mirror")
        places.append((mirror, "the mirror given", False))
    own = _state_root_of(run) / MIRROR_FOLDER
    found: dict[tuple[str, str], list[Mirrored]] = {}
    for folder, name, is_of_run in [*places, (own, "the mirror in the state folder", False)]:
        copies = LedgerMirror(folder)
        for account in copies.accounts():
            # Synthetic data of another run may bear the same names, and are mirrored in their own run's folder.
            if folder == own and declared.get(account[0]) == "synthetic" and found.get(account):
                continue
            found.setdefault(account, []).append(Mirrored(name, *copies.verify(*account), is_of_run))
    job = receipts[0].job if receipts else job_of(run)
    return Evidence(
        job=job,
        receipts=receipts,
        mirrors=found,
        expected=_expected(run, receipts, infos, _charged_in(found, job)),
        given_keys=_by_hospital(given_keys),
    )


def read_exports(run: Path) -> dict[str, Export]:
    """Return the ledgers exported with a finished run, by hospital; empty ones, of hospitals without, are left out.

    Raises:
      LedgerError: there are none, or the file is damaged.
    """
    path = run / LEDGERS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"cannot read {path.name!r} in {run.name!r} ({type(error).__name__}); give the folder of a finished "
            "run with DP, or of a coordinator's mirror"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(export, dict) for export in content.values()):
        raise LedgerError(f"{path.name!r} holds {type(content).__name__}; expected one export per hospital")
    return {hospital: export for hospital, export in sorted(content.items()) if export}


def verify_exports(exports: Mapping[str, Export], evidence: Evidence) -> list[Verified]:
    """Check every export against all evidence, and that none is missing.

    Raises:
      LedgerError: names the first hospital whose export is missing, altered, signed by somebody else, or contradicted.
    """
    for hospital, reason in sorted(evidence.expected.items()):
        if hospital not in exports:
            raise LedgerError(
                f"the export of hospital {hospital!r} is missing although {reason}. An interrupted run has no "
                f"{LEDGERS} yet: finish it with medfl-ray run --resume. Of a finished run the export was removed"
            )
    for (hospital, data_set), reason in _charged_in(evidence.mirrors, evidence.job).items():
        if exports[hospital].get("data_set") != data_set:
            raise LedgerError(
                f"the export of hospital {hospital!r} is of another data set than {data_set!r}, although {reason}: the "
                "export was exchanged"
            )
    return [_verify_export(hospital, export, evidence) for hospital, export in exports.items()]


def _verify_export(hospital: str, export: Export, evidence: Evidence) -> Verified:
    head = verify_export(export)
    rows, public_key = read_export(export), str(export["public_key"])
    account = (str(export["hospital"]), str(export["data_set"]))
    if hospital != account[0]:
        raise LedgerError(f"the export under the name {hospital!r} is of hospital {account[0]!r}; the file was altered")
    compared = [*_compare_with_keys(account, public_key, evidence.given_keys)]
    replaced: list[History] = []
    for mirrored in evidence.mirrors.get(account, ()):
        replaced += _compare_with_mirror(account, public_key, rows, mirrored, evidence.job)
        compared.append(mirrored.name)
    count = _compare_with_receipts(account, rows, replaced, evidence.receipts)
    if count:
        compared.append(f"{count} receipt{'s' if count > 1 else ''}")
    elif not rows and evidence.receipts and hospital in evidence.expected:
        compared.append("the receipts, which name no row of it")
    if not compared:
        raise LedgerError(
            f"nothing says with which key hospital {hospital!r} signs: no mirror, no receipt that names its ledger, "
            "and no --key. Whoever can write the export could have signed it. Give --mirror with the coordinator's "
            f"mirror, or --key {hospital}=KEY with the hospital's public key as you know it from elsewhere"
        )
    elsewhere = any(not mirrored.is_of_run for mirrored in evidence.mirrors.get(account, ()))
    is_given = bool(_keys_given(account, evidence.given_keys))
    return Verified(*account, head, public_key, tuple(compared), not (elsewhere or is_given))


def _compare_with_keys(
    account: tuple[str, str], public_key: str, given: Mapping[str, frozenset[str]]
) -> tuple[str, ...]:
    allowed = _keys_given(account, given)
    if not allowed:
        return ()
    if public_key not in allowed:
        raise LedgerError(
            f"the export of hospital {account[0]!r} is signed with the key {public_key[:16]}..., which is not the one "
            "given with --key: somebody else signed it"
        )
    return ("the key given",)


def _keys_given(account: tuple[str, str], given: Mapping[str, frozenset[str]]) -> frozenset[str]:
    return given.get(account[0], given.get("", frozenset()))


def _compare_with_mirror(
    account: tuple[str, str], public_key: str, rows: Sequence[LedgerEvent], mirrored: Mirrored, job: str
) -> Sequence[History]:
    """Check that an export is a beginning of what a mirror holds; return the generations that were replaced by it."""
    whose = f"the export of hospital {account[0]!r}, data set {account[1]!r}"
    numbers = [n for n, history in enumerate(mirrored.histories) if rows and is_beginning(rows, history.rows)]
    if not numbers:
        if public_key not in mirrored.keys:
            raise LedgerError(
                f"{whose} is signed with the key {public_key[:16]}..., which is not pinned in {mirrored.name}: "
                "somebody else signed it. The mirror's copy is the hospital's"
            )
        if any(history.rows for history in mirrored.histories):
            raise LedgerError(
                f"{whose} contradicts {mirrored.name} from row {_first_difference(rows, mirrored)} on: one of the two "
                "was altered"
            )
        return ()
    history = mirrored.histories[numbers[-1]]
    behind = history.rows[len(rows) :]
    if behind and (mirrored.is_of_run or any(run_of(row.job or "") == job for row in behind)):
        raise LedgerError(
            f"{whose} ends at row {len(rows)} and {mirrored.name} goes on to row {len(history.rows)} with rows of this "
            "run: the export was cut, or was written before the run went on; finish it"
        )
    return mirrored.histories[: numbers[-1]]


def _compare_with_receipts(
    account: tuple[str, str],
    rows: Sequence[LedgerEvent],
    replaced: Sequence[History],
    receipts: Sequence[SignedReceipt],
) -> int:
    """Check that an export, or a history that it replaced, has each row that receipts name; return how many do."""
    count = 0
    for receipt in receipts:
        spent = receipt.spent.get(account[0])
        if spent is None or spent.ledger_head is None:
            continue
        head = LedgerHead.parse(spent.ledger_head)
        if not any(_has_row(history, head) for history in (rows, *(of.rows for of in replaced))):
            raise LedgerError(
                f"the receipt of round {receipt.round} names a row that the ledger of {account[0]} does not have: row "
                f"{head.sequence}. The export is of another history, was altered, or was cut at its end"
            )
        if spent.is_unprotected and not unprotected_jobs(rows):
            raise LedgerError(
                f"the receipt of round {receipt.round} says that the epsilon of {account[0]} is infinite; the export "
                "has no row that says so"
            )
        count += 1
    return count


def _has_row(rows: Sequence[LedgerEvent], head: LedgerHead) -> bool:
    """Say whether a history has a row, by what is in it: a hash that was copied beside other contents is none."""
    return head.sequence == 0 or (len(rows) >= head.sequence and rows[head.sequence - 1].digest() == head.hash)


def _first_difference(rows: Sequence[LedgerEvent], mirrored: Mirrored) -> int:
    common = 0
    for history in mirrored.histories:
        same = [one == other for one, other in zip(rows, history.rows, strict=False)]
        common = max(common, same.index(False) if False in same else len(same))
    return common + 1


def _expected(
    run: Path,
    receipts: Sequence[SignedReceipt],
    infos: Mapping[str, Mapping[str, Any]],
    charged: Mapping[tuple[str, str], str],
) -> dict[str, str]:
    """Return the hospitals that must have an export, and why.

    Of private data there is a ledger whatever the run protects; in runs of versions that kept one under
    differential privacy alone no hospital has spent anything, and no mirror has a row.
    """
    expected: dict[str, str] = {}
    owners = {hospital for hospital, _ in charged} & infos.keys()
    if owners or any(info.get("spent") for info in infos.values()):
        private = (name for name, info in infos.items() if info.get("declared") == "private")
        expected = dict.fromkeys(private, "its data are private and the run's hospitals keep ledgers")
    spent = (name for name, info in infos.items() if info.get("spent"))
    expected |= dict.fromkeys(spent, f"{HOSPITALS} says what it had spent")
    expected |= {hospital: reason for (hospital, _), reason in charged.items()}
    if (run / "config.yaml").is_file() and RunFolder.open(run).run.privacy.patient_level:
        expected |= dict.fromkeys(infos, "the run has patient-level differential privacy")
    for receipt in receipts:
        for hospital, of in receipt.spent.items():
            if of.ledger_head is not None:
                expected[hospital] = f"the receipt of round {receipt.round} names a row of its ledger"
    return expected


def _charged_in(mirrors: Mapping[tuple[str, str], Sequence[Mirrored]], job: str) -> dict[tuple[str, str], str]:
    """Return the accounts of which a mirror holds rows of a run, its baselines and studies included, and which."""
    return {
        account: f"{mirrored.name} holds rows of this run"
        for account, copies in mirrors.items()
        for mirrored in copies
        if any(row.job and run_of(row.job) == job for history in mirrored.histories for row in history.rows)
    }


def _state_root_of(run: Path) -> Path:
    try:
        return state_root(RunFolder.open(run).run)
    except ConfigError:
        return state_root()


def _by_hospital(given: Iterable[str]) -> dict[str, frozenset[str]]:
    keys: dict[str, frozenset[str]] = {}
    for word in given:
        hospital, _, key = word.rpartition("=")
        check_key(key)
        keys[hospital] = keys.get(hospital, frozenset()) | {key.lower()}
    return keys


def check_key(key: str) -> None:
    """Refuse what is not a public key.

    Raises:
      LedgerError: it is not 64 hex digits.
    """
    if len(key) != 64 or not set(key.lower()) <= set("0123456789abcdef"):
        raise LedgerError(f"{key[:80]!r} is not a public key; expected 64 hex digits")


def _read_object(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: info for name, info in content.items() if isinstance(info, dict)}
