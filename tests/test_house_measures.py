"""The code base's figures, on a package of a few lines whose figures were counted by hand."""

import json
import subprocess
import sys
from pathlib import Path

import house
import pytest
from house_measures import at_share, circles, imports_among, read_sources, two_way_pairs

FILES = {
    "core/__init__.py": "",
    "core/data/__init__.py": "",
    "core/models/__init__.py": "",
    "core/data/cases.py": '''"""Cases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.models.networks import Network

Request = dict[str, Any]


def load(a, b, c, d, e, f, *, g) -> Any:
    """Load.

    Several lines that are no code.
    """
    assert a
    return g  # type: ignore[no-any-return]


def read(network: "Network"):
    from core.data.sources import find

    return find(network)
''',
    "core/data/sources.py": '''"""Sources."""

import core.data.cases as cases


class Source:
    """One."""

    def find(self, a, b, c, d, e, f) -> None:
        try:
            cases.load(a, b, c, d, e, f, g=1)
        except (ValueError, Exception):  # noqa: BLE001
            print("# TODO in a text is no comment")

    def _hidden(self): ...

    @staticmethod
    def seven(a, b, c, d, e, f, g) -> None: ...


class Request:
    def documented(self) -> None:
        """Yes."""


def find(network) -> None:
    def inner(a, b, c, d, e, f, g):
        return a

    return inner  # TODO: later
''',
    "core/models/networks.py": "from core.data import cases\nimport os\n\nclass Network: pass\n",
    "core/cli/main.py": "def command(a, b, c, d, e, f, g) -> None:\n    from hub.app import build\n    build()\n",
    "core/tests/test_x.py": "def test(a, b, c, d, e, f, g): assert a\n",
    "hub/app.py": """import core.cli.main


def build() -> None:
    @app.get("/x")
    def read(a, b, c, d, e, f, g): ...
""",
    "hub/segment_routes.py": "async def send(a, b, c, d, e, f, g) -> None: ...\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def sources(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(house, "CLI", "core/cli")
    return read_sources(root, ("core", "hub"))


def test_sizes_leave_out_docstrings_tests_and_empty_files(sources):
    figures = house.measure(sources)
    assert figures["num_files"] == 6
    assert figures["num_lines"] == 25 + 30 + 4 + 3 + 6 + 1
    assert (figures["file_lines_median"], figures["file_lines_p90"], figures["file_lines_max"]) == (4, 30, 30)
    # load 3, read 4; find 5, _hidden 1, seven 1, documented 1, find 5, inner 2; command 3; build 3, read 1; send 1
    assert figures["num_functions"] == 12
    assert [figures[f"function_lines_{name}"] for name in ("median", "p90", "p99", "max")] == [2, 5, 5, 5]


def test_a_share_of_the_values_lies_at_or_below_its_quantile():
    assert [at_share(range(1, 11), share) for share in (0.5, 0.9, 0.99, 1.0)] == [5, 9, 10, 10]
    assert at_share([], 0.5) == 0


def test_parameters_are_counted_without_self_and_outside_commands_and_routes(sources):
    found = [(function.name, function.num_parameters) for function in house.functions_above(sources)]
    assert found == [("load", 7), ("seven", 7), ("inner", 7)]
    assert [one.name for one in house.functions_above(sources, 5)] == ["load", "seven", "inner", "find"]


def test_methods_written_in_a_class_are_counted(sources):
    assert [(one.name, one.num_methods) for one in house.classes_above(sources, 0)] == [("Source", 3), ("Request", 1)]
    assert house.measure(sources)["classes_above_15_methods"] == 0


def test_imports_under_type_checking_do_not_count_and_lazy_ones_do(sources):
    found = {(one.importer, one.imported, one.line, one.lazy) for one in imports_among(sources)}
    assert found == {
        ("core.data.cases", "core.data.sources", 23, True),
        ("core.data.sources", "core.data.cases", 3, False),
        ("core.models.networks", "core.data.cases", 1, False),
        ("core.cli.main", "hub.app", 2, True),
        ("hub.app", "core.cli.main", 1, False),
    }


def test_circles_and_two_way_pairs(sources):
    found = imports_among(sources)
    assert circles(found) == [{"core.cli.main", "hub.app"}, {"core.data.cases", "core.data.sources"}]
    assert two_way_pairs(sources, found) == [("core.cli", "hub")]
    figures = house.measure(sources)
    assert (figures["circles"], figures["files_in_circles"], figures["two_way_pairs"]) == (2, 4, 1)


def test_two_circles_through_one_module_are_one_group():
    pairs = [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("c", "d")]
    assert circles([house_import(*pair) for pair in pairs]) == [{"a", "b", "c"}]


def house_import(importer: str, imported: str):
    from house_measures import Import

    return Import(importer, imported, 1, False)


def test_folders_count_their_own_modules(sources, monkeypatch):
    monkeypatch.setattr(house, "CLI", "core/data")
    figures = house.measure(sources)
    assert (figures["cli_files"], figures["largest_folder_files"]) == (2, 2)
    monkeypatch.setattr(house, "CLI", "hub")
    assert house.measure(sources)["cli_files"] == 2


def test_words_are_counted_where_they_are_code_or_comments(sources):
    figures = house.measure(sources)
    thousands = 69 / 1000
    # Any: in the alias and in load's annotation, not in the import
    assert figures["any_per_1000_lines"] == pytest.approx(2 / thousands)
    for kind in ("type_ignore", "noqa", "except_exception", "assert", "todo"):
        assert figures[f"{kind}_per_1000_lines"] == pytest.approx(1 / thousands), kind


def test_public_things_with_docstrings_and_annotations(sources):
    figures = house.measure(sources)
    # load read | Source find seven Request documented find | Network | command | build send: documented are load,
    # Source and documented; without annotation is read alone
    assert figures["public_documented"] == pytest.approx(3 / 12)
    assert figures["public_return_annotated"] == pytest.approx(8 / 9)


def test_a_name_of_the_glossary_in_two_modules_has_several_meanings(sources):
    assert house.names_with_several_meanings(sources) == {"Request": ["core/data/cases.py", "core/data/sources.py"]}
    assert house.measure(sources)["names_with_several_meanings"] == 1
    assert len(set(house.GLOSSARY)) == len(house.GLOSSARY)


def test_the_places_name_line_and_import(sources):
    lines = list(house.places(sources))
    assert "core/data/cases.py:13: load takes 7 parameters" in lines
    assert "circle of 2: core.data.cases, core.data.sources" in lines
    assert "  core.data.cases:23 imports core.data.sources (lazy)" in lines
    assert "two-way: core.cli and hub" in lines
    assert "core/data/cases.py: Any 2 times" in lines


def test_the_script_writes_flat_figures_and_a_table_of_80_columns(tmp_path):
    file = tmp_path / "house.json"
    script = Path(house.__file__)
    ended = subprocess.run(
        [sys.executable, str(script), "--quick", "--json", str(file)], capture_output=True, text=True, check=True
    )
    figures = json.loads(file.read_text())
    assert {goal.figure for goal in house.GOALS} <= set(figures)
    assert all(isinstance(value, int | float) for value in figures.values())
    assert figures["num_files"] > 300
    assert figures["file_lines_max"] <= 400
    rows = [line for line in ended.stdout.splitlines() if line.startswith("  ")]
    assert len(rows) == len(figures)
    assert max(map(len, rows)) <= 80
