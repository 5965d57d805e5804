"""The report of a run, and a hospital's own: one self-contained HTML file each."""

from __future__ import annotations

import base64
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from medfl_ray.analytics.audit_words import alarm, audit_facts
from medfl_ray.analytics.disclosure import MEANING, caveats, disclosures
from medfl_ray.analytics.evaluation_report import EvaluationPart, evaluation_part
from medfl_ray.analytics.figures import comparison, epsilon_curves, learning_curves, metric_name
from medfl_ray.analytics.headline import (
    badges,
    delta_words,
    duration_words,
    exposed_words,
    failure_words,
    grouped_failures,
    headline,
    size_words,
    small_number,
    terms_words,
    tiles,
)
from medfl_ray.analytics.summary import RunSummary, summarise_run
from medfl_ray.config.run import RunConfig
from medfl_ray.messages import PrivacySpent
from medfl_ray.privacy.account import epsilon_words, remaining_words
from medfl_ray.round_times import Clock, clock_of, exact_now, has_secret_cohorts

MAX_PICTURES = 24
PACKAGES = ("medfl-ray", "torch", "monai", "ray", "dp-accounting", "onnxruntime", "onnxruntime-gpu")


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption and the words for who cannot see it."""

    png: bytes
    caption: str
    alt: str


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run's folder and return its path.

    Raises:
      ConfigError: the folder is not a run's, or one of its files is damaged.
    """
    summary = summarise_run(run_dir)
    path = run_dir / "report.html"
    pictures, num_left_out = read_pictures(summary, run_dir / "pictures")
    part = evaluation_part(run_dir, summary)
    write_page(path, render_report(summary, pictures, num_left_out, part), mode=0o644)
    return path


def render_report(
    summary: RunSummary,
    pictures: Sequence[Picture],
    num_left_out: int = 0,
    evaluation: EvaluationPart | None = None,
) -> str:
    """Return the report's HTML; `num_left_out` pictures are only mentioned."""
    figures = (learning_curves(summary), comparison(summary))
    return render_page(
        "report.html.j2",
        clock_of(has_secret_cohorts(summary.config)),
        summary=summary,
        metric_name=metric_name(summary.metric),
        headline=headline(summary),
        badges=badges(summary),
        tiles=tiles(summary),
        charts=[chart for chart in figures if chart is not None],
        evaluation=None if evaluation is None or evaluation.is_empty else evaluation,
        stopped_by_patience=evaluation is not None and evaluation.stopping.startswith("The run ended early"),
        epsilon_chart=epsilon_curves(summary),
        privacy_facts=_privacy_facts(summary),
        audit_facts=audit_facts(summary.audit),
        audit_alarm=_audit_alarm(summary),
        terms_words=terms_words(summary),
        exposed_words=exposed_words(summary),
        failure_words=failure_words,
        failures=grouped_failures(summary),
        per_label=_label_names(summary),
        pictures=pictures,
        num_more_pictures=num_left_out,
        hidden_pictures=[h.hospital for h in summary.hospitals if not h.may_show_pictures and h.rounds_asked],
        disclosures=disclosures(summary),
        meaning=MEANING,
        caveats=caveats(summary),
        export=list(export_facts(summary.export)) if summary.export else [],
        facts=_facts(summary),
        config_text=config_text(summary.config),
    )


def write_local_report(
    directory: Path,
    hospital: str,
    run: RunConfig,
    round: int,
    values: Mapping[str, float],
    patient_scores: Sequence[float],
    pictures: Sequence[bytes] = (),
    spent: PrivacySpent | None = None,
) -> Path:
    """Write a hospital's own report of its private data, readable by its owner alone, and return its path.

    Args:
      directory: the hospital's state folder; never the run's folder.
      values: the held-out metrics, unsuppressed. patient_scores: one per held-out patient, without identifiers.
    """
    shown = [
        Picture(png, f"Held-out case {number}", f"Prediction beside the truth, held-out case {number}.")
        for number, png in enumerate(pictures, start=1)
    ]
    text = render_page(
        "local.html.j2",
        hospital=hospital,
        run=run,
        round=round,
        values=values,
        patient_scores=list(patient_scores),
        pictures=shown,
        spent=spent,
    )
    folder = directory / "reports"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{datetime.now():%Y%m%d-%H%M%S}-{run.name}-{hospital}-round-{round:05d}.html"
    write_page(path, text, mode=0o600)
    return path


def read_pictures(summary: RunSummary, folder: Path) -> tuple[list[Picture], int]:
    """Return pictures of hospitals that may show them, first cases before second ones, and how many are left out."""
    found: list[tuple[int, str, Path]] = []
    allowed = {h.hospital for h in summary.hospitals if h.may_show_pictures}
    for path in folder.glob("*.png") if folder.is_dir() else ():
        hospital, _, number = path.stem.rpartition("-")
        if hospital in allowed and number.isdigit():
            found.append((int(number), hospital, path))
    chosen = sorted(sorted(found)[:MAX_PICTURES], key=lambda item: (item[1], item[0]))
    pictures = [
        Picture(path.read_bytes(), f"{name}, held-out case {number}", _alt(summary, name, number))
        for number, name, path in chosen
    ]
    return pictures, len(found) - len(chosen)


