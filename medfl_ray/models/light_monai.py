"""Loading MONAI without the plotting, table, tracking and cloud libraries that training never calls.

`import monai` loads every library that any of its corners may use, if it is installed: half of its time and a hundred
megabytes, in each process that trains. MONAI treats them as optional, and so they are left out here.
"""

from __future__ import annotations

import importlib
import sys

UNUSED = ("boto3", "matplotlib", "mlflow", "optuna", "pandas", "sklearn", "tensorboardX")


def load_monai() -> None:
    """Import MONAI as if the unused libraries were not installed; whoever imports one afterwards gets it."""
    if "monai" in sys.modules:
        return
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: to Python there is no such module
    try:
        importlib.import_module("monai")
    finally:
        for name in hidden:
            del sys.modules[name]
