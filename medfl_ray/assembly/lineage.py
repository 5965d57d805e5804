"""The lineage of a finished run's model: what its signed receipts, its evaluation and its package say together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from medfl_ray.config.run import RunConfig
from medfl_ray.errors import RegistryError
from medfl_ray.messages import HospitalInfo, Label, Metric, SignedReceipt, SiteEvaluation
from medfl_ray.store.durable import file_sha256
from medfl_ray.store.registry.lineage import DataSet, EpsilonSpent, Figure, Lineage, ParityRecord, PrivacyRecord

if TYPE_CHECKING:
    from medfl_ray.export.description import PackageDescription
    from medfl_ray.store.registry.model_records import ModelVersion
    from medfl_ray.store.registry.registry import Registry

SHOWN_NAMES = 6
SHOWN_DIGITS = 16
Evaluations = Mapping[str, SiteEvaluation]


class PublicEvaluation(BaseModel):
    """What `medfl-ray evaluate --json` writes, of images that may be shown."""

    model_config = ConfigDict(extra="ignore")

    patients: int = Field(ge=1)
    figures: dict[str, FiniteFloat]
    intervals_95: dict[str, tuple[FiniteFloat, FiniteFloat]]
    images: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


def lineage_of_run(run_dir: Path, evaluation: Path | None = None) -> Lineage:
    """Collect the lineage of a run's exported model; receipts, weights, privacy statement and package must agree.

    Args:
      evaluation: figures on public or synthetic images, which stand for the hospitals' own.

    Raises:
      ConfigError: the folder is not a run's.
      ExportError: nothing was exported.
      ReceiptError: a receipt was changed or left out.
      LedgerError: the ledgers' exports are not those that mirror and receipts saw.
      RegistryError: the package is not the one that the run's receipts lead to.
    """
    import medfl_ray
    from medfl_ray.export.description import read_description
    from medfl_ray.export.package import load_run, privacy_statement
    from medfl_ray.store.run.folder import RunFolder
    from medfl_ray.store.run.receipts import receipt_hash

    run, folder = load_run(run_dir), RunFolder.open(run_dir)
    description = read_description(run_dir)
    receipts = folder.signed_receipts()
    if not receipts or not all(receipt.signature for receipt in receipts):
        raise RegistryError(f"{run_dir.name!r} has no signed receipts, so that nothing says where its model comes from")
    if description.privacy != json.loads(json.dumps(privacy_statement(run, run_dir))):
        raise _contradicts(run_dir, "another privacy statement than the run's ledgers and receipts")
    _check_weights(run_dir, description)
    _check_ledgers(run_dir)
    infos = _read(run_dir / "hospitals.json", dict[str, HospitalInfo])
    evaluations = _read(run_dir / "evaluation.json", dict[str, SiteEvaluation])
    data_sets = _data_sets(run, infos, receipts)
    metrics, metrics_of = _means(run, evaluations) if evaluation is None else _public(evaluation)
    return Lineage(
        task=description.task,
        run=folder.job,
        round=_round_of(run_dir, receipts, description.weights_checksum),
        config_hash=run.config_hash,
        strategy=run.aggregation.strategy,
        weights_checksum=description.weights_checksum,
        receipts_head=receipt_hash(receipts[-1]),
        receipts_key=receipts[-1].public_key,
        data_sets=data_sets,
        privacy=_privacy(description.privacy),
        metrics=metrics,
        metrics_of=metrics_of,
        hospital_metrics={name: _figures(found) for name, found in sorted(evaluations.items())},
        parity=_parity(description.parity),
        medfl_ray=medfl_ray.__version__,
    )


def register_run(
    registry: Registry, run_dir: Path, lineage: Lineage, name: str | None = None, actor: str | None = None
) -> ModelVersion:
    """Register a run's package under a name, by default the run's in lower case.

    Raises:
      ConfigError: the folder is not a run's.
      RegistryError: the package is incomplete, or the registry cannot be written.
    """
    from medfl_ray.export.package import load_run

    return registry.register(name or load_run(run_dir).name.lower(), run_dir, lineage, actor)


def registered_as(registry: Registry, lineage: Lineage) -> ModelVersion | None:
    """Return the version of a run whose model is registered already: a run that is resumed ends a second time."""
    return next((version for version in registry.versions() if version.lineage == lineage), None)


def _round_of(run_dir: Path, receipts: Sequence[SignedReceipt], weights_checksum: str) -> int:
    """Return the round whose weights were exported: named by a receipt, or averaged from those that one names.

    Raises:
      RegistryError: no receipt leads to them.
    """
    from medfl_ray.aggregation.strategies import released_weights
    from medfl_ray.params import checksum
    from medfl_ray.store.run.checkpoints import best_checkpoint, last_good_checkpoint

    rounds = {receipt.weights_after: receipt.round for receipt in receipts if receipt.published}
    if weights_checksum in rounds:
        return rounds[weights_checksum]
    last, _ = last_good_checkpoint(run_dir / "checkpoints")
    for checkpoint in (last, best_checkpoint(run_dir / "checkpoints")):
        if checkpoint is None or checksum(checkpoint.weights) not in rounds:
            continue
        if checksum(released_weights(checkpoint.server_state, checkpoint.weights)) == weights_checksum:
            return checkpoint.round
    raise _contradicts(run_dir, "weights that no receipt of the run leads to")


def _check_weights(run_dir: Path, description: PackageDescription) -> None:
    """Check that model.safetensors, where it is there, holds the weights that were exported."""
    from medfl_ray.export.weights import load_weights
    from medfl_ray.models.catalogue import build_network
    from medfl_ray.params import checksum, layout_of

    path = run_dir / "model.safetensors"
    if not path.exists():
        return
    network = build_network(
        description.network,
        description.spatial_dims,
        description.num_channels,
        description.out_channels,
        False,
        description.patch_size,
    )
    if checksum(load_weights(path, layout_of(network))) != description.weights_checksum:
        raise _contradicts(run_dir, f"other weights than {path.name}")


def _check_ledgers(run_dir: Path) -> None:
    """Check the exports from which the privacy statement is computed, against the run's mirror and its receipts.

    Raises:
      LedgerError: a row was changed or left out, or an export is another history than the one that was seen.
    """
    from medfl_ray.store.run.verification import LEDGERS, gather, read_exports, verify_exports

    if (run_dir / LEDGERS).is_file():  # versions before wrote none, and state the last receipts' figures
        verify_exports(read_exports(run_dir), gather(run_dir))


def _data_sets(
    run: RunConfig, infos: Mapping[str, HospitalInfo], receipts: Sequence[SignedReceipt]
) -> dict[str, DataSet]:
    """Return the data sets of the hospitals that may have trained: of a secret cohort of all that were present."""
    from medfl_ray.config.site import SitePolicy
    from medfl_ray.data.fingerprints import data_fingerprint

    secret = any(receipt.secret_cohort for receipt in receipts)
    published = [receipt for receipt in receipts if receipt.published]
    trained = {name for receipt in published for name in (*receipt.trained, *receipt.late)}
    data_sets = {}
    for name, info in sorted(infos.items()):
        if not (secret or name in trained):
            continue
        policy = SitePolicy(
            hospital=name, data_set=info.data_set, declared=info.declared, num_patients=info.num_patients
        )
        digest, of = data_fingerprint(run, policy)
        data_sets[name] = DataSet(
            name=info.data_set, declared=info.declared, num_patients=info.num_patients, fingerprint=digest, of=of
        )
    return data_sets


def _means(run: RunConfig, evaluations: Evaluations) -> tuple[dict[str, Figure], str]:
    """Return the mean over the hospitals that show a figure, and whose patients these are."""
    names = sorted({name for evaluation in evaluations.values() for name in evaluation.metrics})
    shown = sorted(name for name, e in evaluations.items() if any(m.value is not None for m in e.metrics.values()))
    where = ", ".join(shown) if len(shown) <= SHOWN_NAMES else f"{len(shown)} hospitals"
    made = run.data.phantom
    phantoms = "" if made is None else f", phantoms {Path(made.preset).stem} of seed {made.seed}"
    whose = f"held-out patients of {where}{phantoms}" if shown else "held-out patients, whose figures are not shown"
    return {name: _mean(name, evaluations) for name in names}, whose


def _mean(name: str, evaluations: Evaluations) -> Figure:
    from medfl_ray.training.scoring.intervals import interval_of_means

    found = [(e.metrics[name], e.patient_scores) for _, e in sorted(evaluations.items()) if name in e.metrics]
    values = [metric.value for metric, _ in found if metric.value is not None]
    if not values:
        return Figure(value=None, label=_strictest(metric for metric, _ in found))
    shown = [scores for metric, scores in found if metric.value is not None]
    label = _strictest(metric for metric, _ in found if metric.value is not None)
    low, high = None, None
    if name == "dice" and all(shown):  # a patient's figure is its Dice; an AUC is no mean over patients
        low, high = interval_of_means([scores for scores in shown if scores])
    return Figure(value=sum(values) / len(values), low=low, high=high, label=label)


def _figures(evaluation: SiteEvaluation) -> dict[str, Figure]:
    return {name: _mean(name, {evaluation.hospital: evaluation}) for name in sorted(evaluation.metrics)}


def _strictest(metrics: Iterable[Metric]) -> Label:
    order: tuple[Label, ...] = ("suppressed", "unprotected", "charged", "public")
    return min((metric.label for metric in metrics), key=order.index, default="suppressed")


def _public(path: Path) -> tuple[dict[str, Figure], str]:
    """Read the figures of an evaluation on public or synthetic images.

    Images are identified by a hash, so that figures of the same images are compared; file names prove nothing.
    """
    found = _read(path, PublicEvaluation)
    figures = {}
    for name, value in found.figures.items():
        low, high = found.intervals_95.get(name, (None, None))
        figures[name] = Figure(value=value, low=low, high=high, label="public")
    if found.images is None:  # compared with no other evaluation
        return figures, f"{found.patients} patients of the evaluation {file_sha256(path)[:SHOWN_DIGITS]}"
    return figures, f"{found.patients} patients of the open images {found.images[:SHOWN_DIGITS]}"


def _privacy(statement: Mapping[str, Any]) -> PrivacyRecord:
    needed = ("epsilon", "delta", "unit", "adjacency")
    spent = {
        str(name): EpsilonSpent.model_validate(
            {
                **dict.fromkeys(needed),
                **{field: value for field, value in entry.items() if field in EpsilonSpent.model_fields},
            }
        )
        for name, entry in (statement.get("spent") or {}).items()
    }
    return PrivacyRecord(
        differential_privacy=bool(statement.get("differential_privacy")),
        unit=statement.get("unit"),
        spent=spent,
        unprotected=tuple(statement.get("unprotected") or ()),
    )


def _parity(parity: Mapping[str, Any]) -> ParityRecord | None:
    try:
        return ParityRecord(**{name: parity[name] for name in ParityRecord.model_fields})
    except (KeyError, ValidationError):
        return None


def _read(path: Path, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise RegistryError(f"there is no {path.name!r}; continue the run with medfl-ray run --resume") from None
    except (OSError, ValidationError):
        raise RegistryError(
            f"{path.name!r} of {path.parent.name!r} is damaged, or of another kind; restore it"
        ) from None


def _contradicts(run_dir: Path, what: str) -> RegistryError:
    return RegistryError(f"model.json of {run_dir.name!r} has {what}; export it again: medfl-ray export RUN")
