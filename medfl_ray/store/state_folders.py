"""Where ledgers and their mirror lie: with the run for synthetic data, else in a folder that outlives every run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy

# No hospital's name begins with an underscore, so that none can have this folder.
MIRROR_FOLDER = "_mirror"
FEDERATION_FOLDER = "_federation"
MIRROR_IN_RUN = "mirror"


def state_root(run: RunConfig | None = None) -> Path:
    """Return the folder of ledgers that outlive the run, absolute; resolved once, where the run is started.

    A relative folder in another process, or on another node, would be another folder.
    """
    if run is not None and run.output.state_directory is not None:
        return run.output.state_directory.expanduser().absolute()
    root = os.environ.get("MEDFL_STATE_DIR") or os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(root).expanduser().absolute() / "medfl-ray"


def hospital_folder(policy: SitePolicy, run_folder: Path, root: Path) -> Path:
    """Return where a hospital keeps its ledger; `root` is the run's `state_root`."""
    if policy.declared == "synthetic":
        return run_folder.absolute() / "hospitals" / policy.hospital
    return root / policy.hospital


def federation_folder(policies: Iterable[SitePolicy], run_folder: Path, root: Path) -> Path:
    """Return where the coordinator keeps the federation's own account, of hospital-level epsilon."""
    synthetic = all(policy.declared == "synthetic" for policy in policies)
    return (run_folder.absolute() if synthetic else root) / FEDERATION_FOLDER


def federation_mirror_folder(policies: Iterable[SitePolicy], run_folder: Path, root: Path) -> Path:
    """Return where the copy of the federation's own account is kept, apart from the account."""
    synthetic = all(policy.declared == "synthetic" for policy in policies)
    return run_folder.absolute() / MIRROR_IN_RUN if synthetic else root / MIRROR_FOLDER


def mirror_folder(policy: SitePolicy, run_folder: Path, root: Path) -> Path:
    """Return where the coordinator keeps the copy of a hospital's ledger."""
    return run_folder.absolute() / MIRROR_IN_RUN if policy.declared == "synthetic" else root / MIRROR_FOLDER
