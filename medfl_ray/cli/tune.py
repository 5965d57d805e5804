"""medfl-ray tune: search for the configuration with the best Dice for its epsilon and traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.errors import ConfigError
from medfl_ray.privacy.account import epsilon_words

if TYPE_CHECKING:
    from tune.journal import Trial
    from tune.search import Outcome, Search


def tune(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the search; left out with --resume.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override of the search's file, as key=value; may be repeated.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Number of trials.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a search to continue.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Address of a Ray cluster to join.")] = None,
) -> None:
    """Search over epsilon, learning rate, clip norm, steps, strategy and width; recommend a configuration."""
    search = _prepare(config, set_ or [], trials, resume)
    typer.echo(f"search    {search.folder.name}")
    typer.echo(search.terms.words)
    outcome = _run(search, ray_address)
    _finish(outcome)


def _prepare(config: Path | None, overrides: list[str], trials: int | None, resume: Path | None) -> Search:
    from tune.search import create_search, open_search
    from tune.space import load_search

    if (config is None) == (resume is None):
        raise ConfigError("give either the YAML file of a new search or --resume with the folder of an earlier one")
    if resume is not None:
        if overrides or trials is not None:
            raise ConfigError("a resumed search keeps its configuration; leave out --set and --trials")
        return open_search(resume)
    assert config is not None
    if trials is not None:
        overrides = [*overrides, f"trials={trials}"]
    return create_search(load_search(config, tuple(overrides)))


def _run(search: Search, ray_address: str | None) -> Outcome:
    from actors.cluster import connect, disconnect

    cluster = connect(ray_address)
    try:
        from tune.search import run_search

        return run_search(search, cluster.num_cpus, None if search.terms.accounting == "select" else _show)
    finally:
        disconnect()


def _show(trial: Trial) -> None:
    point = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.parameters.items())
    if trial.result is None:
        typer.echo(f"trial {trial.number:>3} {trial.state:<8} {point}: {trial.reason}")
        return
    figures = f"epsilon {epsilon_words(trial.result.epsilon):>6}  Dice {trial.result.dice:.3f}"
    typer.echo(f"trial {trial.number:>3} {trial.state:<8} {figures}  ({point})")


def _finish(outcome: Outcome) -> None:
    from tune.report import write_report
    from tune.search import forget_all_but_best, write_recommendation

    folder = outcome.search.folder
    shown = outcome.completed or outcome.search.terms.accounting != "select"
    recommended = write_recommendation(outcome) if shown else None
    if recommended is not None:
        forget_all_but_best(outcome)
        report = write_report(outcome)
        typer.echo(f"results   {folder}")
        typer.echo(f"report    {report}")
        typer.echo(f"next: medfl-ray run {recommended}")
    if not outcome.completed:
        typer.echo(f"continue with: medfl-ray tune --resume {folder}")
        raise typer.Exit(130)
    if outcome.best is None:
        raise ConfigError(f"no trial finished; {folder.name}/trials.jsonl says why each failed")
