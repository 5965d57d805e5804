"""medfl-ray models: register, compare, promote, roll back and fetch versions of models; read who did what."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.cli.bundle_weights import from_bundle

if TYPE_CHECKING:
    from medfl_ray.store.registry.model_records import ModelVersion
    from medfl_ray.store.registry.promotion import PromotionDecision
    from medfl_ray.store.registry.registry import Registry

app = typer.Typer(no_args_is_help=True)
app.command("bundle")(from_bundle)
SIGNS = {"passed": "+", "failed": "-", "unknown": "?"}

Name = Annotated[str, typer.Argument(help="Name of a model.")]
Version = Annotated[str, typer.Argument(help="Number of a version, or a stage: candidate, champion, retired.")]
Place = Annotated[
    str | None,
    typer.Option(
        "--registry", help="Folder or URL of the registry's files; MEDFL_REGISTRY, or the user's, when absent."
    ),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", help="sqlite:///FILE or postgresql://...; MEDFL_REGISTRY_DATABASE when absent."),
]
Key = Annotated[
    str | None,
    typer.Option("--key", help="The registry's public key, 64 hex digits, as you know it from elsewhere."),
]
Actor = Annotated[
    str | None, typer.Option("--actor", help="Who does this, for the audit log; the system's user when absent.")
]


class WhenUnknown(StrEnum):
    """What becomes of a version whose figures differential privacy suppresses."""

    REFUSE = "refuse"
    ALLOW = "allow"


@app.command()
def register(
    run: Annotated[Path, typer.Argument(help="Folder of a finished, exported run.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; the run's in lower case when absent.")] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Figures of medfl-ray evaluate --json on public or synthetic images, instead of the run's."),
    ] = None,
    actor: Actor = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Register a run's exported model as the next version, a candidate, with its lineage."""
    from medfl_ray.assembly.lineage import lineage_of_run, register_run

    version = register_run(_open(registry, database), run, lineage_of_run(run, evaluation), name, actor)
    typer.echo(
        f"registered as {version}, {version.stage}: {len(version.files)} files, record {version.seal.hash[:12]}..."
    )


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Name of a model; all when absent.")] = None,
    registry: Place = None,
    database: DatabaseUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, their stages, the run they come from, their figure and the largest epsilon."""
    versions = _open(registry, database).versions(name)
    if as_json:
        typer.echo(json.dumps([_document(version) for version in versions], indent=1))
        return
    if not versions:
        typer.echo("the registry holds no version; medfl-ray models register RUN adds one")
    for version in versions:
        _print_version(version)


@app.command()
def show(name: Name, version: Version = "", registry: Place = None, database: DatabaseUrl = None) -> None:
    """Print a version's record as JSON: files, lineage, figures and privacy; the champion, otherwise the newest."""
    opened = _open(registry, database)
    if not version:
        stages = {found.stage for found in opened.versions(name)}
        version = next((stage for stage in ("champion", "candidate") if stage in stages), "retired")
    typer.echo(json.dumps(_document(opened.get(name, version)), indent=1))


