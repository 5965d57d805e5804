"""The model card: what a model is for and not for, who trained it, how good it is, what it reveals, and its limits.

card.json for programs, card.md for people; both say the same. Hospitals and data sets stand with the names that they
declared; there is no path, no case and no patient in it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from medfl_ray import __version__
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ExportError
from medfl_ray.export.card_page import card_page
from medfl_ray.export.description import PackageDescription, Variant
from medfl_ray.export.precision import VariantName
from medfl_ray.messages import HospitalInfo, Label, SignedReceipt, SiteEvaluation
from medfl_ray.privacy.audit_record import AUDIT_FILE, AuditRecord
from medfl_ray.training.scoring.intervals import interval_of_means

CARDS = ("card.json", "card.md")
T = TypeVar("T")


class CardPart(BaseModel):
    """A frozen part of the card."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CardFigure(CardPart):
    """One figure; `value` is None where it is suppressed. The interval is over patients, of public data only."""

    value: float | None
    label: Label
    interval_95: tuple[float, float] | None = None


class CardSite(CardPart):
    """One hospital, by its own declaration; `rounds_trained` is None where the run kept its cohorts secret."""

    hospital: str
    data_set: str
    declared: Literal["private", "public", "synthetic"]
    num_patients: int
    rounds_trained: int | None
    metrics: dict[str, CardFigure]


class CardAudit(CardPart):
    """What an empirical attack on the mechanism proved: a lower bound of epsilon, next to the claim."""

    unit: str
    adjacency: str
    delta: float
    claimed: float
    lower_bound: float
    confidence: float


class Provenance(CardPart):
    """Where the model comes from; `receipts_sha256` is of the file that holds the chain of signed receipts."""

    run: str
    config_hash: str
    weights_checksum: str
    rounds_published: int
    last_receipt: str | None
    signed_by: str | None
    receipts_sha256: str | None
    software: str


class ModelCard(CardPart):
    """The whole of card.json."""

    format: Literal[1] = 1
    name: str
    description: str
    task: str
    network: str
    strategy: str
    channels: tuple[str, ...]
    labels: dict[int, str]
    preprocessing: dict[str, Any]
    intended_use: str
    not_for: tuple[str, ...]
    sites: tuple[CardSite, ...]
    privacy: dict[str, Any]
    audit: CardAudit | None
    limits: tuple[str, ...]
    variants: dict[VariantName, Variant]
    parity: dict[str, Any]
    provenance: Provenance


def write_card(run_dir: Path, run: RunConfig, description: PackageDescription) -> ModelCard:
    """Write card.json and card.md of a finished run.

    Raises:
      ExportError: a file of the run is damaged.
    """
    card = model_card(run_dir, run, description)
    (run_dir / "card.json").write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (run_dir / "card.md").write_text(card_page(card.model_dump()), encoding="utf-8")
    return card


def model_card(run_dir: Path, run: RunConfig, description: PackageDescription) -> ModelCard:
    """Collect the card from a run's folder.

    Raises:
      ExportError: a file of the run is damaged.
    """
    infos = _read(run_dir / "hospitals.json", dict[str, HospitalInfo]) or {}
    evaluations = _read(run_dir / "evaluation.json", dict[str, SiteEvaluation]) or {}
    receipts = _receipts(run_dir)
    secret = any(receipt.secret_cohort for receipt in receipts)
    trained = {
        name: None if secret else sum(name in receipt.trained for receipt in receipts if receipt.published)
        for name in infos
    }
    sites = tuple(_site(info, evaluations.get(name), trained[name]) for name, info in sorted(infos.items()))
    return ModelCard(
        name=description.name,
        description=run.description,
        task=description.task,
        network=_network_words(description),
        strategy=run.aggregation.strategy,
        channels=description.channels,
        labels=description.labels,
        preprocessing=description.preprocessing.model_dump(mode="json"),
        intended_use=_intended_use(description),
        not_for=NOT_FOR,
        sites=sites,
        privacy=description.privacy,
        audit=_audit(run_dir, sum(receipt.published for receipt in receipts)),
        limits=_attack_limits(run) + _limits(description, sites),
        variants=description.variants,
        parity=description.parity,
        provenance=_provenance(run_dir, run, description, receipts),
    )


