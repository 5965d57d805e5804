"""What a run amounts to, read from its folder: pure functions over the files that a run leaves behind.

Files that a run which stopped early does not have are passed over and named in `missing`. A figure that
its hospital suppressed stays suppressed here: no mean is drawn over what may not be shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from medfl_ray.config.files import load_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError
from medfl_ray.messages import (
    HEADLINES,
    ClientFailure,
    HospitalInfo,
    Label,
    Metric,
    PrivacySpent,
    RoundResult,
    SiteEvaluation,
)
from medfl_ray.privacy.account import PrivacyAccount, largest
from medfl_ray.privacy.audit_record import AUDIT_FILE, AuditRecord
from medfl_ray.privacy.run_accounts import accounts_of_run

T = TypeVar("T")
Curve = tuple[tuple[int, float], ...]
OPTIONAL_FILES = ("hospitals.json", "evaluation.json", "baselines.json", "ledger.json", "model.json")


class LocalBaseline(BaseModel):
    """One hospital's own model on its own held-out patients."""

    metrics: dict[str, Metric] = {}
    spent: PrivacySpent | None = None
    patient_scores: tuple[float, ...] | None = None


class CentralBaseline(BaseModel):
    """The pooled model on each hospital's held-out patients."""

    metrics: dict[str, dict[str, Metric]] = {}
    spent: PrivacySpent | None = None
    patient_scores: dict[str, tuple[float, ...] | None] = {}
    curve: dict[int, float] = {}


class BaselineFigures(BaseModel):
    """baselines.json."""

    local: dict[str, LocalBaseline] = {}
    central: CentralBaseline | None = None
    failures: tuple[ClientFailure, ...] = ()


@dataclass(frozen=True)
class Spread:
    """A figure over hospitals; `deviation` is the sample standard deviation, 0 for one hospital."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class HospitalSummary:
    """One hospital's part in a run; a value is None where it was not measured or not shown.

    spending: the account's total after each round. account: what was spent when everything had been charged, the
    run's own baselines and studies included; None where nothing was.
    """

    hospital: str
    info: HospitalInfo | None
    declared: str
    curve: Curve
    federated: Metric | None
    per_label: Mapping[str, float]
    best: float | None
    local: Metric | None
    central: Metric | None
    spending: tuple[tuple[int, PrivacySpent], ...]
    account: PrivacyAccount | None
    rounds_asked: int
    rounds_trained: int
    failures: tuple[ClientFailure, ...]
    patient_scores: tuple[float, ...] | None

    @property
    def gain(self) -> float | None:
        """What the federation adds to the hospital's own model, on the same held-out patients."""
        federated, local = shown(self.federated), shown(self.local)
        return None if federated is None or local is None else federated - local

    @property
    def may_show_pictures(self) -> bool:
        """Whether the hospital's own words allow pictures outside it."""
        return self.declared in ("public", "synthetic")


@dataclass(frozen=True)
class RunSummary:
    """Everything that the report says in numbers."""

    name: str
    config: RunConfig
    metric: str
    hospitals: tuple[HospitalSummary, ...]
    results: tuple[RoundResult, ...]
    num_published: int
    wall_time_s: float
    num_bytes: int | None
    accounts: Mapping[str, PrivacyAccount]
    export: Mapping[str, Any] | None
    labels_seen: Mapping[str, frozenset[Label]]
    baseline_failures: tuple[ClientFailure, ...]
    missing: tuple[str, ...]
    audit: AuditRecord | None

    @property
    def planned_rounds(self) -> int:
        """Rounds that the configuration asked for."""
        return self.config.federation.rounds

    @property
    def private_training(self) -> bool:
        """Whether the run trained with differential privacy."""
        return self.config.privacy.enable_dp

    @property
    def never_took_part(self) -> tuple[str, ...]:
        """Hospitals whose data are not in the model."""
        return tuple(h.hospital for h in self.hospitals if h.rounds_trained == 0)

    @property
    def federated(self) -> Spread | None:
        """The federated model over the hospitals that show it."""
        return spread(shown(h.federated) for h in self.hospitals)

    @property
    def local(self) -> Spread | None:
        """Each hospital's own model on its own patients."""
        return spread(shown(h.local) for h in self.hospitals)

    @property
    def central(self) -> Spread | None:
        """The pooled model on each hospital's patients."""
        return spread(shown(h.central) for h in self.hospitals)

    @property
    def gain(self) -> Spread | None:
        """Federated minus local, hospital by hospital."""
        return spread(h.gain for h in self.hospitals)

    @property
    def own_accounts(self) -> tuple[PrivacyAccount, ...]:
        """The accounts in the run's own unit: each hospital's, or under hospital-level privacy the federation's."""
        return tuple(account for account in self.accounts.values() if account.unit == self.config.privacy.unit)

    @property
    def largest_account(self) -> PrivacyAccount | None:
        """The account on which most was spent."""
        return largest(self.own_accounts)

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Hospitals whose data were used without patient-level protection: their patient-level epsilon is infinite."""
        return tuple(name for name, account in self.accounts.items() if account.is_unprotected)

    @property
    def num_suppressed(self) -> int:
        """Hospitals whose held-out figures are not shown."""
        return sum(h.federated is not None and h.federated.value is None for h in self.hospitals)

    @property
    def mean_curve(self) -> Curve:
        """Mean over the hospitals that show a figure, per evaluated round."""
        per_round: dict[int, list[float]] = {}
        for hospital in self.hospitals:
            for number, value in hospital.curve:
                per_round.setdefault(number, []).append(value)
        most = max((len(values) for values in per_round.values()), default=0)
        return tuple((n, statistics.fmean(v)) for n, v in sorted(per_round.items()) if len(v) == most)


def shown(metric: Metric | None) -> float | None:
    """Return a metric's value where there is one and it may be shown."""
    return None if metric is None else metric.value


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean, sample standard deviation and range of the values that exist; None for none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return Spread(statistics.fmean(known), deviation, min(known), max(known), len(known))


