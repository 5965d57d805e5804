"""medfl-ray privacy ledger: show and verify what a hospital's data sets have been charged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from medfl_ray.errors import LedgerError

app = typer.Typer(no_args_is_help=True)

Run = Annotated[Path | None, typer.Argument(help="A run's folder: read the ledgers exported with it.")]
RunOrMirror = Annotated[
    Path | None, typer.Argument(help="A run's folder, or a coordinator's mirror: read the copies in it.")
]
State = Annotated[Path | None, typer.Option(help="The hospital's state folder: read the ledger itself.")]
DeltaOption = Annotated[float, typer.Option(help="Delta of the epsilon shown for a state folder.")]


@app.command()
def show(run: Run = None, state: State = None, delta: DeltaOption = 1e-5) -> None:
    """Print the charges of every account and what they cost together."""
    from medfl_ray.cli.privacy_tables import print_ledgers

    print_ledgers(_exports(run, state, delta), run)


@app.command()
def verify(
    run: RunOrMirror = None,
    state: State = None,
    delta: DeltaOption = 1e-5,
    key: Annotated[
        list[str] | None,
        typer.Option(help="A hospital's public ledger key as you know it from elsewhere, KEY or HOSPITAL=KEY."),
    ] = None,
    mirror: Annotated[Path | None, typer.Option(help="Folder of a coordinator's mirror to compare with.")] = None,
) -> None:
    """Check every row, under a key that the export does not name itself, and compare with mirror and receipts."""
    if run is not None and state is None:
        # A mirror put into a run's folder must not stand in for the run.
        is_run = any((run / name).exists() for name in ("config.yaml", "receipts.jsonl", "ledger.json"))
        lines = _verified_mirror(run) if _is_mirror(run) and not is_run else _verified_run(run, mirror, key or [])
    else:
        lines = [_verified_line(export) for export in _exports(run, state, delta)]
    for line in lines:
        typer.echo(line)


@app.command(name="accept-key")
def accept_key(
    hospital: Annotated[str, typer.Option(help="The hospital whose ledger is signed with the key.")],
    data_set: Annotated[str, typer.Option(help="The name of its data set in the ledger.")],
    key: Annotated[str, typer.Option(help="Its public key, 64 hex digits, as the hospital itself confirmed it.")],
    mirror: Annotated[
        Path | None, typer.Option(help="Folder of the coordinator's mirror; the user's own when absent.")
    ] = None,
) -> None:
    """Pin the key of a hospital's ledger in the coordinator's mirror, and write a signed receipt of it.

    Before the first contact this enrols the hospital. Later it is for a hospital that lost its key and recovered.
    """
    from medfl_ray.store.ledger.mirror import LedgerMirror
    from medfl_ray.store.run.verification import check_key
    from medfl_ray.store.state_folders import MIRROR_FOLDER, state_root

    check_key(key)
    receipt = LedgerMirror(mirror or state_root() / MIRROR_FOLDER).accept_key(hospital, data_set, key.lower())
    whose = f"hospital {hospital}, data set {data_set}"
    if receipt is None:
        typer.echo(f"{whose}: this key is pinned already; nothing was changed")
    elif receipt.earlier_key is None:
        typer.echo(f"{whose}: the key is pinned, before any contact; receipt {receipt.sequence}")
    else:
        typer.echo(f"{whose}: the key is pinned in place of {receipt.earlier_key}; receipt {receipt.sequence}")


@app.command()
def recover(
    hospital: Annotated[str, typer.Option(help="The hospital whose ledger is brought back.")],
    state: Annotated[
        Path | None,
        typer.Option(help="The hospital's state folder, in which ledger.sqlite lies or lay; the user's when absent."),
    ] = None,
    mirror: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs, or of a coordinator's mirror; the user's mirror when absent."),
    ] = None,
    delta: DeltaOption = 1e-5,
) -> None:
    """Charge what mirrors remember into a ledger that is lost, shorter, damaged or another history."""
    from medfl_ray.store.ledger.file import KEY_NAME, LEDGER_NAME
    from medfl_ray.store.ledger.recovery import recover as recover_ledger
    from medfl_ray.store.signing_key import load_key
    from medfl_ray.store.state_folders import MIRROR_FOLDER, state_root

    folders = mirror or [state_root() / MIRROR_FOLDER]
    exports = [export for folder in folders for export in _remembered(folder) if export.get("hospital") == hospital]
    if not exports:
        raise LedgerError(f"no mirror given holds a ledger of hospital {hospital!r}; check --hospital and the folders")
    place = state or state_root() / hospital
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    added = recover_ledger(place / LEDGER_NAME, exports, delta)
    for (_, data_set), count in sorted(added.items()):
        typer.echo(f"hospital {hospital}, data set {data_set}: {count} rows added; everything mirrored is charged")
    key = load_key(place / KEY_NAME).public_key
    if any(export["public_key"] != key for export in exports):
        typer.echo(f"the ledger is now signed with another key, {key}. Tell it to the coordinator's operator over a")
        typer.echo("channel that both trust; it counts from `medfl-ray privacy ledger accept-key` on")


def _is_mirror(folder: Path) -> bool:
    from medfl_ray.store.ledger.mirror_file import MIRROR_NAME

    return (folder / MIRROR_NAME).exists()


def _verified_mirror(folder: Path) -> list[str]:
    """Check a coordinator's mirror by itself: its keys, their receipts and all generations."""
    from medfl_ray.store.ledger.mirror import LedgerMirror

    lines = []
    mirror = LedgerMirror(folder)
    for hospital, data_set in mirror.accounts():
        keys, histories = mirror.verify(hospital, data_set)
        count = len(histories[-1].rows) if histories else 0
        lines.append(
            f"hospital {hospital}, data set {data_set}: {count} rows are whole and signed; generation "
            f"{len(histories)}, key {len(keys)} of those pinned; key {keys[-1]}"
        )
    return lines


