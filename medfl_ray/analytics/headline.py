"""The report's words and large figures: a run in one sentence and a handful of tiles."""

from __future__ import annotations

from dataclasses import dataclass

from medfl_ray.analytics.audit_words import audit_tile
from medfl_ray.analytics.figures import metric_name
from medfl_ray.analytics.summary import HospitalSummary, RunSummary, Spread
from medfl_ray.privacy.account import INFINITE, PrivacyAccount, epsilon_words, parts_words

PRIVACY_OFF = "Differential privacy was off"


@dataclass(frozen=True)
class Tile:
    """One large figure; `kind` chooses its colour."""

    kind: str
    name: str
    value: str
    more: str


def headline(summary: RunSummary) -> str:
    """Return what was trained, how well it does compared with local training, and what privacy it cost."""
    trained = sum(h.rounds_trained > 0 for h in summary.hospitals)
    first = (
        f"{trained} hospital{'s' if trained != 1 else ''} trained one {summary.config.model.type} together over "
        f"{summary.num_published} round{'s' if summary.num_published != 1 else ''} "
        f"({duration_words(summary.wall_time_s)}); images stayed where they were."
    )
    return " ".join(part for part in (first, _score_sentence(summary), _privacy_sentence(summary)) if part)


def tiles(summary: RunSummary) -> list[Tile]:
    """Return the large figures, in the order in which they are read."""
    name = metric_name(summary.metric)
    found = []
    for kind, title, value in (
        ("", f"Federated {name}", summary.federated),
        ("local", f"Local only {name}", summary.local),
        ("central", f"Central {name}", summary.central),
    ):
        if value is not None:
            found.append(Tile(kind, title, f"{value.mean:.3f}", spread_words(value)))
    if summary.federated is None:
        why = "private data: each hospital sees its own" if summary.num_suppressed else "no evaluation took place"
        found.append(Tile("", f"Federated {name}", "suppressed" if summary.num_suppressed else "none", why))
    if summary.gain is not None:
        better = sum((h.gain or 0) > 0 for h in summary.hospitals)
        more = f"{spread_words(summary.gain, signed=True)}; better at {better} of {summary.gain.count} hospitals"
        found.append(Tile("gain", "Federated minus local", f"{summary.gain.mean:+.3f}", more))
    return [*found, _privacy_tile(summary)]


def badges(summary: RunSummary) -> list[str]:
    """Return the run's kind in a few words each."""
    config = summary.config
    declared = sorted({h.declared for h in summary.hospitals} or {config.data.effective_declared})
    return [
        f"{len(summary.hospitals)} hospitals",
        f"{config.data.task}, {config.spatial_dims}D",
        config.model.type,
        f"{' and '.join(declared)} data",
        f"{config.privacy.unit}-level differential privacy" if summary.private_training else "no differential privacy",
        f"{config.aggregation.strategy}, {config.aggregation.mode} aggregation",
        *config.tags,
    ]


def small_number(value: float) -> str:
    """Return a delta as people write it: 1e-5, not 1e-05."""
    return f"{value:.2g}".replace("e-0", "e-")


def delta_words(summary: RunSummary) -> str:
    """Return the accounts' delta, or the range of them."""
    deltas = sorted({account.total.delta for account in summary.own_accounts})
    if not deltas:
        return ""
    few = small_number(deltas[0])
    return f"delta = {few}" if len(deltas) == 1 else f"delta = {few} to {small_number(deltas[-1])}"


def failure_words(hospital: HospitalSummary) -> str:
    """Return in which rounds a hospital failed; the reasons stand below the table."""
    if not hospital.failures:
        return "none"
    return _round_words([failure.round for failure in hospital.failures])


def grouped_failures(summary: RunSummary) -> list[str]:
    """Return a sentence per attempt that published nothing, then per hospital, stage and reason, with its rounds."""
    rounds: dict[tuple[str, str, str], list[int]] = {}
    for failure in (f for h in summary.hospitals for f in h.failures):
        rounds.setdefault((failure.hospital, failure.stage, failure.reason), []).append(failure.round)
    for failure in summary.baseline_failures:
        stage = f"baseline, {failure.stage}"
        rounds.setdefault((failure.hospital, stage, failure.reason), []).append(failure.round)
    attempts = [
        f"round {result.round}, attempt {result.receipt.attempt}, published nothing: {result.receipt.reason}"
        for result in summary.results
        if not result.receipt.published
    ]
    of_hospitals = [f"{h}, {stage}, {_round_words(numbers)}: {why}" for (h, stage, why), numbers in rounds.items()]
    return attempts + of_hospitals


