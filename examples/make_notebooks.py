"""Write notebooks/ from the scripts next to it: `# %%` begins a cell, `# %% [markdown]` one of text in comments."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
START = """import os

while not os.path.exists("pyproject.toml"):  # the checkout's root, where the scripts run
    os.chdir("..")"""


def scripts() -> list[Path]:
    """Return the examples that become notebooks."""
    return sorted(path for path in HERE.glob("*.py") if path.read_text(encoding="utf-8").startswith("# %%"))


def notebook(script: Path) -> str:
    """Return a script as a notebook without outputs, the same for the same script."""
    cells = []
    for part in re.split(r"^# %%", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        if kind.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(new_markdown_cell("\n".join(lines)))
        else:
            cells.append(new_code_cell(body.strip()))
    cells.insert(1, new_code_cell(START))
    for number, cell in enumerate(cells):
        cell["id"] = f"{script.stem}-{number}".replace("_", "-")
    made = new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    nbformat.validate(made)
    text: str = nbformat.writes(made, indent=1)
    return text + "\n"


if __name__ == "__main__":
    (HERE / "notebooks").mkdir(exist_ok=True)
    for path in scripts():
        (HERE / "notebooks" / f"{path.stem}.ipynb").write_text(notebook(path), encoding="utf-8")
        print(f"notebooks/{path.stem}.ipynb")