@app.command()
def promote(
    name: Name,
    version: Version = "candidate",
    metric: Annotated[str | None, typer.Option(help="Figure to judge by; dice, auc or accuracy when absent.")] = None,
    least: Annotated[float | None, typer.Option(help="What the mean must reach.")] = None,
    tolerance: Annotated[float, typer.Option(help="How far it may stay behind the champion.")] = 0.01,
    worst_hospital: Annotated[float | None, typer.Option(help="What every hospital must reach.")] = None,
    unknown: Annotated[
        WhenUnknown, typer.Option(help="Whether a figure that differential privacy suppresses stops it.")
    ] = WhenUnknown.REFUSE,
    override: Annotated[
        str | None, typer.Option(help="Reason to promote what the gate refuses; it is kept for good.")
    ] = None,
    actor: Actor = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a version champion if the gate lets it: figures, worst hospital, ONNX parity, privacy statement."""
    from medfl_ray.store.registry.promotion import Gate

    gate = Gate(
        metric=metric, least=least, tolerance=tolerance, worst_hospital=worst_hospital, when_unknown=unknown.value
    )
    opened = _open(registry, database)
    _print_decision(opened.promote(name, version, actor, gate, override))
    champion = opened.get(name, "champion")
    typer.echo(f"{champion} is champion" + ("" if override is None else "; the reason for the override is kept"))


@app.command()
def rollback(
    name: Name,
    reason: Annotated[str | None, typer.Option(help="Why, for the audit log.")] = None,
    actor: Actor = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Make the champion before this one champion again."""
    typer.echo(f"{_open(registry, database).rollback(name, actor, reason)} is champion again")


@app.command()
def retire(
    name: Name,
    version: Version,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    leave_none: Annotated[bool, typer.Option("--leave-none", help="Withdraw even the champion.")] = False,
    actor: Actor = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Withdraw a version: no rollback comes back to it."""
    typer.echo(f"{_open(registry, database).retire(name, version, reason, actor, leave_none)} is retired")


@app.command()
def best(
    metric: Annotated[str, typer.Option(help="Name of a figure.")] = "dice",
    task: Annotated[str | None, typer.Option(help="segmentation or classification; both when absent.")] = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Print the version with the best mean of a figure, retired ones left out."""
    found = _open(registry, database).get_best(metric, task)
    typer.echo(f"{found} ({found.stage}): {metric} {found.lineage.metrics[metric].text} on {found.lineage.metrics_of}")


@app.command()
def verify(
    package: Annotated[
        Path | None, typer.Argument(help="Folder that was fetched; the whole registry when absent.")
    ] = None,
    key: Key = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Check signatures, the audit log's chain, stages and every file's SHA-256; the first bad thing is named."""
    if package is not None:
        _verify_package(package, key)
        return
    opened = _open(registry, database, key)
    rows, versions = opened.verify()
    typer.echo(f"{rows} rows of the audit log are whole and signed; {versions} versions and all their files are whole")
    if rows:
        _say_key(opened.public_key, key)


@app.command()
def audit(
    name: Annotated[str | None, typer.Argument(help="Name of a model; all when absent.")] = None,
    registry: Place = None,
    database: DatabaseUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with hashes and signatures.")] = False,
) -> None:
    """Print who did what, when and why, checked from the first row on."""
    events = _open(registry, database).audit(name)
    if as_json:
        typer.echo(json.dumps([event.model_dump() for event in events], indent=1))
        return
    for event in events:
        details = event.details
        reason = details.get("override") or details.get("reason")
        because = f": {'override, ' if 'override' in details else ''}{reason}" if reason else ""
        refused = "".join(f"; {check['text']}" for check in details.get("checks", ()) if check["outcome"] != "passed")
        said = f"{event.sequence:5} {event.at} {event.actor} {event.action} {event.subject}/{details.get('version')}"
        typer.echo(f"{said}{because}{refused}")


@app.command()
def fetch(
    name: Name,
    into: Annotated[Path, typer.Argument(help="Folder to make; an empty one will do.")],
    version: Annotated[str, typer.Option(help="Number of a version, or a stage.")] = "champion",
    key: Key = None,
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Copy a version's package into a folder; its signature and every file's SHA-256 are checked."""
    opened = _open(registry, database, key)
    found = opened.get(name, version)
    typer.echo(f"{found} ({found.stage}) is in {opened.fetch(found, into)}")
    _say_key(opened.public_key, key)


@app.command()
def mirror(
    name: Name,
    tracking_uri: Annotated[str, typer.Argument(help="MLflow's store, as in output.mlflow.tracking_uri.")],
    registry: Place = None,
    database: DatabaseUrl = None,
) -> None:
    """Set MLflow's aliases of a model after a promotion: champion, and the newest candidate."""
    from medfl_ray.config.files import parse_model
    from medfl_ray.config.output import MlflowConfig
    from medfl_ray.store.run.mlflow_tracking import mirror_stages, open_client

    checked = parse_model(MlflowConfig, {"tracking_uri": tracking_uri}, "the store").tracking_uri
    stages: dict[int, str] = {found.version: found.stage for found in _open(registry, database).versions(name)}
    for line in mirror_stages(open_client(checked), name, stages) or ["MLflow has none of these versions"]:
        typer.echo(line)


def _open(place: str | None, database: str | None, key: str | None = None) -> Registry:
    from medfl_ray.store.registry.registry import Registry

    return Registry(place, database, public_key=key)


def _verify_package(package: Path, key: str | None) -> None:
    from medfl_ray.store.registry.package_files import verify_package

    record, signed_by = verify_package(package, key)
    typer.echo(f"{package.name} holds version {record.version} of {record.name!r}, unchanged")
    _say_key(signed_by, key)


def _say_key(public_key: str, given: str | None) -> None:
    typer.echo(f"signed by {public_key}")
    if given is None:
        typer.echo("compare this key with the registry's own, or give it with --key")


def _document(version: ModelVersion) -> dict[str, object]:
    signed = {"hash": version.seal.hash, "signed_by": version.public_key}
    return {"stage": version.stage, **version.record.model_dump(mode="json"), **signed}


def _print_version(version: ModelVersion) -> None:
    from medfl_ray.store.registry.promotion import default_metric

    lineage = version.lineage
    metric = default_metric(lineage)
    figure = lineage.metrics[metric].text if metric in lineage.metrics else "not known"
    typer.echo(f"{version}  {version.stage}, registered {version.record.at} by {version.record.actor}")
    typer.echo(f"  run      {lineage.run}, round {lineage.round}, {lineage.strategy}")
    typer.echo(f"  {metric:8} {figure} on {lineage.metrics_of}")
    typer.echo(f"  privacy  {lineage.privacy.text}")


def _print_decision(decision: PromotionDecision) -> None:
    for check in decision.checks:
        typer.echo(f"  {SIGNS[check.outcome]} {check.name}: {check.text}")
