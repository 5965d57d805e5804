"""One epsilon: each figure that a run with baselines leaves anywhere is the account's, and its terms are beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from cli_runs import DP, command_line, configuration, run_folders, write_config, write_patients

from medfl_ray.config.files import load_run_config
from medfl_ray.privacy.account import account_of, budgets_of, epsilon_words, parts_words, remaining_words
from medfl_ray.privacy.run_accounts import accounts_of_run, job_of
from medfl_ray.store.registry.registry import Registry

pytestmark = pytest.mark.ci  # one run with baselines, an export and a copy in MLflow: half a minute
HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
DECIMAL = re.compile(r"(?<![\d.e-])\d+\.\d{2,3}(?![\d.])")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Train, export, register and report once; what the command said is in `said`."""
    from medfl_ray.cli.main import main

    folder = tmp_path_factory.mktemp("one-epsilon")
    hospitals = [
        {
            "id": name,
            "directory": str(write_patients(folder / name)),
            "num_patients": 20,
            "declared": "synthetic",
            **more,
        }
        for name, more in (("north", {"max_epsilon": 60.0}), ("south", {}))
    ]
    output = {"directory": str(folder / "runs"), "export": True, "report": True}
    if HAS_MLFLOW:
        output["mlflow"] = {"tracking_uri": f"sqlite:///{folder / 'mlflow.db'}"}
    raw = configuration(
        data={"hospitals": hospitals, "labels": {1: "box"}, "channels": ["T1"], "holdout_fraction": 0.5},
        privacy={**DP, "extra_epsilon": 40.0},
        federation={"rounds": 2, "local_steps": 1, "baselines": ["local", "central"]},
        output=output,
    )
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "1000")
        patch.setenv("MEDFL_STATE_DIR", str(folder / "state"))
        patch.setenv("MEDFL_REGISTRY", str(folder / "registry"))
        patch.setattr(sys, "argv", ["medfl-ray", "run", str(write_config(folder / "run.yaml", raw))])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0, said.getvalue()
    (folder / "said").write_text(said.getvalue())
    return folder


@pytest.fixture(scope="module")
def run(place):
    return run_folders(place / "runs")[0]


@pytest.fixture(scope="module")
def exports(run):
    return json.loads((run / "ledger.json").read_text())


@pytest.fixture(scope="module")
def accounts(run):
    return accounts_of_run(run, load_run_config(run / "config.yaml"))


