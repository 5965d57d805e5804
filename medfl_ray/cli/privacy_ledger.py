"""medfl-ray privacy ledger: show and verify what a hospital's data sets have been charged."""

from __future__ import annotations

import json
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
    from medfl_ray.cli.privacy_tables import print_ledger

    for export in _exports(run, state, delta):
        print_ledger(export)


@app.command()
def verify(run: RunOrMirror = None, state: State = None, delta: DeltaOption = 1e-5) -> None:
    """Check every row's order, hash, signature and meaning; the first bad row is named."""
    from medfl_ray.store.ledger_export import verify_export

    for export in _remembered(run) if run is not None and state is None else _exports(run, state, delta):
        head = verify_export(export)
        typer.echo(
            f"hospital {export['hospital']}, data set {export['data_set']}: {head.sequence} rows are whole and signed; "
            f"head {str(head)[:24]}..."
        )


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
    from medfl_ray.store.ledger_file import LEDGER_NAME
    from medfl_ray.store.ledger_recovery import recover as recover_ledger
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


def _remembered(folder: Path) -> list[dict[str, Any]]:
    """Return what a folder remembers of ledgers: a coordinator's mirror, a run's own, a finished run's export."""
    from medfl_ray.store.ledger_mirror import MIRROR_NAME, LedgerMirror
    from medfl_ray.store.state_folders import MIRROR_IN_RUN

    places = [place for place in (folder, folder / MIRROR_IN_RUN) if (place / MIRROR_NAME).exists()]
    copies = [LedgerMirror(place).export(*account) for place in places for account in LedgerMirror(place).accounts()]
    exports = [export for export in copies if export is not None]
    return [*exports, *exports_of_run(folder)] if not places or (folder / "ledger.json").exists() else exports


def _exports(run: Path | None, state: Path | None, delta: float) -> list[dict[str, Any]]:
    if (run is None) == (state is None):
        raise LedgerError("give either a run's folder or --state with a hospital's state folder")
    exports = exports_of_run(run) if run is not None else _of_state(state or Path(), delta)
    if not exports:
        raise LedgerError("there is no account: nothing has been charged here")
    return exports


def exports_of_run(run: Path) -> list[dict[str, Any]]:
    """Return the ledgers that were exported with a finished run.

    Raises:
      LedgerError: there are none, or the file is damaged.
    """
    path = run / "ledger.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"cannot read {path.name!r} in {run.name!r} ({type(error).__name__}); give the folder of a finished "
            "run with DP, or of a coordinator's mirror"
        ) from None
    if not isinstance(content, dict):
        raise LedgerError(f"{path.name!r} holds {type(content).__name__}; expected one export per hospital")
    return [export for _, export in sorted(content.items()) if export]


def _of_state(state: Path, delta: float) -> list[dict[str, Any]]:
    from medfl_ray.store.ledger import PrivacyLedger
    from medfl_ray.store.ledger_file import LEDGER_NAME, LedgerFile

    paths = sorted(state.rglob(LEDGER_NAME))
    if not paths:
        raise LedgerError(f"there is no {LEDGER_NAME!r} in {state.name!r} or below; check the state folder")
    exports = []
    for path in paths:
        for hospital, data_set in LedgerFile(path).accounts():
            exports.append(PrivacyLedger.open(path, hospital, data_set, delta, None).export())
    return exports