def _verified_run(run: Path, mirror: Path | None, keys: list[str]) -> list[str]:
    from medfl_ray.store.run.verification import LEDGERS, gather, read_exports, verify_exports

    evidence = gather(run, mirror, keys)
    # Where hospitals must have one, a file that is gone is said to be missing for them.
    exports = read_exports(run) if (run / LEDGERS).exists() or not evidence.expected else {}
    verified = verify_exports(exports, evidence)
    if not verified:
        raise LedgerError("there is no account: nothing has been charged here")
    lines = [
        f"hospital {one.hospital}, data set {one.data_set}: {one.head.sequence} rows are whole and signed; compared "
        f"with {' and '.join(one.compared)}; head {str(one.head)[:24]}...; key {one.public_key}"
        for one in verified
    ]
    if any(one.only_in_run for one in verified):
        lines += [
            "whoever can write the run's folder could have made all that lies in it anew: compare the keys with the",
            "hospitals' own (medfl-ray privacy ledger verify --state), or give --key or --mirror",
        ]
    return lines


def _verified_line(export: Mapping[str, Any]) -> str:
    from medfl_ray.store.ledger.export import verify_export

    head = verify_export(export)
    return (
        f"hospital {export['hospital']}, data set {export['data_set']}: {head.sequence} rows are whole and signed; "
        f"head {str(head)[:24]}...; key {export['public_key']}"
    )


def _remembered(folder: Path) -> list[dict[str, Any]]:
    """Return what a folder remembers of ledgers: a coordinator's mirror, a run's own, a finished run's export."""
    from medfl_ray.store.ledger.mirror import LedgerMirror
    from medfl_ray.store.run.verification import LEDGERS, read_exports
    from medfl_ray.store.state_folders import MIRROR_IN_RUN

    places = [place for place in (folder, folder / MIRROR_IN_RUN) if _is_mirror(place)]
    copies = [LedgerMirror(place).export(*account) for place in places for account in LedgerMirror(place).accounts()]
    exports = [export for export in copies if export is not None]
    if not places or (folder / LEDGERS).exists():
        exports += [dict(export) for export in read_exports(folder).values()]
    return exports


def _exports(run: Path | None, state: Path | None, delta: float) -> list[dict[str, Any]]:
    from medfl_ray.store.run.verification import read_exports

    if (run is None) == (state is None):
        raise LedgerError("give either a run's folder or --state with a hospital's state folder")
    if run is not None:
        exports = [dict(export) for export in read_exports(run).values()]
    else:
        exports = _of_state(state or Path(), delta)
    if not exports:
        raise LedgerError("there is no account: nothing has been charged here")
    return exports


def _of_state(state: Path, delta: float) -> list[dict[str, Any]]:
    from medfl_ray.store.ledger.account import PrivacyLedger
    from medfl_ray.store.ledger.file import LEDGER_NAME, LedgerFile

    paths = sorted(state.rglob(LEDGER_NAME))
    if not paths:
        raise LedgerError(f"there is no {LEDGER_NAME!r} in {state.name!r} or below; check the state folder")
    exports = []
    for path in paths:
        for hospital, data_set in LedgerFile(path).accounts():
            exports.append(PrivacyLedger.open(path, hospital, data_set, delta, None).export())
    return exports
