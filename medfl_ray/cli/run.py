"""medfl-ray run: a federation from a YAML file to report, model and receipts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.errors import ConfigError, MedflError, QuorumLost

SHOWN_NAMES = 10

if TYPE_CHECKING:
    from medfl_ray.config.run import RunConfig
    from medfl_ray.federation.run import RunOutcome
    from medfl_ray.store.registry.model_records import ModelVersion
    from medfl_ray.store.run.folder import RunFolder


def run(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run; left out with --resume.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as section.key=value; may be repeated.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Baselines beside the federation: local,central.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to continue from its last checkpoint.")] = None,
    pool: Annotated[str | None, typer.Option(help="ray (default) or local: all hospitals in one process.")] = None,
    actors: Annotated[int | None, typer.Option(help="Ray actors that share the hospitals.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Address of a Ray cluster to join.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Start the Ray dashboard, on loopback.")] = False,
) -> None:
    """Train a federation and write its report, model, ledger export and receipts."""
    overrides = [*(set_ or []), *_options(baseline, pool, actors)]
    folder = start_folder(config, resume, overrides)
    with folder.locked():
        try:
            outcome = train_folder(folder, ray_address, dashboard)
        except MedflError:
            if resume is None:
                folder.discard_if_unused()
            raise
        finish_run(folder, outcome)


def _options(baseline: str | None, pool: str | None, actors: int | None) -> list[str]:
    options = []
    if baseline is not None:
        options.append(f"federation.baselines=[{baseline}]")
    if pool is not None:
        options.append(f"federation.pool={pool}")
    if actors is not None:
        options.append(f"federation.num_actors={actors}")
    return options


def start_folder(config: Path | None, resume: Path | None, overrides: list[str]) -> RunFolder:
    """Make the folder of a new run, or open the one to resume.

    Raises:
      ConfigError: the configuration is wrong, or does not go with --resume.
    """
    from medfl_ray.config.files import load_run_config
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.federation.attacks import check_attack
    from medfl_ray.federation.planning import check_rule
    from medfl_ray.federation.studies.baselines import check_baselines
    from medfl_ray.store.run.folder import RunFolder

    if (config is None) == (resume is None):
        raise ConfigError("give either the YAML file of a new run or --resume with the folder of an earlier one")
    if resume is not None:
        if overrides:
            raise ConfigError("a resumed run keeps its configuration; leave out --set, --baseline, --pool and --actors")
        return RunFolder.open(resume)
    assert config is not None
    loaded = load_run_config(config, tuple(overrides))
    policies = list_hospitals(loaded)  # a mistake in the data's place or declaration is found before anything is made
    needed = max(loaded.federation.min_clients, loaded.federation.min_available_clients)
    if needed > len(policies):
        raise ConfigError(
            f"federation.min_clients and min_available_clients ask for {needed} hospitals; the run has "
            f"{len(policies)}: lower them or add hospitals"
        )
    check_baselines(loaded, policies)
    check_attack(loaded, policies)
    check_rule(loaded, len(policies))
    return RunFolder.create(_with_weights_pinned(loaded))


def _with_weights_pinned(run: RunConfig) -> RunConfig:
    """Write the hash of the first weights into the configuration, so that a resumed run starts from the same file."""
    from medfl_ray.export.public_weights import read_manifest

    file = run.training.initial_weights
    if file is None:
        return run
    pinned = {"initial_weights_sha256": read_manifest(file).sha256}
    return run.model_copy(update={"training": run.training.model_copy(update=pinned)})


def train_folder(folder: RunFolder, ray_address: str | None, dashboard: bool) -> RunOutcome:
    """Run what is left of a run, and show it."""
    from actors.train import drive
    from medfl_ray.cli.progress import RunDisplay
    from medfl_ray.data.sources import list_hospitals

    policies = tuple(list_hospitals(folder.run))
    with RunDisplay(folder.run) as display:
        return drive(folder.run, policies, folder.path, display.update, ray_address, dashboard)


def finish_run(folder: RunFolder, outcome: RunOutcome) -> None:
    """Write what a run leaves, say where it is, and set the exit code of one that is not complete.

    One that lost its quorum leaves a report that says so; one that was stopped leaves it to whoever resumes it.
    """
    version = None
    if outcome.completed and folder.run.output.export:
        from medfl_ray.export.onnx_export import export_run

        export_run(folder.path)
        if folder.run.output.register_model:
            version = _register(folder)
    if folder.run.output.report and outcome.ending != "stopped":
        from medfl_ray.analytics.report import write_report

        write_report(folder.path)
    if folder.run.output.mlflow is not None:
        _copy_to_mlflow(folder, outcome, version)
    folder.close()
    print_next_steps(folder, outcome)


def _copy_to_mlflow(folder: RunFolder, outcome: RunOutcome, version: ModelVersion | None) -> None:
    from medfl_ray.store.run.mlflow_tracking import MlflowRun

    try:
        copy = MlflowRun(folder.run, folder.path.name)
        copy.finish(folder.path, outcome.completed, version)
        problem = copy.problem
    except ConfigError as error:
        problem = str(error)
    if problem is not None:
        typer.echo(f"WARNING: {problem}")


def _register(folder: RunFolder) -> ModelVersion | None:
    """Register the model as a candidate; a run is complete without it, so that a registry in need is only named."""
    from medfl_ray.assembly.lineage import lineage_of_run, register_run, registered_as
    from medfl_ray.store.registry.registry import Registry

    try:
        registry, lineage = Registry(), lineage_of_run(folder.path)
        version = registered_as(registry, lineage) or register_run(registry, folder.path, lineage)
    except MedflError as error:
        typer.echo(f"WARNING: the model was not registered: {error}. Later: medfl-ray models register {folder.path}")
    else:
        typer.echo(f"registered as {version}, {version.stage}; see medfl-ray models show {version.name}")
        return version
    return None


def print_next_steps(folder: RunFolder, outcome: RunOutcome) -> None:
    path = folder.path
    stopped = outcome.ending == "stopped"
    if outcome.completed or stopped:
        typer.echo(f"\n{outcome.reason}.")
    if outcome.completed:
        for line in spent_lines(path, folder.run):
            typer.echo(line)
        typer.echo(f"results   {path}")
        if folder.run.output.report:
            typer.echo(f"report    {path / 'report.html'}")
        typer.echo("next:")
        typer.echo(f"  medfl-ray evaluate {path} --data DIR     score the model on a folder of labelled images")
        typer.echo(f"  medfl-ray predict FILE --model {path}    the mask of an image or a DICOM series")
        typer.echo(f"  medfl-ray export {path}                  write model.onnx again, with its parity check")
        typer.echo(f"  medfl-ray privacy ledger show {path}     what each hospital has spent")
    else:
        if folder.run.output.report and not stopped:
            typer.echo(f"report    {path / 'report.html'}")
        typer.echo(f"continue with: medfl-ray run --resume {path}")
    if outcome.absent:
        typer.echo(f"WARNING: never took part: {some_of(outcome.absent)}; receipts.jsonl and the report say why")
    if stopped:
        raise typer.Exit(130)
    if not outcome.completed:
        raise QuorumLost(outcome.reason)


def spent_lines(path: Path, run: RunConfig) -> list[str]:
    """Return what the run has cost: the largest epsilon with its parts and budgets, and who is not protected at all."""
    from medfl_ray.privacy.account import INFINITE, epsilon_words, largest, parts_words
    from medfl_ray.privacy.run_accounts import accounts_of_run

    try:
        accounts = accounts_of_run(path, run)
    except ConfigError as error:
        return [f"WARNING: {error}"]
    own = {name: account for name, account in accounts.items() if account.unit == run.privacy.unit}
    worst, lines = largest(own.values()), []
    if worst is not None and run.privacy.enable_dp:
        whose = "of the federation" if worst.unit == "hospital" else f"at {worst.hospital}, the largest"
        total = epsilon_words(worst.total.epsilon)
        lines.append(f"epsilon   {total} in all {whose} ({worst.terms}): {parts_words(worst)}")
    exposed = tuple(name for name, account in accounts.items() if account.is_unprotected)
    if exposed:
        lines.append(f"WARNING: the patient-level epsilon of {some_of(exposed)} is {INFINITE}")
    return lines


def some_of(names: tuple[str, ...], most: int = SHOWN_NAMES) -> str:
    """Return the first names, at most so many, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
