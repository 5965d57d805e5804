"""Opens the source of models that the settings name."""

from __future__ import annotations

from medfl_ray.errors import ConfigError
from serve.model_loader import FolderSource, ModelSource
from serve.settings import ServeSettings


def open_source(settings: ServeSettings) -> ModelSource:
    """Return the folder or the registry that models come from.

    Raises:
      ConfigError: both are named, or what is named cannot be opened.
    """
    if settings.models is not None and settings.registry is not None:
        raise ConfigError("both a folder of models and a registry are given; unset MEDFL_MODELS or MEDFL_REGISTRY")
    if settings.models is not None:
        return FolderSource(settings.models)
    raise ConfigError("no models: set MEDFL_MODELS to a folder of packages, or MEDFL_REGISTRY to a registry")
