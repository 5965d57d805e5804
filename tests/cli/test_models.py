"""medfl-ray models on a real run with private patients, whose figures nobody may see."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from cli_runs import DP, assert_one_clear_error, configuration, hospital_data, run_folders, write_config, write_patients

from medfl_ray.assembly.lineage import lineage_of_run
from medfl_ray.store.registry.registry import Registry


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Train, export and register a private run once; return its folder and what the command said."""
    from medfl_ray.cli.main import main

    place = tmp_path_factory.mktemp("private")
    write_patients(place / "north")
    raw = configuration(
        name="Boxes",
        data=hospital_data(place / "north"),
        privacy=DP,
        output={"directory": str(place / "runs"), "export": True},
    )
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("MEDFL_STATE_DIR", str(place / "state"))
        patch.setenv("MEDFL_REGISTRY", str(place / "registry"))
        patch.setattr(sys, "argv", ["medfl-ray", "run", str(write_config(place / "run.yaml", raw))])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    return run_folders(place / "runs")[0], said.getvalue()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / finished[0].name))


@pytest.fixture
def medfl(medfl, monkeypatch, tmp_path):
    """The command line with a registry of its own."""
    monkeypatch.setenv("MEDFL_REGISTRY", str(tmp_path / "registry"))
    return medfl


def change_json(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_finished_run_is_registered_as_candidate(finished):
    folder, said = finished
    assert "registered as boxes/1, candidate" in said
    version = Registry(folder.parents[1] / "registry").get("boxes", 1)
    lineage = version.lineage
    assert (version.stage, lineage.run, lineage.round) == ("candidate", folder.name, 1)
    assert lineage == lineage_of_run(folder)
    spent = lineage.privacy.spent["north"]
    assert 0 < spent.epsilon <= 8
    assert (spent.unit, spent.adjacency, spent.missing) == ("patient", "add_remove", ())
    assert lineage.metrics["dice"].value is None
    assert lineage.metrics["dice"].label == "suppressed"
    assert lineage.data_sets["north"].of == "declaration"
    assert {"model.json", "model.onnx", "model.safetensors"} <= set(version.files)


def test_nothing_of_a_patient_or_a_path_is_in_the_record(finished):
    folder, _ = finished
    version = Registry(folder.parents[1] / "registry").get("boxes", 1)
    for secret in ("Mrs-", ".nii", str(folder.parent), "north-1.png"):
        assert secret not in version.seal.text
    assert not [name for name in version.files if "ledger" in name or "key" in name or "png" in name]


def test_from_a_run_to_a_fetched_champion(medfl, run, tmp_path):
    assert "registered as boxes/1, candidate" in medfl("models", "register", run, "--actor", "ada").out
    refused = medfl("models", "promote", "boxes")
    assert_one_clear_error(refused, 1, "boxes/1 was not promoted", "suppressed", "--evaluation", "--override")
    figures = {"patients": 12, "cases": 12, "figures": {"dice": 0.8}, "intervals_95": {"dice": [0.75, 0.85]}}
    (tmp_path / "public-scans.json").write_text(json.dumps(figures))
    medfl("models", "register", run, "--evaluation", tmp_path / "public-scans.json", "--actor", "ada")
    promoted = medfl("models", "promote", "boxes", "2", "--least", "0.7", "--actor", "bea")
    assert "+ metric: dice is 0.8000 (0.7500 to 0.8500) on 12 patients" in promoted.out
    assert "+ privacy: the privacy statement is complete" in promoted.out
    assert "boxes/2 is champion" in promoted.out
    assert "boxes/2 (champion): dice 0.8000" in medfl("models", "best").out
    listed = medfl("models", "list").out
    assert "boxes/1  candidate" in listed
    assert "(patient-level, add/remove, delta" in listed
    shown = json.loads(medfl("models", "show", "boxes").out)
    assert (shown["version"], shown["stage"], shown["lineage"]["metrics"]["dice"]["low"]) == (2, "champion", 0.75)
    assert "boxes/2 (champion) is in" in medfl("models", "fetch", "boxes", "out").out
    key = Registry(tmp_path / "registry").public_key
    assert "holds version 2 of 'boxes'" in medfl("models", "verify", "out", "--key", key).out
    log = medfl("models", "audit").out.splitlines()
    assert log[0].split()[2:5] == ["ada", "model.register", "boxes/1"]
    assert "model.refuse" in log[1]
    assert "suppressed" in log[1]
    assert "4 rows of the audit log are whole" in medfl("models", "verify").out


def test_override_rollback_and_retire(medfl, run):
    for _ in range(2):
        medfl("models", "register", run)
        assert medfl("models", "promote", "boxes", "--override", "a trial on phantoms").code == 0
    assert "boxes/1 is champion again" in medfl("models", "rollback", "boxes", "--reason", "blurred edges").out
    assert_one_clear_error(medfl("models", "rollback", "boxes"), 1, "no earlier champion")
    medfl("models", "register", run)
    assert "boxes/3 is retired" in medfl("models", "retire", "boxes", "3", "--reason", "blurred").out
    log = medfl("models", "audit", "boxes", "--json").out
    assert [event["action"] for event in json.loads(log)].count("model.promote") == 2
    assert "a trial on phantoms" in medfl("models", "audit", "boxes").out


def test_unknown_figures_may_be_allowed(medfl, run):
    medfl("models", "register", run, "--name", "other-name")
    assert "? metric: dice is suppressed" in medfl("models", "promote", "other-name", "--unknown", "allow").out


def smaller_epsilon(run):
    change_json(run / "model.json", lambda d: d["privacy"]["spent"]["north"].update(epsilon=0.1))


def no_differential_privacy(run):
    change_json(run / "model.json", lambda d: d["privacy"].update(differential_privacy=False))


def other_weights(run):
    change_json(run / "model.json", lambda d: d.update(weights_checksum="0" * 64))


def other_safetensors(run):
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "model.safetensors").write_bytes(content)


