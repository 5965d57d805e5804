"""Federated learning for medical imaging with patient-level differential privacy.

The curated public names of the core; everything else is imported from its own module.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfl_ray.config.files import load_run_config
    from medfl_ray.config.run import RunConfig
    from medfl_ray.errors import MedflError

__version__ = "0.1.0"
__all__ = ["MedflError", "RunConfig", "__version__", "load_run_config"]
_HOMES = {
    "MedflError": "medfl_ray.errors",
    "RunConfig": "medfl_ray.config.run",
    "load_run_config": "medfl_ray.config.files",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: the command line's help needs none of them.

    Raises:
      AttributeError: there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