@pytest.fixture
def medfl(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("MEDFL_REGISTRY", str(place / "registry"))
    monkeypatch.setenv("MEDFL_STATE_DIR", str(place / "state"))
    return command_line(monkeypatch, capsys)


def at_row(exports, run, head):
    """The account as the one function has it when a ledger's last row was the one named."""
    number, _, digest = head.partition(":")
    (export,) = (e for e in exports.values() if any(row["hash"] == digest for row in e["events"]))
    rows, budget = export["events"][: int(number)], export["spent"]["budget"]
    budgets = budgets_of(load_run_config(run / "config.yaml"), "patient", "synthetic", budget)
    names = (export["hospital"], export["data_set"])
    return account_of(names, rows, job_of(run), export["spent"]["delta"], budgets, head)


def words_of(account, digits):
    """All decimals that may stand where an account is shown."""
    parts = (account.total, account.run, account.extra)
    epsilons = {epsilon_words(part.epsilon, digits) for part in parts}
    return epsilons | {remaining_words(part, digits) for part in parts}


def assert_shows(text, account, digits):
    """The total is there, its terms are beside it, and no decimal is another than the account's."""
    assert epsilon_words(account.total.epsilon, digits) in text
    assert set(DECIMAL.findall(text)) <= words_of(account, digits), text
    for term in ("patient", "add/remove"):
        assert term in text, text
    assert re.search(r"1e-0?5", text), text


def epsilons_in(document, path=()):
    """Yield (path, mapping) for every mapping of a JSON document that states an epsilon beside its delta."""
    if isinstance(document, dict):
        if "epsilon" in document and "delta" in document and "enable_dp" not in document:
            yield path, document
        for key, value in document.items():
            yield from epsilons_in(value, (*path, key))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from epsilons_in(value, (*path, number))


def test_the_baselines_made_the_account_larger_than_the_run(accounts):
    for account in accounts.values():
        assert account.total.epsilon > account.run.epsilon + 1
        assert account.extra.epsilon > account.run.epsilon
        assert account.run.budget == 8
        assert account.extra.budget == 40
        assert account.run.epsilon <= 8
    assert {name: account.total.budget for name, account in accounts.items()} == {"north": 60, "south": None}


JSONS = (
    "ledger.json",
    "baselines.json",
    "model.json",
    "card.json",
    "receipts.jsonl",
    "metrics.jsonl",
    "hospitals.json",
)


@pytest.mark.parametrize("name", JSONS)
def test_hole_every_epsilon_of_a_file_is_the_accounts_at_the_row_that_it_names(run, exports, accounts, name):
    text = (run / name).read_text()
    documents = [json.loads(line) for line in text.splitlines()] if name.endswith("l") else [json.loads(text)]
    found = [(path, entry) for document in documents for path, entry in epsilons_in(document)]
    if name == "hospitals.json":
        assert all(entry["epsilon"] == 0 for _, entry in found)  # before the first round
        return
    assert found
    last = {account.ledger_head for account in accounts.values()}
    for path, entry in found:
        if path[-1] in ("run", "extra"):
            account = accounts[path[-2]]
            part = getattr(account, path[-1])
            assert (entry["epsilon"], entry["delta"], entry["budget"]) == (part.epsilon, part.delta, part.budget)
            continue
        account = at_row(exports, run, entry["ledger_head"])
        assert entry["epsilon"] == pytest.approx(account.total.epsilon, abs=1e-9), path
        assert (entry["delta"], entry["unit"], entry["adjacency"]) == (1e-5, "patient", "add_remove")
        assert entry["budget"] == account.total.budget
        if name in ("ledger.json", "model.json", "card.json"):
            assert entry["ledger_head"] in last


def test_the_card_shows_the_accounts(run, accounts):
    page = (run / "card.md").read_text()
    section = page[page.index("## Privacy") : page.index("## Limits")]
    for name, account in accounts.items():
        (row,) = (line for line in section.splitlines() if line.startswith(f"| {name} |"))
        assert_shows(row, account, 3)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        shown = [epsilon_words(part.epsilon, 3) for part in (account.total, account.run, account.extra)]
        assert [cells[1], cells[5], cells[7]] == shown


def test_hole_registry_gate_and_lists_show_the_accounts(medfl, place, accounts):
    record = Registry(place / "registry").get("tiny", 1).lineage.privacy
    for name, account in accounts.items():
        spent = record.spent[name]
        assert (spent.epsilon, spent.run, spent.extra) == (account.total.epsilon, account.run, account.extra)
        assert (spent.budget, spent.delta) == (account.total.budget, account.total.delta)
    worst = max(accounts.values(), key=lambda account: account.total.epsilon)
    (line,) = (line for line in medfl("models", "list").out.splitlines() if "privacy" in line)
    assert_shows(line, worst, 3)
    shown = json.loads(medfl("models", "show", "tiny").out)["lineage"]["privacy"]["spent"]
    assert {name: entry["epsilon"] for name, entry in shown.items()} == {
        name: account.total.epsilon for name, account in accounts.items()
    }
    refused = medfl("models", "promote", "tiny", "--least", "0.99999")
    (checked,) = (event for event in json.loads(medfl("models", "audit", "--json").out) if "refuse" in event["action"])
    (text,) = (check["text"] for check in checked["details"]["checks"] if check["name"] == "privacy")
    assert_shows(text, worst, 3)
    assert refused.code == 1


class _Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.rows, self.text, self._hidden = [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._hidden += tag in ("style", "pre")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "pre")

    def handle_data(self, data):
        if not self._hidden:
            self.text += data
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data


def test_hole_the_report_shows_the_accounts(run, accounts):
    text = (run / "report.html").read_text()
    page = _Cells(text)
    table = _Cells(text[(start := text.index("What was spent")) : text.index("</table>", start)]).rows
    for name, account in accounts.items():
        (row,) = (cells for cells in table if cells and cells[0].strip().startswith(name))
        shown = [epsilon_words(part.epsilon) for part in (account.total, account.run, account.extra)]
        assert [row[1].strip(), row[4].strip(), row[6].strip()] == shown
        assert row[3].strip() == remaining_words(account.total)
        assert row[8].strip() == "patient-level, delta = 1e-5, add/remove"
    worst = max(accounts.values(), key=lambda account: account.total.epsilon)
    assert page.text.count(parts_words(worst).replace("its baselines and studies", "the baselines")) == 2
    allowed = set().union(*(words_of(account, 2) for account in accounts.values()))
    assert set(re.findall(r"epsilon = (\d+\.\d\d)", page.text)) <= allowed
    assert re.findall(r"epsilon = (\d+\.\d\d)", page.text)


def test_what_receipts_show_prints_is_the_account_at_that_row(medfl, run, exports):
    receipts = [json.loads(line) for line in (run / "receipts.jsonl").read_text().splitlines()]
    expected = [
        f"{hospital}: {epsilon_words(at_row(exports, run, spent['ledger_head']).total.epsilon, 3)} in all so far "
        "(patient-level, add/remove, delta 1e-05)"
        for receipt in receipts
        for hospital, spent in receipt["spent"].items()
    ]
    lines = [
        line.split("epsilon  ")[1] for line in medfl("receipts", "show", run).out.splitlines() if "epsilon" in line
    ]
    assert lines == expected


def test_hole_ledger_show_names_the_budgets_that_are_enforced(medfl, run, accounts):
    lines = [line for line in medfl("privacy", "ledger", "show", run).out.splitlines() if line.startswith("spent:")]
    for line, account in zip(lines, accounts.values(), strict=True):
        assert_shows(line, account, 3)
        assert parts_words(account, 3) in line
    assert "lifetime budget 60" in lines[0]
    assert "no lifetime budget" in lines[1]


def test_the_last_lines_of_a_run_show_what_it_cost_in_all_and_the_live_ones_what_it_cost_so_far(
    place, run, exports, accounts
):
    lines = (place / "said").read_text().splitlines()
    receipts = [json.loads(line)["spent"] for line in (run / "receipts.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if line.startswith("round ")]
    for line, spent in zip(rounds, receipts, strict=True):
        totals = [at_row(exports, run, one["ledger_head"]).total.epsilon for one in spent.values()]
        assert f"epsilon so far at most {epsilon_words(max(totals))} (patient, delta=1e-5, add/remove; " in line
        assert "budget of the run 8" in line
    (last,) = (line for line in lines if line.startswith("epsilon "))
    worst = max(accounts.values(), key=lambda account: account.total.epsilon)
    assert_shows(last, worst, 2)
    assert last.endswith(f"({worst.terms}): {parts_words(worst)}")


@pytest.mark.skipif(not HAS_MLFLOW, reason="MLflow is not installed: pip install 'medfl-ray[mlflow]'")
def test_mlflow_has_the_accounts(place, run, exports, accounts):
    from medfl_ray.store.run.mlflow_tracking import open_client

    client = open_client(f"sqlite:///{place / 'mlflow.db'}")
    (experiment,) = (found for found in client.search_experiments() if found.name != "Default")
    (found,) = client.search_runs([experiment.experiment_id])
    receipts = [json.loads(line)["spent"] for line in (run / "receipts.jsonl").read_text().splitlines()]
    for name, account in accounts.items():
        history = client.get_metric_history(found.info.run_id, f"{name}/epsilon")
        so_far = [at_row(exports, run, receipt[name]["ledger_head"]).total.epsilon for receipt in receipts]
        assert [point.value for point in sorted(history, key=lambda p: p.step)] == [*so_far, account.total.epsilon]
        assert found.data.metrics[f"{name}/epsilon_run"] == account.run.epsilon
        assert found.data.metrics[f"{name}/epsilon_extra"] == account.extra.epsilon
        tag = found.data.tags[f"epsilon.{name}"]
        assert tag.startswith("patient-level, delta=1e-05, adjacency add_remove; in all ")
        assert set(DECIMAL.findall(tag)) <= words_of(account, 3)
        assert tag.endswith(parts_words(account, 3))
    assert found.data.params["privacy.epsilon"] == "8.0"