def summarise_run(run_dir: Path) -> RunSummary:
    """Read a run's folder.

    Raises:
      ConfigError: the folder is not a run's, or one of its files is not what a run writes.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir.name!r} is not the folder of a run: it has no config.yaml")
    config = load_run_config(run_dir / "config.yaml")
    results = latest_rounds(_read_lines(run_dir / "metrics.jsonl"))
    infos = read_as(run_dir / "hospitals.json", dict[str, HospitalInfo]) or {}
    evaluations = read_as(run_dir / "evaluation.json", dict[str, SiteEvaluation]) or {}
    baselines = read_as(run_dir / "baselines.json", BaselineFigures) or BaselineFigures()
    accounts = accounts_of_run(run_dir, config)
    absent = read_as(run_dir / "failures.json", list[ClientFailure]) or []
    names = _hospital_names(config, results, infos, evaluations, absent)
    metric = headline_metric(results, evaluations)
    num_published = sum(result.receipt.published for result in results)
    audit = read_as(run_dir / AUDIT_FILE, AuditRecord)
    read = _Read(config, metric, results, infos, evaluations, baselines, accounts, absent)
    return RunSummary(
        name=config.name,
        config=config,
        metric=metric,
        hospitals=tuple(_summarise_hospital(name, read) for name in names),
        results=tuple(results),
        num_published=num_published,
        wall_time_s=sum(result.duration_s for result in results),
        num_bytes=bytes_moved(results, weights_size_bytes(run_dir / "model.safetensors")),
        accounts=accounts,
        export=read_as(run_dir / "model.json", dict[str, Any]),
        labels_seen=labels_by_kind(results, evaluations),
        baseline_failures=baselines.failures,
        missing=tuple(name for name in OPTIONAL_FILES if not (run_dir / name).is_file()),
        audit=audit if audit and audit.rounds == num_published else None,  # an audit of fewer rounds is out of date
    )


def headline_metric(results: Sequence[RoundResult], evaluations: Mapping[str, SiteEvaluation]) -> str:
    """Return the metric that the run is judged by: Dice, or AUC, or accuracy."""
    names = {n for e in evaluations.values() for n in e.metrics}
    names |= {n for r in results for metrics in r.metrics.values() for n in metrics}
    return next((name for name in HEADLINES if name in names), "dice")


def latest_rounds(results: Sequence[RoundResult]) -> list[RoundResult]:
    """Return every attempt in order, without the lines that a crash between two writes doubled."""
    return list({(r.round, r.receipt.attempt, r.receipt.published): r for r in results}.values())


def bytes_moved(results: Sequence[RoundResult], weights_bytes: int | None) -> int | None:
    """Return the bytes of weights down to the asked hospitals and up from those that trained."""
    if weights_bytes is None:
        return None
    return weights_bytes * sum(len(r.receipt.asked) + len(r.receipt.trained) for r in results)


def weights_size_bytes(path: Path) -> int | None:
    """Return the size of the tensors in a safetensors file, its header left out; None without the file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def labels_by_kind(
    results: Sequence[RoundResult], evaluations: Mapping[str, SiteEvaluation]
) -> dict[str, frozenset[Label]]:
    """Return which labels the run's figures carry, for held-out scores and for training losses."""
    kinds: dict[str, set[Label]] = {}
    tables = [metrics for result in results for metrics in result.metrics.values()]
    for metrics in [*tables, *(e.metrics for e in evaluations.values())]:
        for name, metric in metrics.items():
            kinds.setdefault("loss" if "loss" in name else "score", set()).add(metric.label)
    return {kind: frozenset(labels) for kind, labels in kinds.items()}


