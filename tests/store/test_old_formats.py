"""Files of an older version still open, resume and verify: fixtures that tests/fixtures/make.py has written with it."""

import json
import math
import shutil
from pathlib import Path

import pytest
from cli_runs import command_line
from golden_runs import assert_same, probe, summary_of_file

from medfl_ray.analytics.report import write_report
from medfl_ray.config.files import load_run_config
from medfl_ray.config.site import load_site_config
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.registry.package_files import verify_package
from medfl_ray.store.registry.registry import Registry
from medfl_ray.store.run.folder import RunFolder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format_2026_12"
ABOUT = json.loads((FIXTURES / "about.json").read_text())
FINISHED = sorted(ABOUT["weights"])
WITH_LEDGERS = ["dp", "hospital_dp", "private", "simulation"]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the fixtures as the working directory, with the modes that a checkout does not keep."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MEDFL_STATE_DIR", "states")
    return folder


@pytest.fixture
def medfl_ray(monkeypatch, capsys):
    return command_line(monkeypatch, capsys)


def test_the_fixtures_name_no_place_and_no_user_of_the_machine_that_wrote_them():
    words = [b"/tmp/", b"/home/", b"/root", b'"actor":"root"']
    files = [path for path in FIXTURES.rglob("*") if path.suffix in (".json", ".yaml", ".jsonl", ".sqlite", ".md")]
    assert len(files) > 100
    assert [path.name for path in files if any(word in path.read_bytes() for word in words)] == []


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_opens_with_its_rounds_and_weights(old, name):
    folder = RunFolder.open(old / "runs" / name)
    assert folder.run.config_hash == ABOUT["run_hashes"][name]
    assert folder.job.endswith(f"-{name}")
    assert [(result.round, len(result.receipt.trained)) for result in folder.results()] == [(1, 2), (2, 2), (3, 2)]
    checkpoint = folder.resume()
    assert folder.problems == []
    assert checkpoint.round == 3
    found = summary_of_file(folder.path / "model.safetensors")
    assert found == ABOUT["weights"][name]
    folder.close()


@pytest.mark.parametrize("name", FINISHED)
def test_receipts_of_a_finished_run_verify(old, medfl_ray, name):
    answer = medfl_ray("receipts", "verify", f"runs/{name}")
    assert answer.code == 0, answer
    assert "3 receipts are whole, in order and signed; 3 rounds were published" in answer.out
    assert ("hold every row that the receipts name" in answer.out) == (name in WITH_LEDGERS)
    altered = old / "runs" / name / "receipts.jsonl"
    altered.write_text(altered.read_text().replace('"published":true', '"published":false', 1))
    assert medfl_ray("receipts", "verify", f"runs/{name}").code != 0


@pytest.mark.parametrize("name", WITH_LEDGERS)
def test_ledgers_of_a_finished_run_verify_and_show_the_same_epsilon(old, medfl_ray, name):
    answer = medfl_ray("privacy", "ledger", "verify", f"runs/{name}")
    assert answer.code == 0, answer
    assert answer.out.count("rows are whole and signed") == len(ABOUT["ledger_epsilons"][name])
    exports = json.loads((old / "runs" / name / "ledger.json").read_text())
    assert {hospital: export["spent"]["epsilon"] for hospital, export in exports.items() if export} == ABOUT[
        "ledger_epsilons"
    ][name]
    if name != "hospital_dp":
        expected = epsilon_spent([Segment(4.0, 0.5, 6)], 1e-5)
        assert list(ABOUT["ledger_epsilons"][name].values()) == [pytest.approx(expected, rel=1e-6)] * 2


@pytest.mark.parametrize("name", FINISHED)
def test_the_report_of_a_finished_run_renders(old, name):
    page = write_report(old / "runs" / name).read_text()
    assert name in page
    assert ("epsilon" in page.lower()) or name in ("plain", "scaffold")


@pytest.mark.parametrize("hospital", ["north", "south"])
def test_a_hospitals_ledger_opens_under_its_key_and_agrees_with_its_mirror(old, hospital):
    file = old / "states" / hospital / "ledger.sqlite"
    head = LedgerMirror(old / "states" / "_mirror").head(hospital, "boxes")
    with_budget = {"hospital": hospital, "data_set": "boxes", "delta": 1e-5, "max_epsilon": 20.0}
    ledger = PrivacyLedger.open(file, **with_budget, expected_heads=[head])
    assert ledger.verify() == head
    assert ledger.spent().epsilon == pytest.approx(ABOUT["ledger_epsilons"]["private"][hospital], rel=1e-9)
    assert [event.kind for event in ledger.events()] == ["reserve", "settle"] * 3