def _round_words(numbers: list[int]) -> str:
    known = sorted({number for number in numbers if number})
    if not known:
        return "outside the rounds"
    if len(known) == 1:
        return f"round {known[0]}"
    return f"{len(known)} rounds, {known[0]} to {known[-1]}"


def duration_words(seconds: float) -> str:
    """Return a duration as a person says it."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size_words(num_bytes: int | None) -> str:
    """Return a number of bytes in decimal units."""
    if num_bytes is None:
        return "an unknown size"
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def spread_words(value: Spread, signed: bool = False) -> str:
    """Return standard deviation and range over hospitals."""
    if value.count == 1:
        return "one hospital"
    low, high = (f"{v:+.3f}" if signed else f"{v:.3f}" for v in (value.low, value.high))
    return f"SD {value.deviation:.3f} over {value.count} hospitals, {low} to {high}"


def _score_sentence(summary: RunSummary) -> str:
    federated, gain = summary.federated, summary.gain
    name = metric_name(summary.metric)
    if federated is None:
        return "Scores on private patients are suppressed." if summary.num_suppressed else ""
    sentence = f"On held-out patients the federated model reaches a mean {name} of {federated.mean:.3f}"
    if gain is None or summary.local is None:
        return f"{sentence} (standard deviation {federated.deviation:.3f} over {federated.count} hospitals)."
    side = "above" if gain.mean > 0 else "below"
    spread = f" (standard deviation {gain.deviation:.3f} over {gain.count} hospitals)" if gain.count > 1 else ""
    return (
        f"{sentence}; hospitals that train alone, with the same mechanism, reach {summary.local.mean:.3f}. "
        f"That is {abs(gain.mean):.3f} {side} local training{spread}."
    )


def terms_words(summary: RunSummary) -> str:
    """Return what is shown with every epsilon of the run: unit, delta, adjacency."""
    adjacencies = sorted({account.adjacency.replace("_", "/") for account in summary.own_accounts}) or ["add/remove"]
    parts = [f"{summary.config.privacy.unit}-level", delta_words(summary), " or ".join(adjacencies)]
    return ", ".join(part for part in parts if part)


def exposed_words(summary: RunSummary) -> str:
    """Name the hospitals of which no epsilon bounds what was revealed; empty where there are none."""
    if not summary.unprotected:
        return ""
    names = ", ".join(summary.unprotected)
    return f"Data of {names} were used without patient-level protection: the patient-level epsilon is {INFINITE}."


def _privacy_sentence(summary: RunSummary) -> str:
    exposed = exposed_words(summary)
    if not summary.private_training:
        return " ".join(filter(None, (f"{PRIVACY_OFF}: nothing bounds what the weights reveal of a patient.", exposed)))
    worst = summary.largest_account
    if worst is None:
        return f"{exposed} Nothing was charged to a privacy ledger.".strip()
    audit = audit_tile(summary.audit)
    if worst.is_unprotected:
        return f"{exposed} {_sentence_case(audit)}."
    what = "the federation has" if worst.unit == "hospital" else "no hospital's data have"
    most = "" if worst.unit == "hospital" else "more than "
    words = (
        f"In all, {what} spent {most}epsilon = {epsilon_words(worst.total.epsilon)} ({terms_words(summary)}): "
        f"{_parts(summary, worst)}; {audit}."
    )
    return " ".join(filter(None, (words, exposed)))


def _sentence_case(words: str) -> str:
    return words[:1].upper() + words[1:]


def _parts(summary: RunSummary, account: PrivacyAccount) -> str:
    beside = "the baselines" if not summary.config.evaluation.has_studies else "its baselines and studies"
    return parts_words(account).replace("its baselines and studies", beside)


def _privacy_tile(summary: RunSummary) -> Tile:
    worst = summary.largest_account
    if worst is None or not summary.private_training:
        why = "nothing was charged" if summary.private_training else "differential privacy was off"
        return Tile("eps", "Epsilon", INFINITE if summary.unprotected else "none", why)
    more = f"{terms_words(summary)}; {_parts(summary, worst)}; {audit_tile(summary.audit)}"
    return Tile("eps", "Largest epsilon spent, in all", epsilon_words(worst.total.epsilon), more)
