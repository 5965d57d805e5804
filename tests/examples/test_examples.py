"""Every example runs to its end and says what it found; the notebooks are the scripts."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from ray_head import without_ray

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SAYS = {
    "flower_monai": [r"all 2 rounds were published", r"round 2: north Dice 0\.\d+, south Dice 0\.\d+"],
    "own_data": [
        r"round 2: 2 hospitals trained",
        r"north: epsilon \d+\.\d+ \(patient-level, delta=1e-05, add/remove\)",
    ],
    "own_network": [r"refused: layer '1' is BatchNorm2d", r"all 2 rounds were published"],
    "own_strategy": [r"mean Dice with nesterov 0\.\d+, with fedavg 0\.\d+"],
    "search": [r"trial 2: epsilon \d+\.\d+, Dice 0\.\d+", r"recommended: medfl-ray run", r"you need epsilon about \d"],
    "serve_model": [r"without a token: HTTP 401", r"a mask of shape \(40, 40, 40\) with labels \["],
    "simulate": [r"20 hospitals, 3 rounds, 50% of them in each", r"mean Dice 0\.\d+ after round 3"],
}


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_notebooks", EXAMPLES / "make_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name, tmp_path):
    """Run an example in a folder of its own that has the checkout's configurations."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = without_ray(
        PYTHONPATH=str(ROOT),
        MPLBACKEND="agg",
        TMPDIR=str(tmp_path),
        MEDFL_STATE_DIR=str(tmp_path / "state"),
        RAY_TMPDIR="/tmp",
    )
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), "--fast"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


LONG = ("search", "serve_model")


@pytest.mark.ci
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in SAYS])
def test_an_example_runs_and_says_what_it_found(name, tmp_path):
    done = run_example(name, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for pattern in SAYS[name]:
        assert re.search(pattern, done.stdout), (pattern, done.stdout[-3000:])


def test_every_example_is_run_and_told_of(maker):
    assert {path.stem for path in maker.scripts()} == set(SAYS)
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in text for name in SAYS)


def test_the_notebooks_are_up_to_date_and_empty_of_outputs(maker):
    written = {path.stem for path in (EXAMPLES / "notebooks").glob("*.ipynb")}
    assert written == {path.stem for path in maker.scripts()}
    for script in maker.scripts():
        text = (EXAMPLES / "notebooks" / f"{script.stem}.ipynb").read_text(encoding="utf-8")
        assert text == maker.notebook(script), "run python examples/make_notebooks.py"
        assert all(not cell.get("outputs") for cell in nbformat.reads(text, as_version=4)["cells"])


def test_a_notebooks_code_is_the_scripts_code(maker):
    """Cell by cell, in the order of the script, with the start in the checkout's root before it."""
    for script in maker.scripts():
        cells = nbformat.reads(maker.notebook(script), as_version=4)["cells"]
        code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        assert code[0] == maker.START
        bare = [line for cell in code[1:] for line in cell.splitlines() if line.strip()]
        own = [line for line in script.read_text().splitlines() if line.strip()]
        assert [line for line in own if line in set(bare)] == bare