def _alt(summary: RunSummary, hospital: str, number: int) -> str:
    if summary.config.data.task == "classification":
        return f"Held-out case {number} of {hospital}: the image beside its true and predicted class."
    return (
        f"Held-out case {number} of {hospital}: a slice alone, with the true regions, and with the predicted regions."
    )


def export_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a model's manifest says of the exported file, above all whether it agrees with the trained one."""
    onnx, parity = (manifest.get("variants") or {}).get("float32") or {}, manifest.get("parity") or {}
    size = size_words(onnx.get("size_bytes"))
    sizes = "any size" if manifest.get("dynamic_space") else "the patch size"
    patch = " x ".join(str(n) for n in manifest.get("patch_size", ()))
    facts = [
        ("Parity with PyTorch", _parity_words(parity)),
        ("File", f"{onnx['file']}, {size}, opset {manifest['opset']}" if onnx else "model.onnx was not written"),
        ("Channels", ", ".join(manifest.get("channels", ()))),
        ("Labels", ", ".join(f"{value} {name}" for value, name in manifest.get("labels", {}).items())),
        ("Takes", f"{sizes}; trained on {patch} voxels" if patch else ""),
        ("SHA-256", str(onnx.get("sha256", ""))),
    ]
    return [(name, words) for name, words in facts if words]


def _parity_words(parity: Mapping[str, Any]) -> str:
    if not parity:
        return "not measured"
    return (
        f"{100 * parity['agreement']:.5g} % of labels equal, largest difference of the logits "
        f"{small_number(parity['max_abs_difference'])}, on {parity['num_patches']} patches of {parity['images']}"
    )


def config_text(config: RunConfig) -> str:
    """Return the configuration as YAML with folders and files by name alone: a path tells of who ran it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.name if isinstance(value, Path) else value

    return yaml.safe_dump(plain(config.model_dump()), sort_keys=False, allow_unicode=True)


def _label_names(summary: RunSummary) -> list[str]:
    names = list(dict.fromkeys(name for h in summary.hospitals for name in h.per_label))
    return names if len(names) > 1 else []


def _privacy_facts(summary: RunSummary) -> list[tuple[str, str]]:
    privacy = summary.config.privacy
    by_hospital = privacy.hospital_dp
    by_tree = by_hospital and privacy.hospital_level.mechanism == "tree"
    clip = f"{privacy.hospital_level.clip_norm:g} per hospital's update" if by_hospital else ""
    who = "hospital" if by_hospital else "patient"
    return [
        ("Unit", "one hospital with all its patients" if by_hospital else "one patient with all images, not one image"),
        ("Adjacency", f"zeros in the place of one {who}" if by_tree else f"add or remove one {who}"),
        ("Delta", delta_words(summary).removeprefix("delta = ")),
        ("Accountant", "Renyi" if by_tree else privacy.accountant.upper()),
        ("Clip norm", clip or f"{privacy.max_grad_norm:g} per patient gradient"),
        ("Randomness", "sampling and noise from the operating system, not from the run's seed"),
    ]


def _audit_alarm(summary: RunSummary) -> str:
    mechanism = summary.audit.mechanism if summary.audit else None
    return alarm(mechanism) if mechanism is not None and mechanism.is_exceeded else ""


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    devices = sorted({h.info.device for h in summary.hospitals if h.info})
    facts = [
        ("Rounds published", f"{summary.num_published} of {summary.planned_rounds}"),
        ("Time in rounds", duration_words(summary.wall_time_s)),
        ("Weights moved", f"{size_words(summary.num_bytes)}, float32, down and up"),
        ("Hospitals' devices", ", ".join(devices) or "not stated"),
        ("Machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"),
        ("Python", platform.python_version()),
    ]
    return facts + [(name, text) for name in PACKAGES if (text := _version(name))]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def render_page(template: str, clock: Clock = exact_now, **values: Any) -> str:
    """Fill a template of medfl_ray/analytics/templates; a name that it uses and is not given is an error."""
    environment = Environment(
        loader=PackageLoader("medfl_ray.analytics", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["small_number"] = small_number
    environment.filters["epsilon"] = epsilon_words
    environment.filters["remaining"] = remaining_words
    environment.filters["is_infinite"] = math.isinf
    environment.filters["png_uri"] = lambda data: "data:image/png;base64," + base64.b64encode(data).decode()
    environment.filters["svg_uri"] = lambda text: (
        "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()
    )
    written_at = clock().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(version=_version("medfl-ray"), written_at=written_at, **values)


def write_page(path: Path, text: str, mode: int) -> None:
    """Replace a file; it has its final permissions before the first byte is in it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
