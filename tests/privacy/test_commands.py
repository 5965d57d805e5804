"""The privacy commands: every epsilon with its unit, delta and adjacency; faults in one sentence."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medfl_ray.cli.privacy import app
from medfl_ray.errors import LedgerError, PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.planner import solve_epsilon
from medfl_ray.store.ledger import PrivacyLedger

MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=1e-5
)
FIGURES = {
    "--epsilon": "0.3",
    "--noise-multiplier": "9",
    "--sample-rate": "0.05",
    "--rounds": "3",
    "--steps-per-round": "5",
    "--delta": "1e-5",
}


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def options(without: str) -> list[str]:
    return [word for name, value in FIGURES.items() if name != without for word in (name, value)]


@pytest.mark.parametrize("asked", ["--epsilon", "--noise-multiplier", "--sample-rate", "--rounds"])
def test_plan_solves_whatever_is_left_out(asked: str) -> None:
    output = invoke("plan", *options(asked))
    assert "unit patient, delta 1e-05, adjacency add/remove" in output
    assert "epsilon over rounds" in output


def test_estimate_prints_the_accountants_epsilon_rounded_up() -> None:
    output = invoke(
        "estimate",
        "--noise-multiplier",
        "5",
        "--rounds",
        "4",
        "--steps-per-round",
        "5",
        "--num-patients",
        "20",
        "--batch-size",
        "4",
        "--delta",
        "1e-5",
    )
    epsilon = solve_epsilon(5.0, 1e-5, 0.2, 20)
    shown = float(next(line for line in output.splitlines() if "epsilon" in line and "unit" in line).split()[3])
    assert epsilon <= shown < epsilon + 0.0011
    assert "unit patient, delta 1e-05, adjacency add/remove" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["estimate", "--noise-multiplier", "1"], "cannot be computed without --rounds, --steps-per-round"),
        (["estimate"], "--num-patients"),
        (["plan", "--epsilon", "8"], "--delta or --num-patients"),
        (["plan", "--epsilon", "8", "--delta", "1e-5"], "leave out exactly one"),
        (["plan", *options("none")], "left out: none"),
        (["plan", "--epsilon", "8", "--delta", "0.5", "--num-patients", "100"], "not below 1 / num_patients"),
        (["plan", "run.yaml", "--epsilon", "8"], "not both"),
        (["plan", "--batch-size", "4", "--delta", "1e-5"], "only together with --num-patients"),
        (
            [
                "plan",
                "--epsilon",
                "0.5",
                "--delta",
                "1e-5",
                "--sample-rate",
                "1",
                "--noise-multiplier",
                "20",
                "--steps-per-round",
                "500",
            ],
            "one round has 500",
        ),
    ],
)
def test_what_cannot_be_answered_is_said(arguments: list[str], words: str) -> None:
    with pytest.raises(PrivacyConfigError, match=words):
        invoke(*arguments)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state" / "north"
    folder.mkdir(parents=True)
    ledger = PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", 1e-5, None)
    ledger.settle(ledger.reserve("study", 1, 0, MECHANISM, None))
    return folder.parent


def test_ledger_show_and_verify_read_a_state_folder(state: Path) -> None:
    shown = invoke("ledger", "show", "--state", str(state))
    assert "study" in shown
    assert "unit patient, delta 1e-05, adjacency add/remove" in shown
    assert "2 rows are whole and signed" in invoke("ledger", "verify", "--state", str(state))


def test_ledger_show_and_verify_read_a_runs_export(state: Path, tmp_path: Path) -> None:
    export = PrivacyLedger.open(state / "north" / "ledger.sqlite", "north", "scans", 1e-5, 8.0).export()
    (tmp_path / "ledger.json").write_text(json.dumps({"north": export, "public": {}}))
    assert "budget 8" in invoke("ledger", "show", str(tmp_path))
    assert "2 rows are whole and signed" in invoke("ledger", "verify", str(tmp_path))
    export["events"][0]["num_steps"] = 1
    (tmp_path / "ledger.json").write_text(json.dumps({"north": export}))
    with pytest.raises(LedgerError, match=r"row 1 .* is bad: its contents do not match its hash"):
        invoke("ledger", "verify", str(tmp_path))


def test_ledger_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="either a run's folder or --state"):
        invoke("ledger", "show")
    with pytest.raises(LedgerError, match=r"cannot read 'ledger\.json'"):
        invoke("ledger", "show", str(tmp_path))
    with pytest.raises(LedgerError, match=r"there is no 'ledger\.sqlite'"):
        invoke("ledger", "verify", "--state", str(tmp_path))
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(LedgerError, match="no account"):
        invoke("ledger", "show", str(tmp_path))
    (tmp_path / "ledger.json").write_text("[]")
    with pytest.raises(LedgerError, match="one export per hospital"):
        invoke("ledger", "show", str(tmp_path))
