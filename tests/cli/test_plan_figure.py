"""medfl-ray privacy plan --figure: the cost of a plan, beside what finished runs got for theirs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from cli_runs import DP, configuration, run_folders, write_config
from typer.testing import CliRunner

from medfl_ray.analytics.plan_figure import finished_runs
from medfl_ray.cli.main import app
from medfl_ray.errors import ConfigError, PrivacyConfigError

FIGURES = ("--noise-multiplier", "9", "--sample-rate", "0.05", "--rounds", "3", "--delta", "1e-5")


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def words_of(svg: Path) -> str:
    """The comments that matplotlib writes beside the outlines of each text."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    tree = ET.parse(svg, parser)
    return " ".join(node.text or "" for node in tree.iter() if node.tag is ET.Comment)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a private run, a run without privacy and something that is no run."""
    monkeypatch.chdir(tmp_path)
    for name, privacy in (("private", DP), ("open", {"enable_dp": False})):
        invoke("run", write_config(tmp_path / f"{name}.yaml", configuration(name=name, privacy=privacy)))
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("name: [")
    return tmp_path / "runs"


def test_a_plan_of_figures_is_drawn_with_its_unit(tmp_path: Path) -> None:
    figure = tmp_path / "plan.svg"
    output = invoke("privacy", "plan", *FIGURES, "--figure", figure)
    words = words_of(figure)
    assert "drawn: plan.svg" in output
    assert "unit patient, delta 1e-05, adjacency add/remove" in words
    assert "held-out" not in words


def test_finished_private_runs_join_the_figure(runs: Path) -> None:
    config = runs.parent / "private.yaml"
    output = invoke("privacy", "plan", config, "--figure", "plan.svg", "--runs", runs)
    words = words_of(Path("plan.svg"))
    assert "with 1 finished runs" in output
    assert "Dice on held-out patients" in words
    assert "this plan: 8.00" in words
    assert words.count("adjacency add/remove") == 2
    private = next(folder.name for folder in run_folders() if folder.name.endswith("private"))
    assert private in words


def test_a_run_is_a_point_with_what_it_spent_and_reached(runs: Path) -> None:
    (point,) = finished_runs(runs)
    assert 0 < point.epsilon <= 8
    assert 0 <= point.score <= 1
    assert (point.delta, point.metric) == (1e-5, "dice")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("--runs", "."), PrivacyConfigError, "--figure FILE"),
        (("--figure", "plan.txt"), ConfigError, "end it in .png"),
        (("--figure", "nowhere/plan.svg"), ConfigError, "choose a folder that exists"),
        (("--figure", "plan.svg", "--runs", "nowhere"), ConfigError, "is not a folder"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    arguments: tuple[str, ...], error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        CliRunner().invoke(app, ["privacy", "plan", *FIGURES, *arguments], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
