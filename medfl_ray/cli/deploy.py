"""medfl-ray deploy: a model behind an address."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medfl_ray.errors import ConfigError
from medfl_ray.export.precision import VariantName

if TYPE_CHECKING:
    from serve.settings import ServeSettings


def deploy(
    model: Annotated[
        str, typer.Argument(help="Name of a registered model, or the folder of a run, a package or several packages.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; not encrypted, so only loopback is safe.")] = (
        "127.0.0.1"
    ),
    registry: Annotated[str | None, typer.Option(help="Folder or URL of the registry.")] = None,
    variant: Annotated[VariantName, typer.Option(help="Precision to serve.")] = "float32",
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores of one replica; all of this machine if absent.")
    ] = None,
    max_replicas: Annotated[int, typer.Option(min=1, help="Replicas under load.")] = 1,
    tokens: Annotated[Path | None, typer.Option(help="File of tokens; see medfl-ray tokens.")] = None,
    slicer: Annotated[
        bool, typer.Option("--slicer", help="Let 3D Slicer's MONAI Label plug-in sign in, a token as its password.")
    ] = False,
    ray_address: Annotated[str | None, typer.Option(help="Address of a Ray cluster to join.")] = None,
) -> None:
    """Serve a model over HTTP until Ctrl-C: Open Inference Protocol, volumes in and masks out, MONAI Label."""
    from serve.auth import tokens_path
    from serve.launcher import served

    scaling = {"num_cpus": cpus or _cores(), "max_replicas": max_replicas}
    settings = _settings(
        model,
        registry,
        {"variant": variant, "scaling": scaling, "tokens": tokens_path(tokens).absolute(), "slicer_sign_in": slicer},
    )
    _make_first_token(tokens_path(tokens))
    typer.echo("starting  Ray, Serve and the model")
    with served(settings, host, port, ray_address) as url, _stop_signals() as stop:
        _show(url, settings)
        stop.wait()
        typer.echo("stopping  requests that are being answered come to their end")


def _settings(model: str, registry: str | None, common: dict[str, Any]) -> ServeSettings:
    """Take the model for a folder if there is one of that name, otherwise for a registered model.

    Raises:
      ConfigError: it is neither.
    """
    from serve.replicas.sources import open_source
    from serve.settings import ServeSettings

    if registry is None and Path(model).is_dir():
        return ServeSettings.model_validate({"models": Path(model).absolute(), **common})
    settings = ServeSettings.model_validate({"registry": registry, "only": model, **common})
    known = open_source(settings).offers()
    if model not in known:
        raise ConfigError(
            f"there is no folder and no registered model {model!r}; registered are: {', '.join(known) or 'none'}. "
            "See medfl-ray models list"
        )
    if known[model].champion is None:
        raise ConfigError(f"no version of {model!r} is promoted; see medfl-ray models promote")
    return settings


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_first_token(path: Path) -> None:
    """Make a token where there is none, and show it this one time."""
    from serve.auth import add_token, read_tokens

    names = [token.name for token in read_tokens(path)]
    if names:
        typer.echo(f"tokens    {', '.join(names)}; medfl-ray tokens add NAME makes another")
        return
    typer.echo(f"token     {add_token(path, 'first')}")
    typer.echo("          it is shown this once; medfl-ray tokens add NAME makes another")


def _show(url: str, settings: ServeSettings) -> None:
    from serve.replicas.sources import open_source

    offers = open_source(settings).offers()
    names = [settings.only] if settings.only is not None else sorted(offers)
    for name in names:
        typer.echo(f"model     {name}, version {offers[name].champion}")
    typer.echo(f"url       {url}")
    typer.echo(
        f"try       curl -X POST -T scan.nii.gz -H 'Authorization: Bearer TOKEN' -o mask.nii.gz "
        f"{url}/v2/models/{names[0]}/segment"
    )
    typer.echo("          Ctrl-C ends it")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C or SIGTERM sets."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
