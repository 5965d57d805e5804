"""medfl-ray doctor: is this machine ready, and if not, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medfl_ray.cli.machine_checks import Check


def doctor(
    data: Annotated[Path | None, typer.Option(help="Folder of images to check as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    ray: Annotated[bool, typer.Option(help="Start Ray for a moment, as a run does.")] = True,
) -> None:
    """Check Python, packages, GPU, Ray, disk, ports and data; exit 1 if something would stop a run."""
    if as_json:
        checks = list(_examine(data, ray))
        typer.echo(json.dumps({"ready": _is_ready(checks), "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        checks = _show(_examine(data, ray))
    if not _is_ready(checks):
        raise typer.Exit(1)


def _examine(data: Path | None, ray: bool) -> Iterator[Check]:
    from medfl_ray.cli import machine_checks as machine

    yield machine.check_python()
    yield machine.check_packages()
    yield machine.check_names()
    yield machine.check_processor()
    yield machine.check_gpu()
    yield machine.check_disk()
    yield machine.check_shared_memory()
    yield machine.check_state(_state_root())
    yield machine.check_ports()
    if ray:
        yield machine.check_ray()
    if data is not None:
        yield machine.check_data(data)


def _state_root() -> Path:
    from medfl_ray.store.state_folders import state_root

    return state_root()


def _is_ready(checks: list[Check]) -> bool:
    return all(check.status != "fail" for check in checks)


def _show(checks: Iterator[Check]) -> list[Check]:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    shown = []
    for check in checks:
        shown.append(check)
        line = Text.assemble((f"{check.status:<5}", colours[check.status]), f"{check.name:<14} {check.found}")
        console.print(line, soft_wrap=True)
        if check.advice:
            console.print(Text(f"{'':<20}{check.advice}"), soft_wrap=True)
    verdict = "this machine is ready" if _is_ready(shown) else "something above would stop a run"
    console.print(f"\n{verdict}")
    return shown