def test_a_new_run_charges_the_ledgers_that_are_there(old, medfl_ray):
    config = (old / "runs/private/config.yaml").read_text().replace("directory: made/private", "directory: again")
    (old / "again.yaml").write_text(config)
    answer = medfl_ray("run", "again.yaml", "--set", "federation.rounds=1")
    assert answer.code == 0, answer
    (folder,) = (old / "again").iterdir()
    spent = RunFolder.open(folder).results()[-1].receipt.spent
    expected = epsilon_spent([Segment(4.0, 0.5, 8)], 1e-5)
    assert {name: one.epsilon for name, one in spent.items()} == dict.fromkeys(
        ("north", "south"), pytest.approx(expected, rel=1e-6)
    )


@pytest.mark.parametrize("name", ["plain", "scaffold"])
def test_an_interrupted_run_resumes_to_the_weights_of_the_whole_one(old, medfl_ray, name):
    folder = old / "runs" / f"{name}_interrupted"
    answer = medfl_ray("run", "--resume", folder)
    assert answer.code == 0, answer
    assert_same(summary_of_file(folder / "model.safetensors"), ABOUT["weights"][name], ABOUT["probe"])
    receipts = RunFolder.open(folder).signed_receipts()
    assert [(receipt.round, receipt.published) for receipt in receipts] == [(1, True), (2, False), (2, True), (3, True)]
    assert medfl_ray("receipts", "verify", folder).code == 0


def test_an_interrupted_private_run_resumes_and_its_lost_round_stays_charged(old, medfl_ray):
    folder = old / "runs" / "dp_interrupted"
    answer = medfl_ray("run", "--resume", folder)
    assert answer.code == 0, answer
    last = RunFolder.open(folder).results()[-1]
    assert last.round == 3
    expected = epsilon_spent([Segment(4.0, 0.5, 8)], 1e-5)  # three rounds of two steps, one of them twice
    assert [spent.epsilon for spent in last.receipt.spent.values()] == [pytest.approx(expected, rel=1e-6)] * 2
    for command in (("receipts", "verify"), ("privacy", "ledger", "verify")):
        assert medfl_ray(*command, folder).code == 0
    assert math.isfinite(summary_of_file(folder / "model.safetensors")["norm"])


def test_the_registry_lists_verifies_and_hands_out_its_champion(old, medfl_ray, tmp_path):
    registry = Registry("registry")
    assert [(str(version), version.stage) for version in registry.versions()] == [
        ("tiny/1", "champion"),
        ("tiny/2", "candidate"),
    ]
    champion = registry.get("tiny")
    assert champion.lineage.config_hash == ABOUT["run_hashes"]["plain"]
    assert champion.record.actor == "fixture"
    assert [event.action for event in registry.audit()] == ["model.register"] * 2 + ["model.promote"]
    package = registry.fetch(champion, tmp_path / "package")
    record, public_key = verify_package(package, registry.public_key)
    assert (record, public_key) == (champion.record, registry.public_key)
    assert medfl_ray("models", "verify", "--registry", "registry").code == 0
    registry.promote("tiny", 2, "somebody")
    assert [version.stage for version in registry.versions("tiny")] == ["retired", "champion"]


@pytest.mark.parametrize("name", sorted(ABOUT["config_hashes"]))
def test_a_run_file_still_has_its_hash(name):
    assert load_run_config(FIXTURES / "configs" / name).config_hash == ABOUT["config_hashes"][name]


@pytest.mark.parametrize("name", sorted(ABOUT["policies"]))
def test_a_hospitals_own_file_still_says_the_same_policy(name):
    policy = load_site_config(FIXTURES / "sites" / name).policy.model_dump(mode="json")
    assert policy == {**policy, **ABOUT["policies"][name]}


def test_the_probe_says_what_floats_depend_on():
    assert probe() == probe()
    assert set(probe()) == set(ABOUT["probe"]) == {"torch", "cpu", "sha256"}