NOT_FOR = (
    "Diagnosis or treatment: this is not a medical device, and nobody has approved it as one.",
    "Images of another modality, body part or age group than those of the sites below.",
    "Decisions without a person who sees the image and can overrule the model.",
)


def _intended_use(description: PackageDescription) -> str:
    what = ", ".join(description.labels.values()) or "the classes"
    doing = "Outlining" if description.task == "segmentation" else "Telling apart"
    images = f"{description.spatial_dims}D images with the channels {', '.join(description.channels)}"
    return f"{doing} {what} in {images}, in research, prepared as the package says, with a person who reviews it."


def _network_words(description: PackageDescription) -> str:
    network = description.network
    features = ", ".join(str(width) for width in network.features)
    patch = " x ".join(str(edge) for edge in description.patch_size)
    return f"{network.type} ({features}; {network.norm} norm), trained on patches of {patch} voxels"


def _site(info: HospitalInfo, evaluation: SiteEvaluation | None, rounds_trained: int | None) -> CardSite:
    metrics = (
        {name: CardFigure(value=m.value, label=m.label) for name, m in evaluation.metrics.items()} if evaluation else {}
    )
    scores = evaluation.patient_scores if evaluation is not None else None
    dice = metrics.get("dice")
    if scores and dice is not None and dice.label == "public" and info.declared != "private":
        metrics["dice"] = dice.model_copy(update={"interval_95": interval_of_means([scores])})
    return CardSite(
        hospital=info.hospital,
        data_set=info.data_set,
        declared=info.declared,
        num_patients=info.num_patients,
        rounds_trained=rounds_trained,
        metrics=metrics,
    )


def _audit(run_dir: Path, num_published: int) -> CardAudit | None:
    """Return what an audit found; one of fewer rounds than the run has published is out of date."""
    record = _read(run_dir / AUDIT_FILE, AuditRecord)
    if record is None or record.mechanism is None or record.rounds != num_published:
        return None
    found = record.mechanism.headline
    return CardAudit(
        unit=record.mechanism.unit, adjacency=record.mechanism.adjacency, delta=found.delta, claimed=found.claimed,
        lower_bound=found.lower_bound, confidence=record.mechanism.confidence,
    )  # fmt: skip


def _attack_limits(run: RunConfig) -> tuple[str, ...]:
    if run.attack is None:
        return ()
    return (f"Of no use but for the study that made it: the run contains attackers, {run.attack.words}.",)


def _limits(description: PackageDescription, sites: tuple[CardSite, ...]) -> tuple[str, ...]:
    limits = [
        "Figures come from patients that the same hospitals held out; another hospital's images may do worse.",
        "Nobody has looked at results by age, sex, origin or scanner.",
    ]
    if any(site.declared == "synthetic" for site in sites):
        limits.append("Some or all training images are synthetic; figures on them say little about real patients.")
    if any(figure.value is None for site in sites for figure in site.metrics.values()):
        limits.append("Figures on private data are suppressed: shown, they would tell of patients.")
    absent = [site.hospital for site in sites if site.rounds_trained == 0]
    if absent:
        limits.append(f"Of no influence on the model, as no round has their training: {', '.join(absent)}.")
    if not description.dynamic_space:
        limits.append(f"The network takes one size of window only: {description.dynamic_space_note}.")
    return tuple(limits)


def _provenance(
    run_dir: Path, run: RunConfig, description: PackageDescription, receipts: list[SignedReceipt]
) -> Provenance:
    path = run_dir / "receipts.jsonl"
    last = receipts[-1] if receipts else None
    return Provenance(
        run=run.name,
        config_hash=last.config_hash if last is not None else "",
        weights_checksum=description.weights_checksum,
        rounds_published=sum(receipt.published for receipt in receipts),
        last_receipt=last.signature or None if last is not None else None,
        signed_by=last.public_key or None if last is not None else None,
        receipts_sha256=hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        software=f"medfl-ray {__version__}",
    )


def _receipts(run_dir: Path) -> list[SignedReceipt]:
    """Return the receipts; a line torn by a crash was written again when the run was resumed."""
    path, found = run_dir / "receipts.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(SignedReceipt.model_validate_json(line))
        except ValidationError:
            continue
    return found


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.is_file():
        return None
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_text(encoding="utf-8")), strict=False)
    except (ValueError, OSError):
        raise ExportError(
            f"{path.name} of the run {path.parent.name!r} is damaged; restore it from a backup, then export again"
        ) from None
