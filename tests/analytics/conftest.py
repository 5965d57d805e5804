"""A run's folder as a run writes it, built from the messages' own classes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from medfl_ray.config.files import dump_yaml, parse_run_config
from medfl_ray.messages import (
    ClientFailure,
    HospitalInfo,
    Metric,
    PrivacySpent,
    Receipt,
    RoundResult,
    SiteEvaluation,
)

HOSPITALS = ("charite", "leuven", "oslo", "porto")
NUM_PARAMETERS = 1000
RUN_NOISE = 0.7


def metric(value: float, private: bool) -> Metric:
    return Metric(value=None, label="suppressed") if private else Metric(value=value, label="public")


def round_result(number: int, private: bool, rounds: int, trained=HOSPITALS, failures=()) -> RoundResult:
    spent = {h: PrivacySpent(epsilon=7.9 * (number / rounds) ** 0.6, delta=1e-5, budget=8.0) for h in trained}
    scores = {h: 0.25 + 0.5 * (1 - 0.75**number) + 0.03 * place for place, h in enumerate(HOSPITALS)}
    published = len(trained) >= 2
    receipt = Receipt(
        job="demo",
        round=number,
        attempt=1,
        plan_hash="a" * 64,
        config_hash="b" * 64,
        asked=HOSPITALS,
        trained=trained,
        failures=failures,
        update_hashes=dict.fromkeys(trained, "c" * 64),
        spent=spent,
        weights_before="d" * 64,
        weights_after="e" * 64 if published else None,
        published=published,
        ended_at="2026-01-01T00:00:00+00:00",
    )
    metrics = {
        h: {"dice": metric(s, private), "dice/core": metric(s - 0.04, private), "train_loss": metric(1 - s, private)}
        for h, s in scores.items()
    }
    return RoundResult(round=number, receipt=receipt, metrics=metrics, duration_s=21.5)


def lost(hospital: str, number: int) -> ClientFailure:
    reason = "the hospital's process ended before it answered; <b>Ray</b> restarts it for the next round"
    return ClientFailure(hospital=hospital, round=number, attempt=1, stage="train", reason=reason)


def evaluation(hospital: str, value: float, rounds: int, private: bool) -> dict:
    rng = np.random.default_rng(len(hospital))
    scores = None if private else tuple(np.clip(rng.normal(value, 0.07, 12), 0, 1).tolist())
    metrics = {
        "dice": metric(value, private),
        "dice/core": metric(value - 0.04, private),
        "dice/oedema": metric(value + 0.04, private),
    }
    site = SiteEvaluation(hospital=hospital, round=rounds, metrics=metrics, patient_scores=scores)
    return site.model_dump(mode="json", exclude={"pictures"})


def charge(job: str, number: int, noise_multiplier: float) -> dict:
    """One step over all patients, as a ledger's row holds it."""
    mechanism = {"noise_multiplier": noise_multiplier, "sample_rate": 1.0, "num_steps": 1, "delta": 1e-5}
    labels = {"unit": "patient", "adjacency": "add_remove", "reservation": f"{job}-{number}"}
    return {"kind": "reserve", "job": job, "round": number, **mechanism, **labels}


def ledger_export(hospital: str, budget: float | None = 20.0) -> dict:
    """An account that an earlier run, this one's rounds and its baselines were charged to."""
    events = [
        charge("earlier", 1, 4.0),
        charge("demo", 1, RUN_NOISE),
        charge("demo", 2, RUN_NOISE),
        {"kind": "release", "job": "demo", "round": 2, "closes": "demo-2"},
        charge("demo/local", 1, 1.0),
    ]
    spent = {"epsilon": 11.2, "delta": 1e-5, "budget": budget}  # what counts are the rows
    return {"hospital": hospital, "data_set": "phantoms", "spent": spent, "events": events, "head": None}


def write_run(
    folder: Path,
    *,
    rounds=8,
    private=False,
    dp=True,
    absent: str | None = None,
    complete=True,
    pictures: dict | None = None,
) -> Path:
    """Write a run of four hospitals; `absent` never trains, and a run that is not `complete` stopped early."""
    folder.mkdir(parents=True)
    data = {"directory": "somewhere/images", "declared": "private"} if private else {"phantom": {"num_hospitals": 4}}
    config = parse_run_config(
        {
            "name": "demo",
            "description": "Four hospitals segment brain tumours <together> under patient-level privacy.",
            "data": data,
            "federation": {"rounds": rounds, "baselines": ["local", "central"]},
            "privacy": {"enable_dp": dp, "epsilon": 8.0},
        }
    )
    (folder / "config.yaml").write_text(dump_yaml(config))
    (folder / "job").write_text("demo")
    results = []
    for number in range(1, (rounds if complete else rounds // 2) + 1):
        gone = {absent} if absent else ({"oslo"} if number == 3 else set())
        trained = tuple(h for h in HOSPITALS if h not in gone)
        result = round_result(number, private, rounds, trained, tuple(lost(h, number) for h in gone))
        if not dp:
            result = result.model_copy(update={"receipt": result.receipt.model_copy(update={"spent": {}})})
        results.append(result)
    (folder / "metrics.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in results))
    (folder / "receipts.jsonl").write_text("".join(r.receipt.model_dump_json() + "\n" for r in results))
    if complete:
        _write_final(folder, rounds, private, dp)
    for name, png in (pictures or {}).items():
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / name).write_bytes(png)
    return folder


def _write_final(folder: Path, rounds: int, private: bool, dp: bool) -> None:
    final = {h: 0.70 + 0.02 * place for place, h in enumerate(HOSPITALS)}
    local = {"charite": 0.62, "leuven": 0.60, "oslo": 0.66, "porto": 0.70}
    spent = PrivacySpent(epsilon=11.2, delta=1e-5, budget=20.0).model_dump() if dp else None
    infos = {
        h: HospitalInfo(
            hospital=h,
            declared="private" if private else "synthetic",
            data_set="phantoms",
            num_patients=30 + 10 * place,
            num_channels=4,
            labels={1: "core", 2: "oedema"},
            layout_checksum="f" * 64,
            device="cpu",
        ).model_dump(mode="json")
        for place, h in enumerate(HOSPITALS)
    }
    documents = {
        "hospitals.json": infos,
        "evaluation.json": {h: evaluation(h, value, rounds, private) for h, value in final.items()},
        "baselines.json": {
            "local": {
                h: {"metrics": {"dice": metric(v, private).model_dump()}, "spent": spent} for h, v in local.items()
            },
            "central": {
                "metrics": {h: {"dice": metric(v + 0.015, private).model_dump()} for h, v in final.items()},
                "spent": spent,
            },
            "failures": [],
        },
        "ledger.json": {h: ledger_export(h) for h in HOSPITALS} if dp else {},
        "model.json": {
            "labels": {"1": "core", "2": "oedema"},
            "channels": ["T1", "T1c", "T2", "FLAIR"],
            "patch_size": [32, 32, 32],
            "dynamic_space": True,
            "opset": 20,
            "variants": {"float32": {"file": "model.onnx", "size_bytes": 48178, "sha256": "ab" * 32}},
            "parity": {
                "max_abs_difference": 3.1e-6,
                "agreement": 1.0,
                "dice": 1.0,
                "num_patches": 5,
                "images": "2 held-out synthetic images",
            },
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    save_file({"weights": np.zeros(NUM_PARAMETERS, dtype=np.float32)}, folder / "model.safetensors")


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run's folder."""
    return lambda **options: write_run(tmp_path / "20260101-000000-demo", **options)