@dataclass(frozen=True)
class _Read:
    config: RunConfig
    metric: str
    results: Sequence[RoundResult]
    infos: Mapping[str, HospitalInfo]
    evaluations: Mapping[str, SiteEvaluation]
    baselines: BaselineFigures
    accounts: Mapping[str, PrivacyAccount]
    absent: Sequence[ClientFailure]


def _hospital_names(
    config: RunConfig,
    results: Sequence[RoundResult],
    infos: Mapping[str, HospitalInfo],
    evaluations: Mapping[str, SiteEvaluation],
    absent: Sequence[ClientFailure],
) -> list[str]:
    names = {h.id for h in config.data.hospitals} | set(infos) | set(evaluations)
    names |= {n for r in results for n in (*r.receipt.asked, *r.metrics)} | {f.hospital for f in absent}
    return sorted(names - {"central"})


def _summarise_hospital(name: str, read: _Read) -> HospitalSummary:
    tables = [(r.round, r.metrics.get(name, {}).get(read.metric)) for r in read.results if r.receipt.published]
    curve = tuple((number, m.value) for number, m in tables if m is not None and m.value is not None)
    seen = [metric for _, metric in tables if metric is not None]
    evaluation = read.evaluations.get(name)
    final = evaluation.metrics.get(read.metric) if evaluation else None
    charged = [(r.round, r.receipt.spent[name]) for r in read.results if name in r.receipt.spent]
    local = read.baselines.local.get(name, LocalBaseline())
    central = read.baselines.central.metrics.get(name, {}) if read.baselines.central else {}
    metrics = evaluation.metrics if evaluation else {}
    labels = {n.split("/", 1)[1]: m.value for n, m in metrics.items() if n.startswith("dice/") and m.value is not None}
    return HospitalSummary(
        hospital=name,
        info=read.infos.get(name),
        declared=_declared(name, read, evaluation),
        curve=curve,
        federated=final if final is not None else (seen[-1] if seen else None),
        per_label=labels,
        best=max((value for _, value in curve), default=None),
        local=local.metrics.get(read.metric),
        central=central.get(read.metric),
        spending=tuple(sorted(dict(charged).items())),  # the last word of each round
        account=read.accounts.get(name),
        rounds_asked=sum(name in r.receipt.asked for r in read.results),
        rounds_trained=sum(name in r.receipt.trained and r.receipt.published for r in read.results),
        failures=tuple(f for r in read.results for f in r.receipt.failures if f.hospital == name)
        + tuple(f for f in read.absent if f.hospital == name),
        patient_scores=evaluation.patient_scores if evaluation else None,
    )


def _declared(name: str, read: _Read, evaluation: SiteEvaluation | None) -> str:
    """Return what a hospital's data are; the strictest of its own word, its figures' labels and the configuration."""
    labels = {m.label for r in read.results for m in r.metrics.get(name, {}).values()}
    labels |= {m.label for m in evaluation.metrics.values()} if evaluation else set()
    if labels - {"public"}:
        return "private"
    if name in read.infos:
        return read.infos[name].declared
    own = {h.id: h.declared for h in read.config.data.hospitals if h.site_config is None}
    return own.get(name) or read.config.data.effective_declared


def _read_lines(path: Path) -> list[RoundResult]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(RoundResult.model_validate_json(line))
        except ValidationError:
            if number < len(lines):  # a torn last line is what a crash leaves; one in the middle is damage
                raise _not_ours(path) from None
    return results


def read_as(path: Path, kind: type[T]) -> T | None:
    """Read a JSON file of a run as the type it holds; None where the run has not come to writing it."""
    if not path.is_file():
        return None
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError:
        raise _not_ours(path) from None


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(f"{path.name!r} of run {path.parent.name!r} is damaged or was not written by a run; restore it")
