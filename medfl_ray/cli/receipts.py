"""medfl-ray receipts: show and verify the signed record of who trained in each round, who did not and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.cli.privacy_ledger import exports_of_run
from medfl_ray.cli.run import some_of
from medfl_ray.errors import ReceiptError

if TYPE_CHECKING:
    from medfl_ray.messages import PrivacySpent, SignedReceipt

app = typer.Typer(no_args_is_help=True)
SHOWN_NAMES = 6

Run = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command()
def show(run: Run) -> None:
    """Print each round: who was asked, who trained, who did not and why, and epsilon per hospital."""
    for receipt in _receipts(run):
        for line in _lines_of(receipt):
            typer.echo(line)


@app.command()
def verify(
    run: Run,
    key: Annotated[
        str | None, typer.Option(help="The coordinator's public key, 64 hex digits, as you know it from elsewhere.")
    ] = None,
) -> None:
    """Check every receipt's signature and order, and that the newest checkpoint and the ledgers agree with them."""
    from medfl_ray.store.receipts import verify_receipts

    receipts = _receipts(run)
    verify_receipts(receipts, key)
    _check_checkpoint(run, receipts)
    rows = _check_ledgers(run, receipts)
    published = sum(receipt.published for receipt in receipts)
    typer.echo(f"{len(receipts)} receipts are whole, in order and signed; {published} rounds were published")
    if rows:
        typer.echo(f"the ledgers of {rows} hospitals hold every row that the receipts name")
    typer.echo(f"signed by {receipts[0].public_key}")
    if key is None:
        typer.echo("compare this key with the coordinator's own, or give it with --key: whoever can write the folder")
        typer.echo("could have signed with another")


def _receipts(run: Path) -> list[SignedReceipt]:
    from medfl_ray.store.receipts import read_receipts
    from medfl_ray.store.run_folder import RECEIPTS, RunFolder

    folder = RunFolder.open(run)
    receipts, unreadable = read_receipts(folder.path / RECEIPTS)
    if not receipts:
        raise ReceiptError(f"{run.name!r} has no receipts: no round has been closed in it")
    for number in unreadable:
        typer.echo(f"note: line {number} of {RECEIPTS} cannot be read; a crash tears a line, and so does tampering")
    return receipts


def _check_checkpoint(run: Path, receipts: list[SignedReceipt]) -> None:
    """Find receipts that were cut off at the end: the newest checkpoint belongs to a round that has one.

    Raises:
      ReceiptError: it has none, or another.
    """
    from medfl_ray.params import checksum
    from medfl_ray.store.checkpoints import last_good_checkpoint

    checkpoint, _ = last_good_checkpoint(run / "checkpoints")
    if checkpoint is None:
        return
    number, attempt = checkpoint.round, checkpoint.result.receipt.attempt
    found = [receipt for receipt in receipts if (receipt.round, receipt.attempt) == (number, attempt)]
    if not found:
        raise ReceiptError(f"the checkpoint of round {number} has no receipt; the last receipts were cut off")
    if found[0].weights_after != checksum(checkpoint.weights):
        raise ReceiptError(f"the checkpoint of round {number} holds other weights than its receipt names")


def _check_ledgers(run: Path, receipts: list[SignedReceipt]) -> int:
    """Check that the exported ledgers hold the rows that receipts name; return how many hospitals that are.

    Raises:
      ReceiptError: one does not.
    """
    exports = exports_of_run(run) if (run / "ledger.json").is_file() else []
    hashes = {export["hospital"]: {row.get("hash") for row in export["events"]} for export in exports}
    named = set()
    for receipt in receipts:
        for hospital, spent in receipt.spent.items():
            if spent.ledger_head is None or hospital not in hashes:
                continue
            named.add(hospital)
            if _row_hash(spent) not in hashes[hospital]:
                raise ReceiptError(
                    f"the receipt of round {receipt.round} names a row that the ledger of {hospital} does not have"
                )
    return len(named)


def _row_hash(spent: PrivacySpent) -> str:
    from medfl_ray.store.ledger_events import LedgerHead

    return LedgerHead.parse(spent.ledger_head or "").hash


def _lines_of(receipt: SignedReceipt) -> list[str]:
    outcome = "published" if receipt.published else f"not published: {receipt.reason or 'no reason was kept'}"
    asked = "a secret cohort" if receipt.secret_cohort else some_of(receipt.asked, SHOWN_NAMES)
    lines = [f"round {receipt.round}, attempt {receipt.attempt}, {receipt.ended_at}: {outcome}", f"  asked    {asked}"]
    if receipt.trained:
        lines.append(f"  trained  {some_of(receipt.trained, SHOWN_NAMES)}")
    lines += [f"  {failure.stage:8} {failure.hospital}: {failure.reason}" for failure in receipt.failures]
    for hospital, spent in receipt.spent.items():
        lines.append(
            f"  epsilon  {hospital}: {spent.epsilon:.3f} ({spent.unit}-level, "
            f"{spent.adjacency.replace('_', '/')}, delta {spent.delta:g})"
        )
    return lines
