"""The promotion gate: what a model version must show before it may become champion. Pure: figures in, decision out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medfl_ray.messages import HEADLINES
from medfl_ray.privacy.account import INFINITE
from medfl_ray.store.registry.lineage import Figure, Lineage, is_better

MIN_AGREEMENT = 0.999
MIN_PARITY_DICE = 0.99
SHOWN_NAMES = 6
OVERRIDE = "Promote another version, or this one with a reason that is kept for good (--override)"
Outcome = Literal["passed", "failed", "unknown"]


class Gate(BaseModel):
    """What is asked of a candidate.

    metric: the first of dice, auc and accuracy that the version names when absent. least: None for no threshold.
    tolerance: how far it may stay behind the champion. worst_hospital: what every hospital that shows a figure must
    reach. when_unknown: what becomes of a figure that nobody may see, because differential privacy suppresses it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str | None = None
    least: float | None = Field(default=None, allow_inf_nan=False)
    tolerance: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    worst_hospital: float | None = Field(default=None, allow_inf_nan=False)
    when_unknown: Literal["refuse", "allow"] = "refuse"


class Check(BaseModel):
    """One thing that was looked at, and what was found."""

    model_config = ConfigDict(frozen=True)

    name: Literal["metric", "champion", "worst hospital", "parity", "privacy", "stage"]
    outcome: Outcome
    text: str


