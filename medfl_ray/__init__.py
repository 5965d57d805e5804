"""Federated learning for medical imaging with patient-level differential privacy.

The curated public names of the core; everything else is imported from its own module.
"""

from medfl_ray.config import RunConfig
from medfl_ray.config_files import load_run_config
from medfl_ray.errors import MedflError

__version__ = "0.1.0"
__all__ = ["MedflError", "RunConfig", "__version__", "load_run_config"]
