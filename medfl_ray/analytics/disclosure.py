"""What was private in a run and what was not: one line per kind of figure, in plain words."""

from __future__ import annotations

from dataclasses import dataclass

from medfl_ray.analytics.headline import exposed_words
from medfl_ray.analytics.summary import RunSummary
from medfl_ray.messages import Label

MEANING: dict[Label, str] = {
    "public": "Derived from public or synthetic data, or declared in public by the hospital itself.",
    "charged": "Computed from patients, released under differential privacy and paid for in the hospital's ledger.",
    "suppressed": "Computed inside the hospital and not shown outside it.",
    "unprotected": "Computed from private data and shown without differential privacy. It may reveal patients.",
}


@dataclass(frozen=True)
class Disclosure:
    """One kind of figure, how it is labelled, and why."""

    kind: str
    labels: tuple[Label, ...]
    words: str


def disclosures(summary: RunSummary) -> tuple[Disclosure, ...]:
    """Return what left the hospitals, what the report shows, and what stayed."""
    return (
        Disclosure("Weight updates, final weights", (_weights_label(summary),), _weights_words(summary)),
        Disclosure("Scores on held-out patients", _score_labels(summary, "score"), _score_words(summary)),
        Disclosure(
            "Training loss", _score_labels(summary, "loss"), "The mean over the patients drawn; labelled like a score."
        ),
        Disclosure(
            "Scores of single patients", (_case_label(summary),), _case_words(summary, "Shown without identifiers.")
        ),
        Disclosure("Pictures", (_case_label(summary),), _case_words(summary, "A few held-out cases per hospital.")),
        Disclosure(
            "Number of patients",
            ("public",),
            "The rounded number that each hospital declares; sample rate, delta and weight derive from it, never "
            "from counting files.",
        ),
        Disclosure(
            "Epsilon, noise, rounds, steps",
            ("public",),
            "Follow from the plan and from declared numbers alone, not from the patients.",
        ),
        Disclosure(
            "Who took part, failures, durations",
            ("public",),
            "Reasons hold no identifier. Durations are not protected by differential privacy.",
        ),
        Disclosure(
            "Images, labels, identifiers",
            ("suppressed",),
            "Never part of a message: they do not leave the hospital's process, the pictures above apart.",
        ),
    )


def caveats(summary: RunSummary) -> tuple[str, ...]:
    """Return what the guarantees of this run do not cover."""
    words = [
        "Aggregation mode is plain: the coordinator sees each hospital's own update, not only their sum. "
        + _against_the_coordinator(summary),
        "One Ray cluster is one trust domain: whoever can reach it can run code on it.",
        "Nothing here protects against a hospital host that is itself compromised.",
    ]
    if summary.config.privacy.patient_level:
        words.append(
            "The guarantee is (epsilon, delta) for one patient's data at one hospital, add/remove adjacency. A patient "
            "known to several hospitals is protected by the sum of what they spent."
        )
        words.append(
            "A hospital's epsilon counts everything ever charged to its data set, earlier runs, baselines and studies "
            "included, as its ledger stood at the end of this run. The budget of the run bounds its rounds alone; the "
            "lifetime budget bounds everything."
        )
    if summary.unprotected:
        words.append(exposed_words(summary))
    return tuple(words)


def _against_the_coordinator(summary: RunSummary) -> str:
    if summary.config.privacy.patient_level:
        return (
            "Each update is noised at the hospital before it leaves, so that the epsilon above holds against the "
            "coordinator too."
        )
    if summary.config.privacy.hospital_dp:
        return (
            "Updates reach the coordinator without noise, so that the hospital-level epsilon above holds against "
            "whoever sees what it publishes, and not against the coordinator itself."
        )
    return "Without differential privacy an update may reveal patients to the coordinator."


def _weights_label(summary: RunSummary) -> Label:
    if summary.private_training:
        return "charged"
    return "public" if all(h.declared != "private" for h in summary.hospitals) else "unprotected"


def _weights_words(summary: RunSummary) -> str:
    if summary.config.privacy.hospital_dp:
        return "Clipped per hospital; their sum is noised by the coordinator; the cost is in the federation's ledger."
    words = {
        "charged": "Clipped per patient and noised inside the hospital before they leave; the cost is in its ledger.",
        "public": "Trained without differential privacy on public or synthetic data.",
        "unprotected": "Trained without differential privacy on private data: the weights may reveal patients.",
    }
    return words[_weights_label(summary)]


def _score_labels(summary: RunSummary, kind: str) -> tuple[Label, ...]:
    seen = summary.labels_seen.get(kind, frozenset())
    return tuple(label for label in MEANING if label in seen) or ("suppressed",)


def _score_words(summary: RunSummary) -> str:
    labels = _score_labels(summary, "score")
    if "score" not in summary.labels_seen:
        return "None was measured."
    if labels == ("suppressed",):
        return "A score on private patients is itself a release; each hospital has it in its own local report."
    if "suppressed" in labels:
        return "Shown for hospitals whose data are public or synthetic; of private data only the hospital sees them."
    if "unprotected" in labels:
        return "Computed on private patients and shown as they are, because differential privacy is off."
    return "The patients are public or synthetic, so that their scores may be shown."


def _case_label(summary: RunSummary) -> Label:
    return "public" if any(h.may_show_pictures for h in summary.hospitals) else "suppressed"


def _case_words(summary: RunSummary, words: str) -> str:
    if all(h.may_show_pictures for h in summary.hospitals):
        return f"All data are public or synthetic. {words}"
    if any(h.may_show_pictures for h in summary.hospitals):
        return f"Only of hospitals whose data are public or synthetic. {words}"
    return "The data are private: only the hospital's own local report, in its own state folder, has them."
