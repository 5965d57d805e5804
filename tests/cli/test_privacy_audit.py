"""medfl-ray privacy audit RUN: the bound beside the claim, in words, in audit.json and in the report."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runs import DP, assert_one_clear_error, configuration, run_folders, write_config, write_patients

from medfl_ray.privacy.audit_record import AuditRecord
from medfl_ray.privacy.noise import GaussianNoise

FEW = ("--canaries", "4000")


def finished(medfl, **sections) -> Path:
    sections = {"output": {"report": True}, **sections}
    answer = medfl("run", write_config(Path("run.yaml"), configuration(**sections)))
    assert answer.code == 0, answer
    return run_folders()[-1]


def test_the_report_says_not_audited_and_then_the_bound(medfl, monkeypatch):
    folder = finished(medfl, privacy={**DP, "epsilon": 2, "sample_rate": 1.0})
    before = (folder / "report.html").read_text()
    assert before.count("not audited") >= 2
    assert "by an audit" not in before
    ledger = (folder / "ledger.json").read_bytes()

    answer = medfl("privacy", "audit", folder, *FEW)
    assert answer.code == 0, answer
    assert "(patient-level, delta = 1e-5, add/remove)" in answer.out
    assert "at 95 % confidence" in answer.out
    assert "nothing was charged" in answer.out
    assert "Membership inference: AUC" in answer.out
    record = AuditRecord.model_validate_json((folder / "audit.json").read_bytes())
    assert record.mechanism is not None
    assert 0 < record.mechanism.at[0].lower_bound <= record.mechanism.at[0].claimed <= 2.0
    assert record.mechanism.num_steps == 1
    after = (folder / "report.html").read_text()
    assert "not audited" not in after
    assert f"at least {record.mechanism.headline.lower_bound:.2f} by an audit, 95 % confidence" in after
    assert (folder / "ledger.json").read_bytes() == ledger

    monkeypatch.setattr(GaussianNoise, "draw", lambda self, size, std: np.zeros(size))
    broken = medfl("privacy", "audit", folder, *FEW, "--no-membership", "--json")
    assert broken.code == 1
    assert broken.err.startswith("ALARM: the audit refutes the claim. At least epsilon = ")
    assert json.loads(broken.out)["mechanism"]["at"][0]["lower_bound"] > 2
    assert "The claimed epsilon does not hold." in (folder / "report.html").read_text()


def test_without_dp_there_is_no_claim_and_the_model_is_attacked(medfl):
    folder = finished(medfl)
    answer = medfl("privacy", "audit", folder, "--json")
    record = json.loads(answer.out)
    assert answer.code == 0
    assert record["mechanism"] is None
    assert "no patient-level differential privacy" in record["mechanism_note"]
    assert 0 <= record["membership"]["auc"] <= 1
    assert "for telling" in (folder / "report.html").read_text()


def test_private_patients_are_not_attacked(medfl, tmp_path):
    images = write_patients(tmp_path / "images")
    hospital = {"id": "north", "directory": str(images), "num_patients": 20}
    data = {"hospitals": [hospital], "labels": {1: "box"}, "channels": ["T1"]}
    folder = finished(medfl, data=data, privacy=DP, federation={"min_clients": 1})
    answer = medfl("privacy", "audit", folder, *FEW)
    assert answer.code == 0, answer
    assert "Membership inference: not computed: all data are private" in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--confidence", "95"), "must lie between 0 and 1"),
        (("--canaries", "5"), "100 canaries at least"),
    ],
)
def test_impossible_requests_are_one_sentence(medfl, arguments, words):
    folder = finished(medfl, privacy=DP)
    assert_one_clear_error(medfl("privacy", "audit", folder, *arguments), 2, words)
    assert not (folder / "audit.json").exists()


def test_a_folder_without_rounds_cannot_be_audited(medfl, tmp_path):
    folder = tmp_path / "none"
    folder.mkdir()
    assert_one_clear_error(medfl("privacy", "audit", folder), 2, "is not the folder of a run")
    write_config(folder / "config.yaml", configuration(privacy=DP))
    assert_one_clear_error(medfl("privacy", "audit", folder), 2, "has published no round")