class PromotionDecision(BaseModel):
    """Whether a version may become champion, and what was found."""

    model_config = ConfigDict(frozen=True)

    allowed: bool
    checks: tuple[Check, ...]
    when_unknown: Literal["refuse", "allow"] = "refuse"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What failed."""
        return tuple(check.text for check in self.checks if check.outcome == "failed")

    @property
    def unknown(self) -> tuple[str, ...]:
        """What could not be judged."""
        return tuple(check.text for check in self.checks if check.outcome == "unknown")

    @property
    def objections(self) -> str:
        """Why a version is refused, and what can be done."""
        unknown = self.unknown if self.when_unknown == "refuse" else ()
        advice = f"Evaluate it on public images (models register --evaluation). {OVERRIDE}" if unknown else OVERRIDE
        return f"{'; '.join((*self.reasons, *unknown))}. {advice}"

    def as_details(self, gate: Gate) -> dict[str, Any]:
        """Return what the audit log keeps of it."""
        return {"gate": gate.model_dump(), "checks": [check.model_dump() for check in self.checks]}


def decide(candidate: Lineage, champion: Lineage | None, gate: Gate, withdrawn: bool = False) -> PromotionDecision:
    """Judge a version against thresholds, today's champion, its parity check and its privacy statement.

    A privacy statement with a gap and a parity check that was not passed are failures; only a figure can be unknown.
    """
    metric = gate.metric or default_metric(candidate)
    checks: tuple[Check, ...] = (
        _threshold(candidate, metric, gate.least),
        _against_champion(candidate, champion, metric, gate.tolerance),
        _worst_hospital(candidate, metric, gate.worst_hospital),
        _parity(candidate),
        _privacy(candidate),
    )
    if withdrawn:
        checks = (*checks, Check(name="stage", outcome="failed", text="the version was retired"))
    refused = ("failed", "unknown") if gate.when_unknown == "refuse" else ("failed",)
    allowed = all(check.outcome not in refused for check in checks)
    return PromotionDecision(allowed=allowed, checks=checks, when_unknown=gate.when_unknown)


def default_metric(lineage: Lineage) -> str:
    """Return the metric that a version is judged by: the first of dice, auc and accuracy that it names."""
    return next((name for name in HEADLINES if name in lineage.metrics), HEADLINES[0])


def _threshold(candidate: Lineage, metric: str, least: float | None) -> Check:
    figure = candidate.metrics.get(metric)
    if figure is None or figure.value is None:
        return Check(name="metric", outcome="unknown", text=f"{metric} is {_why_unknown(figure)}")
    found = f"{metric} is {figure.text} on {candidate.metrics_of}"
    if least is None:
        return Check(name="metric", outcome="passed", text=f"{found}; no threshold was set")
    missed = is_better(metric, least, figure.value)
    words = "misses" if missed else "reaches"
    return Check(name="metric", outcome="failed" if missed else "passed", text=f"{found}; it {words} {least:g}")


def _against_champion(candidate: Lineage, champion: Lineage | None, metric: str, tolerance: float) -> Check:
    if champion is None:
        return Check(name="champion", outcome="passed", text="there is no champion yet")
    if champion.task != candidate.task:
        text = f"the champion's task is {champion.task}, this version's {candidate.task}"
        return Check(name="champion", outcome="failed", text=text)
    new, old = candidate.metrics.get(metric), champion.metrics.get(metric)
    if new is None or old is None or new.value is None or old.value is None:
        whose = "the champion's" if new is not None and new.value is not None else "this version's"
        why = _why_unknown(old if whose == "the champion's" else new)
        return Check(name="champion", outcome="unknown", text=f"{whose} {metric} is {why}, so they cannot be compared")
    if candidate.metrics_of != champion.metrics_of:
        text = (
            f"{metric} was measured on {candidate.metrics_of} and the champion's on {champion.metrics_of}, so that "
            "they cannot be compared"
        )
        return Check(name="champion", outcome="unknown", text=text)
    allowed = old.value + tolerance if is_better(metric, 0, 1) else old.value - tolerance
    missed = is_better(metric, allowed, new.value)
    words = "more than" if missed else "no more than"
    text = f"{metric} is {new.value:.4f}, the champion's {old.value:.4f}: {words} {tolerance:g} worse"
    return Check(name="champion", outcome="failed" if missed else "passed", text=text)


def _worst_hospital(candidate: Lineage, metric: str, floor: float | None) -> Check:
    if floor is None:
        return Check(name="worst hospital", outcome="passed", text="no floor for the worst hospital was set")
    tables = candidate.hospital_metrics
    known = {name: table[metric].value for name, table in tables.items() if metric in table}
    below = sorted(name for name, value in known.items() if value is not None and is_better(metric, floor, value))
    if below:
        text = f"{metric} misses the floor {floor:g} at {_some(below)}"
        return Check(name="worst hospital", outcome="failed", text=text)
    hidden = sorted(name for name in {*tables, *candidate.data_sets} if known.get(name) is None)
    if hidden or not known:
        text = f"{metric} at {_some(hidden) or 'every hospital'} is not shown, so that the worst hospital is not known"
        return Check(name="worst hospital", outcome="unknown", text=text)
    return Check(
        name="worst hospital", outcome="passed", text=f"{metric} reaches {floor:g} at all {len(known)} hospitals"
    )


def _parity(candidate: Lineage) -> Check:
    parity = candidate.parity
    if parity is None:
        text = "the exported model was not compared with the trained one; export it again"
        return Check(name="parity", outcome="failed", text=text)
    found = f"{parity.agreement:.3%} of the labels agree and Dice is {parity.dice:.4f} on {parity.images}"
    # An image without foreground gives Dice 1, and a model that finds nothing agrees: patches must have been compared.
    passed = parity.num_patches > 0 and parity.agreement >= MIN_AGREEMENT and parity.dice >= MIN_PARITY_DICE
    if passed:
        return Check(name="parity", outcome="passed", text=found)
    text = f"{found}; expected {MIN_AGREEMENT:.1%} and {MIN_PARITY_DICE:g} on one patch at least"
    return Check(name="parity", outcome="failed", text=text)


def _privacy(candidate: Lineage) -> Check:
    privacy = candidate.privacy
    exposed = _some(sorted(privacy.unprotected))
    if privacy.unprotected and not (privacy.differential_privacy and privacy.unit == "hospital"):
        why = f"data of {exposed} were used without patient-level protection: epsilon is {INFINITE}"
        return Check(name="privacy", outcome="failed", text=why)
    if not privacy.differential_privacy:
        return Check(name="privacy", outcome="passed", text="declared as trained without differential privacy")
    gaps = [f"the epsilon of {name} is infinite" for name, s in sorted(privacy.spent.items()) if s.is_unprotected]
    gaps += [f"{name} lacks {', '.join(s.missing)}" for name, s in sorted(privacy.spent.items()) if s.missing]
    if privacy.unit == "patient":
        silent = sorted(set(candidate.data_sets) - set(privacy.spent))
        gaps += [f"{_some(silent)} has no epsilon"] if silent else []
    if not privacy.spent or privacy.unit not in ("patient", "hospital"):
        gaps.append("it names no unit" if privacy.spent else "it names nobody's epsilon")
    gaps += [
        f"{name} has another unit" for name, s in sorted(privacy.spent.items()) if s.unit not in (None, privacy.unit)
    ]
    if gaps:
        text = f"the privacy statement has gaps: {'; '.join(gaps[:SHOWN_NAMES])}"
        return Check(name="privacy", outcome="failed", text=text)
    largest = max(privacy.spent.items(), key=lambda item: item[1].epsilon or 0)
    text = f"the privacy statement is complete; most was spent by {largest[0]}: {largest[1]}"
    if privacy.unprotected:  # the released model has hospital-level privacy; their updates had none of their patients'
        text += f"; the patient-level epsilon of {exposed} is {INFINITE}"
    return Check(name="privacy", outcome="passed", text=text)


def _why_unknown(figure: Figure | None) -> str:
    if figure is None:
        return "not among its figures"
    if figure.label == "suppressed":
        return "suppressed, since it would tell of private patients"
    return "not known"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN_NAMES])
    return shown if len(names) <= SHOWN_NAMES else f"{shown} and {len(names) - SHOWN_NAMES} more"
