"""medfl-ray data: make, inspect, split and fetch images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.cli.data_make import make
from medfl_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from medfl_ray.data.inspection import Inspection

app = typer.Typer(no_args_is_help=True)
app.command()(make)


class Format(StrEnum):
    """Layouts of a folder of images."""

    AUTO = "auto"
    DECATHLON = "decathlon"
    NNUNET = "nnunet"
    MANIFEST = "manifest"
    DICOM = "dicom"


class Rule(StrEnum):
    """Rules that deal patients to hospitals."""

    SINGLE = "single"
    FIELD = "field"
    DIRICHLET = "dirichlet"
    IID = "iid"


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Folder of images.")],
    format: Annotated[Format, typer.Option(help="Layout of the folder.")] = Format.AUTO,
    label: Annotated[
        list[str] | None, typer.Option(help="Name of a label value, as 1=tumour; may be repeated.")
    ] = None,
    channel: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a channel; may be repeated. Every case is then read as a run on private data reads it, "
            "against these names and those of --label alone."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for pictures.png and cases.csv.")] = None,
) -> None:
    """Show what a folder holds and what is wrong with it, before any training."""
    from rich.console import Console
    from rich.progress import Progress

    from medfl_ray.data.inspection import inspect_folder

    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        names = _label_names(label or [])
        found = inspect_folder(directory, format.value, names, lambda: progress.advance(task), tuple(channel or ()))
    _show(console, directory, found)
    if out is not None:
        _write(found, out)
    if found.num_unusable:
        raise DataError(f"{found.num_unusable} of {len(found.cases)} cases cannot be used; the reasons are above")


def _label_names(named: list[str]) -> dict[int, str]:
    labels = {}
    for text in named:
        value, separator, name = text.partition("=")
        if not separator or not value.strip().isdigit() or not name.strip():
            raise ConfigError(f"--label {text!r} is not of the form value=name, for instance 1=tumour")
        labels[int(value)] = name.strip()
    return labels


def _show(console: Console, directory: Path, found: Inspection) -> None:
    from rich.table import Table

    table = Table(
        title=f"{directory.name}: {len(found.cases)} cases of {found.num_patients} patients", show_header=False
    )
    for name, value in _summary(found):
        table.add_row(name, value)
    console.print(table)
    if found.problems:
        console.print(f"[bold]{len(found.problems)} to look at[/bold]")
        for problem in found.problems:
            console.print(f"  - {problem}", markup=False, highlight=False)
    else:
        console.print("nothing to look at: every case was read and fits its label")


def _summary(found: Inspection) -> list[tuple[str, str]]:
    usable = [case for case in found.cases if not case.error]
    splits = [case.split or "unassigned" for case in found.index.cases]
    rows = [
        ("usable cases", f"{len(usable)} of {len(found.cases)}"),
        ("split", ", ".join(f"{splits.count(side)} {side}" for side in sorted(set(splits)))),
        ("channels", ", ".join(found.index.channels) or "not named"),
        ("labels", ", ".join(f"{value} {name}" for value, name in found.labels.items()) or "not named"),
    ]
    if usable:
        rows.append(("shape (voxels)", _span([case.shape for case in usable], "d")))
        rows.append(("spacing (mm)", _span([case.spacing_mm for case in usable], ".3g")))
        low, high = min(c.intensity[0] for c in usable), max(c.intensity[2] for c in usable)
        middle = sorted(c.intensity[1] for c in usable)[len(usable) // 2]
        rows.append(("intensity, channel 1", f"{low:.4g} to {high:.4g} (1st to 99th percentile), median {middle:.4g}"))
    for value, name in found.labels.items():
        volumes = sorted(case.label_ml.get(value, 0.0) for case in usable if case.label_class is None)
        if volumes:
            present = sum(v > 0 for v in volumes)
            text = (
                f"{volumes[0]:.3g} to {volumes[-1]:.3g} ml, median {volumes[len(volumes) // 2]:.3g}; in {present} cases"
            )
            rows.append((f"volume of {name}", text))
    classes = [case.label_class for case in usable if case.label_class is not None]
    rows += [(f"class {value}", f"{classes.count(value)} cases") for value in sorted(set(classes))]
    fields = sorted(key for key in set().union(*(c.fields for c in found.index.cases)) if not key.startswith("series_"))
    rows.append(("fields", ", ".join(fields) or "none"))
    return rows


def _span(values: list[tuple[int, ...]] | list[tuple[float, ...]], form: str) -> str:
    """Smallest and largest value per axis."""
    if len({len(value) for value in values}) > 1:
        return "2D and 3D images are mixed"
    axes = [(min(axis), max(axis)) for axis in zip(*values, strict=True)]
    return " x ".join(f"{a:{form}}" if f"{a:{form}}" == f"{b:{form}}" else f"{a:{form}}-{b:{form}}" for a, b in axes)


def _write(found: Inspection, out: Path) -> None:
    from medfl_ray.data.inspection import write_case_table
    from medfl_ray.data.picture_sheet import write_picture_sheet

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_case_table(found, out / "cases.csv")
        usable = [found.index.cases[case.position] for case in found.cases if not case.error]
        num_drawn = write_picture_sheet(usable, found.labels, out / "pictures.png") if usable else 0
    except OSError as error:
        raise DataError(f"cannot write into {out.name!r}: {error.strerror}; check free space and permissions") from None
    typer.echo(f"wrote {out / 'cases.csv'}" + (f" and {out / 'pictures.png'} ({num_drawn} cases)" if num_drawn else ""))


@app.command()
def split(
    directory: Annotated[Path, typer.Argument(help="Folder of images.")],
    by: Annotated[Rule, typer.Option(help="Rule that deals patients to hospitals.")] = Rule.DIRICHLET,
    format: Annotated[Format, typer.Option(help="Layout of the folder.")] = Format.AUTO,
    hospitals: Annotated[int, typer.Option(min=1, help="Number of hospitals, for dirichlet and iid.")] = 3,
    field: Annotated[str | None, typer.Option(help="Field whose values name the hospitals, for field.")] = None,
    alpha: Annotated[float, typer.Option(help="Concentration, for dirichlet; small values skew the sizes.")] = 0.5,
    holdout: Annotated[float, typer.Option(help="Fraction of patients held out per hospital.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Manifest to write: a .json or .csv file.")] = None,
) -> None:
    """Deal a folder's patients to simulated hospitals and hold some out; a patient is never divided."""
    from rich.console import Console
    from rich.table import Table

    from medfl_ray.config.data import PartitionConfig
    from medfl_ray.config.files import parse_model
    from medfl_ray.data.layouts.catalogue import discover_cases
    from medfl_ray.data.layouts.partitions import partition_patients
    from medfl_ray.data.layouts.write_manifest import deal, write_manifest

    if not 0 < holdout < 1:
        raise ConfigError(f"--holdout is {holdout}; expected a fraction between 0 and 1")
    raw = {"by": by.value, "field": field, "num_hospitals": hospitals, "alpha": alpha}
    partition = parse_model(PartitionConfig, raw, "data split")
    index = discover_cases(directory, format.value)
    dealt = deal(partition_patients(index.cases, partition, seed), holdout, seed)
    table = Table("hospital", "patients", "cases", "to train on", "held out", title=f"{directory.name} by {by.value}")
    for part in dealt:
        train, held_out = part.num_patients(part.train), part.num_patients(part.holdout)
        num_cases = len(part.train) + len(part.holdout)
        table.add_row(part.hospital, str(train + held_out), str(num_cases), str(train), str(held_out))
    Console().print(table)
    if out is not None:
        write_manifest(dealt, index, out)
        typer.echo(
            f"wrote {out}; train on it with data.directory={out} and data.partition={{by: field, field: hospital}}"
        )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Public data set: hippocampus.")],
    out: Annotated[Path, typer.Option(help="Folder to unpack into.")] = Path("data"),
    archive: Annotated[Path | None, typer.Option(help="Local archive to take instead of downloading.")] = None,
) -> None:
    """Fetch a public data set from its source."""
    from medfl_ray.data.fetch import DATA_SETS
    from medfl_ray.data.fetch import fetch as fetch_data_set
    from medfl_ray.data.layouts.catalogue import discover_cases

    folder = fetch_data_set(name, out, archive)
    index = discover_cases(folder)
    typer.echo(f"{len(index.cases)} cases in {folder} ({DATA_SETS[name].licence}); look at them with")
    typer.echo(f"  medfl-ray data inspect {folder} --out {folder}-inspection")
