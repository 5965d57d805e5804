"""medfl-ray tokens: who may use a served model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.errors import ConfigError

if TYPE_CHECKING:
    from serve.auth import Role

app = typer.Typer(no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option(help="File of tokens; else MEDFL_SERVE_TOKENS, else serve/tokens.json in the state.")
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Who or what will use the token, such as slicer-room-4.")],
    file: File = None,
    metrics_only: Annotated[
        bool, typer.Option("--metrics-only", help="It may read /metrics and nothing else.")
    ] = False,
    store: Annotated[bool, typer.Option("--store", help="It may also send results to the configured PACS.")] = False,
) -> None:
    """Make a token and print it once; only its SHA-256 is kept."""
    from serve.auth import add_token, tokens_path

    if metrics_only and store:
        raise ConfigError("--metrics-only and --store exclude each other; choose one")
    roles: tuple[Role, ...] = ("observe",) if metrics_only else ("infer", "observe", *(("store",) if store else ()))
    typer.echo(add_token(tokens_path(file), name, roles))


@app.command("list")
def list_(file: File = None) -> None:
    """List the names and roles of the tokens."""
    from serve.auth import read_tokens, tokens_path

    for token in read_tokens(tokens_path(file)):
        typer.echo(f"{token.name:<32} {', '.join(token.roles)}")


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="Name of the token.")],
    file: File = None,
) -> None:
    """Remove a token; a running service refuses it within seconds."""
    from serve.auth import revoke_token, tokens_path

    revoke_token(tokens_path(file), name)
    typer.echo(f"{name} is revoked")
