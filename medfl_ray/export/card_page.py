"""The model card as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medfl_ray.export.package import account_in
from medfl_ray.privacy.account import INFINITE, PrivacyAccount, Spending, epsilon_words, remaining_words, terms

PRIVACY_WORDS = (
    "Trained with differential privacy. `epsilon` is everything that was ever charged to the hospital's data set, as "
    "its ledger stood when the run, its baselines and its studies had been charged; the lifetime budget bounds it. Of "
    "that the columns behind it are this run's own: its rounds, bounded by the budget of the run (`privacy.epsilon`), "
    "and its baselines and studies, bounded by theirs (`privacy.extra_epsilon`). The parts have the unit, delta and "
    "adjacency of their row. Epsilons of parts do not add up: together they cost less than their sum."
)
RECEIPT_WORDS = (
    "Where the parts are not known, the run left no export of the hospital's ledger, and `epsilon` is that of the "
    "hospital's last receipt: what was charged after it is missing."
)
SPENT_HEADING = (
    "| hospital | epsilon | delta | unit | adjacency | of the run's rounds | budget of the run "
    "| of its baselines and studies | their budget | lifetime budget | remains |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def card_page(card: Mapping[str, Any]) -> str:
    """Return card.md from the fields of card.json."""
    lines = [f"# {_text(card['name'])}", ""]
    lines += [_text(card["description"]), ""] if card["description"] else []
    for heading, body in _sections(card):
        lines += [f"## {heading}", "", *body, ""]
    return "\n".join(lines)


def _sections(card: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str]]]:
    yield "Intended use", [_text(card["intended_use"])]
    yield "Not for", [f"- {_text(words)}" for words in card["not_for"]]
    yield "Model", _model(card)
    yield "Sites", _sites(card["sites"])
    yield "Results", _results(card["sites"])
    yield "Privacy", [*_privacy(card["privacy"]), "", _audit(card["audit"])]
    yield "Limits", [f"- {_text(words)}" for words in card["limits"]]
    yield "Files", _variants(card)
    yield "Provenance", [f"- {_plain(name)}: `{value}`" for name, value in card["provenance"].items() if value]


def _model(card: Mapping[str, Any]) -> list[str]:
    labels = ", ".join(f"{value} {_text(name)}" for value, name in card["labels"].items())
    prepared = card["preprocessing"]
    spacing = " x ".join(f"{edge:g}" for edge in prepared["spacing_mm"] or ()) or "as acquired"
    return [
        f"- Task: {card['task']}",
        f"- Network: {_text(card['network'])}",
        f"- Trained by: {card['strategy']}",
        f"- Channels: {', '.join(_text(name) for name in card['channels'])}",
        f"- Labels: {labels}",
        f"- Preparation: spacing in mm {spacing}; orientation {prepared['orientation'] or 'as stored'}; "
        f"intensity {prepared['intensity']}",
    ]


def _sites(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        f"| {_text(s['hospital'])} | {_text(s['data_set'])} | {s['declared']} | {s['num_patients']} "
        f"| {'secret' if s['rounds_trained'] is None else s['rounds_trained']} |"
        for s in sites
    ]
    return [
        "| hospital | data set | declared | patients, as declared | rounds trained |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _results(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        f"| {_text(site['hospital'])} | {_text(name)} | {_figure(figure)} | {figure['label']} |"
        for site in sites
        for name, figure in site["metrics"].items()
    ]
    if not rows:
        return ["No hospital has evaluated the model."]
    return ["| hospital | figure | value (95 % interval over patients) | label |", "|---|---|---|---|", *rows]


def _figure(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "not shown"
    low_high = figure["interval_95"]
    interval = f" ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else ""
    return f"{figure['value']:.3f}{interval}"


def _privacy(privacy: Mapping[str, Any]) -> list[str]:
    lines = _unprotected(privacy.get("unprotected", ()))
    if not privacy.get("differential_privacy"):
        words = _text(str(privacy.get("note", "trained without differential privacy"))).capitalize() + "."
        return [words, *lines]
    accounts = [account_in(hospital, spent) for hospital, spent in privacy.get("spent", {}).items()]
    receipts = [RECEIPT_WORDS] if any(account.moment == "receipt" for account in accounts) else []
    return [
        " ".join([PRIVACY_WORDS, *receipts]),
        *lines,
        "",
        *SPENT_HEADING,
        *(_account_row(account) for account in accounts),
    ]


def _unprotected(hospitals: Sequence[str]) -> list[str]:
    if not hospitals:
        return []
    names = ", ".join(_text(name) for name in hospitals)
    return [
        "",
        f"**Data of {names} were used without patient-level differential privacy: their patient-level epsilon is "
        f"{INFINITE}.**",
    ]


def _account_row(account: PrivacyAccount) -> str:
    total = account.total
    cells = [
        _text(account.hospital),
        epsilon_words(total.epsilon, 3),
        f"{total.delta:g}",
        account.unit,
        account.adjacency.replace("_", "/"),
        *_part(account.run, total.delta),
        *_part(account.extra, total.delta),
        "none" if total.budget is None else f"{total.budget:g}",
        remaining_words(total, 3),
    ]
    return f"| {' | '.join(cells)} |"


def _part(part: Spending | None, delta: float) -> tuple[str, str]:
    """Return a part's epsilon and its budget, with its delta where that is another than the total's."""
    if part is None:
        return "not known", "not known"
    at = "" if part.delta == delta else f" (delta {part.delta:g})"
    return epsilon_words(part.epsilon, 3) + at, "none" if part.budget is None else f"{part.budget:g}"


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "Not audited by an attack."
    return (
        f"An attack proves epsilon >= {audit['lower_bound']:.2f} at {100 * audit['confidence']:g} % confidence; "
        f"claimed for the run's rounds is {epsilon_words(audit['claimed'])} "
        f"({terms(audit['unit'], audit['delta'], audit['adjacency'])})."
    )


def _variants(card: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, variant in card["variants"].items():
        loss = variant["truth_loss"] if variant["truth_loss"] is not None else variant["dice_loss"]
        against = "true labels" if variant["truth_loss"] is not None else "float32 labels"
        measured = f"{loss:.4f} against {against}" if name != "float32" and loss is not None else "-"
        speed = f"{variant['speed']:.2f}" if variant["speed"] is not None else "-"
        rows.append(f"| {name} | `{variant['file']}` | {measured} | {speed} | {_text(variant['images']) or '-'} |")
    parity = card["parity"]
    return [
        "| variant | file | Dice lost | speed over float32 | measured on |", "|---|---|---|---|---|", *rows, "",
        f"Parity of float32 with PyTorch: {100 * parity['agreement']:.5g} % of labels equal on {parity['num_patches']} "
        f"patches of {parity['images']}.",
    ]  # fmt: skip


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _text(words: str) -> str:
    """Keep words of a configuration from being read as Markdown or HTML."""
    quoted = {"|": "\\|", "<": "&lt;", ">": "&gt;", "\n": " ", "[": "\\[", "]": "\\]", "`": "'"}
    return "".join(quoted.get(letter, letter) for letter in words)
