"""medfl-ray cluster: the token and the certificates with which the nodes of one Ray cluster know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.command()
def secrets(
    folder: Annotated[Path, typer.Argument(help="New folder for the token and the certificate authority.")],
) -> None:
    """Make a cluster's token and certificate authority; ray up copies the folder to every node."""
    from actors.cluster_secrets import make_secrets

    make_secrets(folder)
    typer.echo(f"secrets   {folder}")
    typer.echo("Keep the folder as you keep a password: whoever has it can run code on the cluster.")


@app.command()
def node(
    folder: Annotated[Path, typer.Argument(help="Folder with the cluster's secrets.")],
    names: Annotated[list[str], typer.Argument(help="Addresses and names under which other nodes reach this one.")],
    out: Annotated[Path, typer.Option(help="Folder for the node's key, certificate and ray.env.")] = Path("node"),
) -> None:
    """Make this node's certificate and the environment in which its Ray starts."""
    from actors.cluster_secrets import make_node

    make_node(folder, out, names)
    typer.echo(f"node      {out}")
