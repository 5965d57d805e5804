"""The card says what a reader needs, with unit, delta and label beside every figure, and nobody's name."""

from __future__ import annotations

import json

import pytest

from medfl_ray.errors import ExportError
from medfl_ray.export.card_page import card_page
from medfl_ray.export.description import read_description
from medfl_ray.export.model_card import ModelCard, model_card, write_card
from medfl_ray.export.onnx_export import export_run
from medfl_ray.export.package import load_run
from medfl_ray.messages import Metric, PrivacySpent, SignedReceipt, SiteEvaluation
from medfl_ray.privacy.audit_record import AuditedEpsilon, AuditRecord, MechanismAudit


@pytest.fixture(scope="module")
def exported(make_package, tmp_path_factory):
    """A description, without exporting anew for every test."""
    from medfl_ray.export.onnx_export import export_onnx, network_of
    from medfl_ray.params import flatten

    package = make_package({"type": "unet2d", "features": [4, 8]}, "segmentation", (16, 16))
    return export_onnx(package, flatten(network_of(package)), tmp_path_factory.mktemp("card")).description


def receipt(number, secret=False, published=True):
    return SignedReceipt(
        job="j", round=number, attempt=1, plan_hash="", config_hash="c0ffee", asked=("university",),
        trained=() if secret else ("university",), failures=(), update_hashes={},
        spent={"university": PrivacySpent(epsilon=2.5, delta=1e-5, budget=8.0)}, weights_before="", weights_after=None,
        published=published, ended_at="", secret_cohort=secret, public_key="ab" * 32, signature=f"signed-{number}",
    )  # fmt: skip


def evaluate(folder, declared_public=True):
    label = "public" if declared_public else "suppressed"
    value = 0.8 if declared_public else None
    found = SiteEvaluation(
        hospital="university",
        round=2,
        metrics={"dice": Metric(value=value, label=label)},
        patient_scores=(0.7, 0.8, 0.9) if declared_public else None,
    )
    (folder / "evaluation.json").write_text(json.dumps({"university": found.model_dump(mode="json")}))


def declare(folder, declared):
    infos = json.loads((folder / "hospitals.json").read_text())
    infos["university"]["declared"] = declared
    (folder / "hospitals.json").write_text(json.dumps(infos))


def test_a_public_figure_has_its_interval(make_run, exported):
    folder = make_run()
    declare(folder, "public")
    evaluate(folder)
    (folder / "receipts.jsonl").write_text(f"{receipt(1).model_dump_json()}\n{receipt(2).model_dump_json()}\n")
    card = write_card(folder, load_run(folder), exported)
    (site,) = card.sites
    low, high = site.metrics["dice"].interval_95
    assert 0.699 < low < 0.8 < high < 0.901
    assert site.rounds_trained == card.provenance.rounds_published == 2
    assert card.provenance.last_receipt == "signed-2"
    assert card.provenance.config_hash == "c0ffee"
    assert ModelCard.model_validate_json((folder / "card.json").read_text()) == card
    page = (folder / "card.md").read_text()
    assert f"| university | dice | 0.800 ({low:.3f} to {high:.3f}) | public |" in page
    assert "Trained without differential privacy" in page
    assert "not a medical device" in page


def test_a_private_figure_is_not_shown(make_run, exported):
    folder = make_run(privacy={"enable_dp": True, "epsilon": 8.0})
    evaluate(folder, declared_public=False)
    privacy = {
        "differential_privacy": True, "unit": "patient", "adjacency": "add_remove", "max_grad_norm": 1.0,
        "spent": {"university": {"epsilon": 2.5, "delta": 1e-5, "budget": 8.0, "unit": "patient",
                                 "adjacency": "add_remove", "ledger_head": None}},
    }  # fmt: skip
    description = exported.model_copy(update={"privacy": privacy})
    page = card_page(model_card(folder, load_run(folder), description).model_dump())
    assert "| university | dice | not shown | suppressed |" in page
    assert "| university | 2.500 | 1e-05 | patient | add/remove |" in page
    assert "Figures on private data are suppressed" in page
    assert "/nowhere" not in page


def test_a_secret_cohort_is_kept(make_run, exported):
    folder = make_run()
    (folder / "receipts.jsonl").write_text(receipt(1, secret=True).model_dump_json() + "\n")
    card = model_card(folder, load_run(folder), exported)
    assert card.sites[0].rounds_trained is None
    assert not any("no influence" in words for words in card.limits)
    assert "| secret |" in card_page(card.model_dump())


def test_who_never_trained_is_named(make_run, exported):
    folder = make_run()
    (folder / "receipts.jsonl").write_text(receipt(1, published=False).model_dump_json() + "\n")
    card = model_card(folder, load_run(folder), exported)
    assert card.sites[0].rounds_trained == 0
    assert any("no influence" in words and "university" in words for words in card.limits)


@pytest.mark.parametrize(("rounds", "is_shown"), [(1, True), (3, False)])
def test_an_audit_of_these_rounds_stands_beside_the_claim(make_run, exported, rounds, is_shown):
    folder = make_run()
    (folder / "receipts.jsonl").write_text(receipt(1).model_dump_json() + "\n")
    at = AuditedEpsilon(delta=1e-5, claimed=2.5, lower_bound=0.4, ceiling=3.0, num_guessed=10, num_correct=7)
    mechanism = MechanismAudit(
        hospitals=("university",), noise_multiplier=1, sample_rate=0.1, max_grad_norm=1, num_steps=5, num_canaries=10,
        confidence=0.95, at=(at,), gaussian_estimate=None,
    )  # fmt: skip
    record = AuditRecord(rounds=rounds, mechanism=mechanism, membership=None)
    (folder / "audit.json").write_text(record.model_dump_json())
    page = card_page(model_card(folder, load_run(folder), exported).model_dump())
    assert ("epsilon >= 0.40 at 95 % confidence" in page) is is_shown
    assert ("Not audited" in page) is not is_shown


def test_words_of_a_configuration_are_no_markup(make_run, exported):
    folder = make_run(description="a | b <script>alert(1)</script> [x](http://y)")
    page = card_page(model_card(folder, load_run(folder), exported).model_dump())
    assert "<script>" not in page
    assert "a \\| b &lt;script&gt;" in page


def test_a_damaged_file_of_the_run_is_named(make_run, exported):
    folder = make_run()
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ExportError, match=r"evaluation\.json of the run 'run' is damaged"):
        model_card(folder, load_run(folder), exported)


def test_an_export_leaves_the_card_of_its_own_description(make_run):
    folder = make_run()
    export_run(folder)
    card = ModelCard.model_validate_json((folder / "card.json").read_text())
    description = read_description(folder)
    assert card.variants == description.variants
    assert card.provenance.weights_checksum == description.weights_checksum
