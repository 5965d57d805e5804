"""medfl-ray simulate: a federation of virtual hospitals on the cores of one machine, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.cli.run import finish_run, start_folder
from medfl_ray.errors import MedflError

if TYPE_CHECKING:
    from medfl_ray.federation.run import RunOutcome
    from medfl_ray.store.run.folder import RunFolder


def simulate(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run; left out with --resume.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as section.key=value; may be repeated.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a simulation to continue.")] = None,
    exact: Annotated[
        bool, typer.Option(help="Train every hospital alone, with PyTorch's own operations: federation.exact.")
    ] = False,
    actors: Annotated[
        int | None, typer.Option(help="Processes that share the hospitals; one per core if absent.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Address of a Ray cluster to join.")] = None,
) -> None:
    """Simulate a federation: thousands of hospitals that share a few processes, with the result of a run."""
    overrides = [*(set_ or [])]
    if resume is None:
        overrides.append("federation.pool=virtual")
    if exact:
        overrides.append("federation.exact=true")
    if actors is not None:
        overrides.append(f"federation.num_actors={actors}")
    folder = start_folder(config, resume, overrides)
    with folder.locked():
        try:
            outcome = _simulate(folder, ray_address)
        except MedflError:
            if resume is None:
                folder.discard_if_unused()
            raise
        finish_run(folder, outcome)


def _simulate(folder: RunFolder, ray_address: str | None) -> RunOutcome:
    from actors.train import drive
    from medfl_ray.cli.simulation_display import SimulationDisplay
    from medfl_ray.data.sources import list_hospitals

    policies = tuple(list_hospitals(folder.run))
    with SimulationDisplay(folder.run.federation.rounds) as display:
        return drive(folder.run, policies, folder.path, display.update, ray_address)
