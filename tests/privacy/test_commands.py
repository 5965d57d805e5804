"""The privacy commands: every epsilon with its unit, delta and adjacency; faults in one sentence."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from medfl_ray.cli.privacy import app
from medfl_ray.errors import LedgerError, PrivacyConfigError
from medfl_ray.messages import Mechanism
from medfl_ray.privacy.account import epsilon_words
from medfl_ray.privacy.accountant import Segment, epsilon_spent
from medfl_ray.privacy.planner import solve_epsilon
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.mirror import LedgerMirror

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
    assert "max_epsilon in the hospital's policy, which a ledger does not hold" in shown  # and not: no budget
    assert "2 rows are whole and signed" in invoke("ledger", "verify", "--state", str(state))


def test_ledger_show_and_verify_read_a_runs_export(state: Path, tmp_path: Path) -> None:
    export = PrivacyLedger.open(state / "north" / "ledger.sqlite", "north", "scans", 1e-5, 8.0).export()
    (tmp_path / "ledger.json").write_text(json.dumps({"north": export, "public": {}}))
    assert "lifetime budget 8" in invoke("ledger", "show", str(tmp_path))
    with pytest.raises(LedgerError, match=r"nothing says with which key hospital 'north' signs.*--key north=KEY"):
        invoke("ledger", "verify", str(tmp_path))
    key = export["public_key"]
    assert key in invoke("ledger", "verify", "--state", str(state))
    answer = invoke("ledger", "verify", str(tmp_path), "--key", f"north={key}")
    assert answer.count("2 rows are whole and signed; compared with the key given") == 1
    with pytest.raises(LedgerError, match="not the one given with --key"):
        invoke("ledger", "verify", str(tmp_path), "--key", "0" * 64)
    export["events"][0]["num_steps"] = 1
    (tmp_path / "ledger.json").write_text(json.dumps({"north": export}))
    with pytest.raises(LedgerError, match=r"row 1 .* is bad: its contents do not match its hash"):
        invoke("ledger", "verify", str(tmp_path), "--key", key)


def test_ledger_verify_compares_a_run_with_a_mirror(state: Path, tmp_path: Path) -> None:
    ledger = PrivacyLedger.open(state / "north" / "ledger.sqlite", "north", "scans", 1e-5, 8.0)
    (tmp_path / "ledger.json").write_text(json.dumps({"north": ledger.export()}))
    mirror = tmp_path / "kept"
    LedgerMirror(mirror).keep(ledger.export())
    answer = invoke("ledger", "verify", str(tmp_path), "--mirror", str(mirror))
    assert "compared with the mirror given" in answer
    assert "2 rows are whole and signed; generation 1" in invoke("ledger", "verify", str(mirror))


def test_accept_key_pins_and_says_what_it_did(tmp_path: Path) -> None:
    account = ("--hospital", "north", "--data-set", "scans", "--mirror", str(tmp_path / "mirror"))
    assert "before any contact; receipt 1" in invoke("ledger", "accept-key", *account, "--key", "ab" * 32)
    assert "nothing was changed" in invoke("ledger", "accept-key", *account, "--key", "ab" * 32)
    assert f"in place of {'ab' * 32}; receipt 2" in invoke("ledger", "accept-key", *account, "--key", "cd" * 32)
    assert "0 rows are whole and signed" in invoke("ledger", "verify", str(tmp_path / "mirror"))


def test_ledger_show_says_of_a_run_what_is_its_own_and_which_budget_bounds_what(state: Path, tmp_path: Path) -> None:
    ledger = PrivacyLedger.open(state / "north" / "ledger.sqlite", "north", "scans", 1e-5, 8.0)
    ledger.settle(ledger.reserve("study/local", 1, 0, MECHANISM, None))
    (tmp_path / "ledger.json").write_text(json.dumps({"north": ledger.export()}))
    (tmp_path / "config.yaml").write_text("name: x\ndata: {phantom: {}}\nprivacy: {epsilon: 3, extra_epsilon: 5}\n")
    (tmp_path / "job").write_text("study")
    shown = " ".join(invoke("ledger", "show", str(tmp_path)).split())
    total, part = (epsilon_words(epsilon_spent([Segment(20.0, 1.0, 2)] * n, 1e-5), 3) for n in (2, 1))
    assert f"spent: epsilon {total} (unit patient, delta 1e-05, adjacency add/remove)" in shown
    assert f"the run's rounds {part} of their budget 3; its baselines and studies {part} of their budget 5;" in shown
    assert "lifetime budget 8, of which" in shown


def test_ledger_show_says_infinite_and_no_number(state: Path) -> None:
    path = state / "north" / "ledger.sqlite"
    PrivacyLedger.open(path, "north", "scans", 1e-5, None).mark_unprotected("open", "trained without")
    assert "spent: epsilon infinite (unprotected)" in " ".join(invoke("ledger", "show", "--state", str(state)).split())


def test_a_runs_plan_has_each_budget_in_its_own_column(tmp_path: Path) -> None:
    config = {
        "name": "two-budgets",
        "data": {
            "hospitals": [
                {"id": "north", "directory": "n", "num_patients": 100, "max_epsilon": 9.0},
                {"id": "south", "directory": "s", "num_patients": 100},
                {"id": "open", "directory": "o", "num_patients": 100, "declared": "synthetic"},
            ],
            "channels": ["T1"],
            "labels": {1: "box"},
        },
        "federation": {"rounds": 2, "local_steps": 2, "baselines": ["local"]},
        "privacy": {"epsilon": 2.0, "extra_epsilon": 4.0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    shown = invoke("plan", str(tmp_path / "run.yaml"))
    heading = next(line for line in shown.splitlines() if "budget of the run" in line and "hospital" in line)
    names = [cell.strip() for cell in re.split("[┃│]", heading) if cell.strip()]
    rows = {}
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.split("│") if cell.strip()]
        if len(cells) == len(names):
            rows[cells[0]] = dict(zip(names, cells, strict=True))
    assert {name: row["lifetime budget"] for name, row in rows.items()} == {
        "north": "9", "south": "6 (one run)", "open": "none",
    }  # fmt: skip
    for row in rows.values():
        assert (row["budget of the run"], row["extra budget"]) == ("2", "4")
        assert float(row["baselines"]) == float(row["the run's rounds"]) <= 2.0 < float(row["all of it"])
    assert "unit patient, delta 1e-05, adjacency add/remove" in shown


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
