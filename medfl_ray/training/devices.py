"""Choosing the device that a hospital trains on."""

from __future__ import annotations

import torch

from medfl_ray.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device of the configuration; 'auto' is a CUDA GPU where there is one, else the CPU.

    Raises:
      ConfigError: the named device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}.get(
        device.type, False
    )
    if missing or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"training.device is {name!r}, which this machine does not have; use 'auto' or 'cpu'")
    return device
