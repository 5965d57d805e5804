"""What a trained model needs beside its weights: network, channels, labels, preparation and privacy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medfl_ray.config.files import load_run_config
from medfl_ray.config.model import ModelConfig
from medfl_ray.config.run import RunConfig
from medfl_ray.data.prepare.dataset import HospitalData
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ConfigError, DataError, ExportError
from medfl_ray.messages import HospitalInfo
from medfl_ray.privacy.account import PrivacyAccount, Spending
from medfl_ray.privacy.run_accounts import accounts_of_run

Task = Literal["segmentation", "classification"]


@dataclass(frozen=True)
class ModelPackage:
    """One run's model as serving and evaluation need it; `labels` names the classes above 0."""

    name: str
    task: Task
    model: ModelConfig
    spatial_dims: int
    patch_size: tuple[int, ...]
    channels: tuple[str, ...]
    out_channels: int
    labels: dict[int, str]
    preprocessing: Preprocessing
    privacy: dict[str, Any]

    @property
    def num_channels(self) -> int:
        """Image channels of the network."""
        return self.model.in_channels or len(self.channels)


def read_package(run_dir: Path, run: RunConfig, data: HospitalData | None) -> ModelPackage:
    """Collect what a finished run says of its model.

    Args:
      data: the data of a hospital that are not private, for channel names and preparation; of private data
        only what the hospitals declared is used.

    Raises:
      ExportError: the run has not ended.
    """
    info = _read_infos(run_dir)[0]
    if data is not None:
        channels, preprocessing = data.channels, data.preprocessing
    else:
        channels = run.data.channels or tuple(f"channel-{i}" for i in range(info.num_channels))
        values = tuple(sorted(run.data.labels)) or tuple(info.labels)
        values = values if run.data.task == "segmentation" else ()
        preprocessing = Preprocessing.from_config(run.data, run.spatial_dims, channels, values)
    return ModelPackage(
        name=run.name,
        task=run.data.task,
        model=run.model,
        spatial_dims=run.spatial_dims,
        patch_size=run.patch_size,
        channels=channels,
        out_channels=run.model.out_channels or max(info.labels, default=1) + 1,
        labels=dict(info.labels),
        preprocessing=preprocessing,
        privacy=privacy_statement(run, run_dir),
    )


def load_run(run_dir: Path) -> RunConfig:
    """Return the resolved configuration of a run's folder.

    Raises:
      ConfigError: the folder is not a run's.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir.name!r} is not the folder of a run: it has no config.yaml")
    return load_run_config(run_dir / "config.yaml")


def open_public_data(run: RunConfig) -> HospitalData | None:
    """Open the first hospital whose data are public or synthetic; None where none can be read here."""
    quiet = run.model_copy(update={"training": run.training.model_copy(update={"num_workers": 0})})
    try:
        public = [policy.hospital for policy in list_hospitals(quiet) if policy.declared != "private"]
        return open_hospital_data(quiet, (public[0],)) if public else None
    except (ConfigError, DataError):
        return None


def privacy_statement(run: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Say what the weights reveal: epsilon per hospital with unit, delta and adjacency, or that DP was off.

    Each entry of `spent` is the hospital's account as `accounts_of_run` has it: `epsilon` is everything ever charged to
    the data set, and of that `run` is the run's rounds, `extra` its baselines and studies, each beside its own budget.
    `unprotected` names the hospitals whose data were used without patient-level protection.

    Raises:
      ExportError: a file that says what was spent is damaged.
    """
    try:
        accounts = accounts_of_run(run_dir, run)
    except ConfigError as error:
        raise ExportError(str(error)) from None
    exposed = sorted(name for name, account in accounts.items() if account.is_unprotected)
    unprotected = {"unprotected": exposed} if exposed else {}
    if not run.privacy.enable_dp:
        note = "trained without differential privacy; weights may reveal patients"
        return {"differential_privacy": False, "note": note, **unprotected}
    by_tree = run.privacy.hospital_dp and run.privacy.hospital_level.mechanism == "tree"
    return {
        "differential_privacy": True,
        "unit": run.privacy.unit,
        "adjacency": "zero_out" if by_tree else "add_remove",
        "max_grad_norm": run.privacy.hospital_level.clip_norm if run.privacy.hospital_dp else run.privacy.max_grad_norm,
        "spent": {
            name: statement_entry(account) for name, account in accounts.items() if account.unit == run.privacy.unit
        },
        **unprotected,
    }


def statement_entry(account: PrivacyAccount) -> dict[str, Any]:
    """Return an account as a privacy statement has it: the total's figures first, an infinite one as "Infinity"."""
    plain = account.to_json()
    total = plain.pop("total")
    del plain["hospital"]
    return {**total, **plain}


def account_in(hospital: str, entry: Mapping[str, Any]) -> PrivacyAccount:
    """Read an entry of a privacy statement back; one of an earlier version has the total alone.

    Raises:
      ValueError: it is no such entry, or lacks a figure.
    """
    total = {name: entry.get(name) for name in Spending.model_fields}
    others = {name: value for name, value in entry.items() if name not in total}
    is_earlier = "moment" not in others
    return PrivacyAccount.model_validate(
        {
            "hospital": hospital,
            "data_set": "",
            **({"moment": "receipt"} if is_earlier else {}),
            **others,
            "total": total,
        }
    )


def _read_infos(run_dir: Path) -> list[HospitalInfo]:
    path = run_dir / "hospitals.json"
    if not path.is_file():
        raise ExportError(
            f"the run {run_dir.name!r} has not ended (no hospitals.json); continue it with medfl-ray run --resume"
        )
    try:
        return [HospitalInfo.model_validate(entry) for entry in json.loads(path.read_text()).values()]
    except (ValueError, AttributeError):
        raise ExportError(
            f"hospitals.json of the run {run_dir.name!r} is damaged; run medfl-ray run --resume to write it again"
        ) from None
