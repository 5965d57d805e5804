"""The table and files that every benchmark writes."""

import json

import pytest
from harness import Goal, benchmark, describe_machine, report, table


@pytest.mark.parametrize(
    ("goal", "value", "holds"),
    [
        (Goal("dice", at_least=0.8), 0.8, True),
        (Goal("dice", at_least=0.8), 0.79, False),
        (Goal("seconds", at_most=300), 299, True),
        (Goal("gap", at_least=-0.02, at_most=0.02), 0.03, False),
        (Goal("dice", at_most=1), float("nan"), False),
    ],
)
def test_a_goal_holds_on_its_limit_and_never_for_nan(goal, value, holds):
    assert goal.holds(value) is holds


def test_the_table_names_what_falls_short_and_what_was_not_measured():
    text = table({"a": 1.0, "b": 2.0}, [Goal("a", at_least=2), Goal("c", at_most=1)])
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["a"].endswith("FALLS SHORT")
    assert rows["b"].split() == ["b", "2"]
    assert rows["c"].endswith("not measured")


def test_figures_go_to_the_named_file_and_nothing_else_stays(tmp_path, capsys):
    file = tmp_path / "figures.json"
    with benchmark("test", ["--quick", "--json", str(file)]) as options:
        (options.out / "scratch").write_text("x")
        report(options, {"dice": 0.5, "missing": float("nan")})
    assert json.loads(file.read_text()) == {"dice": 0.5, "missing": None}
    assert not options.out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert "no result" in capsys.readouterr().out


def test_a_named_folder_is_kept(tmp_path):
    with benchmark("test", ["--out", str(tmp_path / "out")]) as options:
        (options.out / "kept").write_text("x")
    assert (tmp_path / "out" / "kept").exists()


def test_the_machine_is_described():
    assert "cores" in describe_machine()