def other_onnx(run):
    content = bytearray((run / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "model.onnx").write_bytes(content)


def other_receipt(run):
    path = run / "receipts.jsonl"
    path.write_text(path.read_text().replace('"published":true', '"published":false'))


def no_receipts(run):
    (run / "receipts.jsonl").unlink()


def no_export(run):
    (run / "model.json").unlink()


def no_evaluation(run):
    (run / "evaluation.json").unlink()


def damaged_evaluation(run):
    (run / "evaluation.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (smaller_epsilon, "privacy statement"),
        (no_differential_privacy, "privacy statement"),
        (other_weights, "model.safetensors"),
        (other_safetensors, "model.safetensors"),
        (other_onnx, "is not the file that model.json describes"),
        (other_receipt, "changed after it was signed"),
        (no_receipts, "receipts"),
        (no_export, "export"),
        (no_evaluation, "evaluation.json"),
        (damaged_evaluation, "evaluation.json"),
    ],
)
def test_a_run_that_contradicts_itself_is_not_registered(medfl, run, damage, words):
    damage(run)
    assert_one_clear_error(medfl("models", "register", run), 1, words)
    assert "no version" in medfl("models", "list").out


def test_weights_that_no_receipt_leads_to_are_not_registered(medfl, run):
    (run / "model.safetensors").unlink()
    other_weights(run)
    assert_one_clear_error(medfl("models", "register", run), 1, "weights that no receipt")


def test_shown_figures_have_their_interval_over_patients(run):
    def evaluation(hospital, scores):
        metric = {"value": sum(scores) / len(scores), "label": "public"}
        return {"hospital": hospital, "round": 1, "metrics": {"dice": metric}, "patient_scores": scores}

    document = {"a": evaluation("a", [0.5, 0.5]), "b": evaluation("b", [0.7]), "c": evaluation("c", [0.2, 1.0])}
    (run / "evaluation.json").write_text(json.dumps(document))
    lineage = lineage_of_run(run)
    assert lineage.metrics["dice"].value == pytest.approx(0.6)
    assert lineage.metrics["dice"].low == pytest.approx((0.5 + 0.7 + 0.2) / 3)
    assert lineage.metrics["dice"].high == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert lineage.hospital_metrics["a"]["dice"].low == pytest.approx(0.5)
    assert lineage.metrics_of == "held-out patients of a, b, c"


def test_a_hospital_that_hides_its_figure_is_left_out_of_the_mean(run):
    shown = {"hospital": "a", "round": 1, "metrics": {"dice": {"value": 0.5, "label": "unprotected"}}}
    hidden = {"hospital": "b", "round": 1, "metrics": {"dice": {"value": None, "label": "suppressed"}}}
    (run / "evaluation.json").write_text(json.dumps({"a": shown, "b": hidden}))
    lineage = lineage_of_run(run)
    mean = lineage.metrics["dice"]
    assert (mean.value, mean.low, mean.label) == (0.5, None, "unprotected")
    assert lineage.metrics_of == "held-out patients of a"
    assert lineage.hospital_metrics["b"]["dice"].value is None


def test_mistakes_are_one_sentence(medfl, run, tmp_path):
    assert_one_clear_error(medfl("models", "show", "boxes"), 1, "no model 'boxes'")
    assert_one_clear_error(medfl("models", "register", tmp_path), 2, "config.yaml")
    assert_one_clear_error(medfl("models", "register", run, "--name", "../up"), 1, "cannot be a model's name")
    assert_one_clear_error(medfl("models", "best", "--metric", "auc"), 1, "shows 'auc'")
    assert_one_clear_error(medfl("models", "list", "--database", "mysql://a:geheim@b/c"), 1, secrets=("geheim",))
    assert_one_clear_error(medfl("models", "verify", tmp_path), 1, "registry.json")


def test_a_registry_in_need_does_not_fail_a_finished_run(finished, monkeypatch, capsys, tmp_path):
    from medfl_ray.cli.run import _register
    from medfl_ray.store.run.folder import RunFolder

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDFL_REGISTRY", str(tmp_path / "file" / "registry"))
    _register(RunFolder.open(finished[0]))
    assert "WARNING: the model was not registered" in capsys.readouterr().out


def test_a_run_that_ends_twice_is_registered_once(finished, monkeypatch, tmp_path):
    from medfl_ray.cli.run import _register
    from medfl_ray.store.run.folder import RunFolder

    monkeypatch.setenv("MEDFL_REGISTRY", str(tmp_path / "registry"))
    for _ in range(2):
        _register(RunFolder.open(finished[0]))
    assert len(Registry().versions()) == 1
