"""medfl-ray receipts: show and verify the signed record of who trained in each round, who did not and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.cli.run import some_of
from medfl_ray.errors import LedgerError, ReceiptError

if TYPE_CHECKING:
    from medfl_ray.messages import SignedReceipt

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
    mirror: Annotated[
        Path | None, typer.Option(help="Folder of a coordinator's mirror to compare the ledgers with.")
    ] = None,
) -> None:
    """Check every receipt's signature and order, and that the newest checkpoint and the ledgers agree with them."""
    from medfl_ray.store.run.receipts import verify_receipts

    receipts = _receipts(run)
    verify_receipts(receipts, key)
    _check_checkpoint(run, receipts)
    num_ledgers = _check_ledgers(run, receipts, mirror)
    published = sum(receipt.published for receipt in receipts)
    typer.echo(f"{len(receipts)} receipts are whole, in order and signed; {published} rounds were published")
    if num_ledgers:
        typer.echo(f"the ledgers of {num_ledgers} hospitals hold every row that the receipts name")
    typer.echo(f"signed by {receipts[0].public_key}")
    if key is None:
        typer.echo("compare this key with the coordinator's own, or give it with --key: whoever can write the folder")
        typer.echo("could have signed with another")


def _receipts(run: Path) -> list[SignedReceipt]:
    from medfl_ray.store.run.folder import RECEIPTS, RunFolder
    from medfl_ray.store.run.receipts import read_receipts

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
    from medfl_ray.store.run.checkpoints import last_good_checkpoint

    checkpoint, _ = last_good_checkpoint(run / "checkpoints")
    if checkpoint is None:
        return
    number, attempt = checkpoint.round, checkpoint.result.receipt.attempt
    found = [receipt for receipt in receipts if (receipt.round, receipt.attempt) == (number, attempt)]
    if not found:
        raise ReceiptError(f"the checkpoint of round {number} has no receipt; the last receipts were cut off")
    if found[0].weights_after != checksum(checkpoint.weights):
        raise ReceiptError(f"the checkpoint of round {number} holds other weights than its receipt names")


def _check_ledgers(run: Path, receipts: list[SignedReceipt], mirror: Path | None) -> int:
    """Check the exported ledgers and that they hold the rows that receipts name; return how many hospitals that are.

    Raises:
      ReceiptError: an export is missing, altered, or contradicts receipts or mirror.
    """
    from medfl_ray.store.run.verification import LEDGERS, gather, read_exports, verify_exports

    try:
        evidence = gather(run, mirror)
        verify_exports(read_exports(run) if (run / LEDGERS).exists() else {}, evidence)
    except LedgerError as error:
        raise ReceiptError(str(error)) from None
    return len({name for receipt in receipts for name, spent in receipt.spent.items() if spent.ledger_head is not None})


def _lines_of(receipt: SignedReceipt) -> list[str]:
    from medfl_ray.privacy.account import epsilon_words, terms

    outcome = "published" if receipt.published else f"not published: {receipt.reason or 'no reason was kept'}"
    asked = "a secret cohort" if receipt.secret_cohort else some_of(receipt.asked, SHOWN_NAMES)
    lines = [f"round {receipt.round}, attempt {receipt.attempt}, {receipt.ended_at}: {outcome}", f"  asked    {asked}"]
    if receipt.trained:
        lines.append(f"  trained  {some_of(receipt.trained, SHOWN_NAMES)}")
    lines += [f"  {failure.stage:8} {failure.hospital}: {failure.reason}" for failure in receipt.failures]
    for hospital, spent in receipt.spent.items():
        lines.append(
            f"  epsilon  {hospital}: {epsilon_words(spent.epsilon, 3)} in all so far "
            f"({terms(spent.unit, spent.delta, spent.adjacency)})"
        )
    return lines
