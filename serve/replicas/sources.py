"""Places that models come from: a folder of packages, or the registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from medfl_ray.errors import ConfigError
from medfl_ray.export.description import DESCRIPTION, read_description
from serve.refusals import NotServed
from serve.replicas.model_loader import ModelKey, ModelSource, Offer
from serve.settings import ServeSettings

if TYPE_CHECKING:
    from medfl_ray.store.registry.registry import Registry

CHAMPION = "champion"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def open_source(settings: ServeSettings) -> ModelSource:
    """Return the folder that the settings name, otherwise the registry that they name, otherwise the default registry.

    Raises:
      ConfigError, RegistryError: both are named, or what is named cannot be opened.
    """
    if settings.models is not None and settings.registry is not None:
        raise ConfigError("both a folder of models and a registry are given; unset MEDFL_MODELS or MEDFL_REGISTRY")
    if settings.models is not None:
        return FolderSource(settings.models)
    from medfl_ray.store.registry.registry import Registry  # its database is no load for a replica that has a folder

    return RegistrySource(Registry(settings.registry))


class RegistrySource:
    """The versions of a registry that nobody withdrew; its champions are served by default. Fetching checks them."""

    def __init__(self, registry: Registry) -> None:
        """Take a registry."""
        self._registry = registry

    def offers(self) -> dict[str, Offer]:
        """Return every model with its versions, without those that were withdrawn.

        Raises:
          RegistryError: the registry cannot be read, or a record is not what it signed.
        """
        versions: dict[str, list[str]] = {}
        champions: dict[str, str] = {}
        for version in self._registry.versions():
            numbers = versions.setdefault(version.name, [])
            if version.withdrawn:
                continue
            numbers.append(str(version.version))
            if version.stage == "champion":
                champions[version.name] = str(version.version)
        return {name: Offer(tuple(numbers), champions.get(name)) for name, numbers in versions.items()}

    def package(self, key: ModelKey, into: Path) -> Path:
        """Fetch one version's package; signature and SHA-256 are checked.

        Raises:
          RegistryError: it is not there, or not what was registered.
        """
        return self._registry.fetch(self._registry.get(key.name, int(key.version)), into)


class FolderSource:
    """Packages in a folder: FOLDER/NAME/VERSION/, FOLDER/NAME/, or the folder itself; a version never changes.

    The file FOLDER/NAME/champion names the version that is served by default; without it, it is the highest.
    """

    def __init__(self, folder: Path) -> None:
        """Take a folder that exists.

        Raises:
          ConfigError: it does not.
        """
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder.name!r} of models; give MEDFL_MODELS a folder of packages")
        self._folder = folder

    def offers(self) -> dict[str, Offer]:
        """Return every model with its versions."""
        found: dict[str, dict[str, Path]] = {}
        for key, folder in self._packages():
            found.setdefault(key.name, {})[key.version] = folder
        return {name: self._offer(name, tuple(sorted(versions, key=_order))) for name, versions in found.items()}

    def package(self, key: ModelKey, into: Path) -> Path:
        """Return the package's own folder; nothing is copied."""
        for found, folder in self._packages():
            if found == key:
                return folder
        raise NotServed(f"the model {key.name!r} has no version {key.version!r}")

    def _packages(self) -> list[tuple[ModelKey, Path]]:
        if (self._folder / DESCRIPTION).is_file():
            return [(ModelKey(served_name(read_description(self._folder).name), "1"), self._folder)]
        packages = []
        for model in sorted(path for path in self._folder.iterdir() if NAME.fullmatch(path.name)):
            if (model / DESCRIPTION).is_file():
                packages.append((ModelKey(model.name, "1"), model))
            elif model.is_dir():
                versions = [p for p in model.iterdir() if NAME.fullmatch(p.name) and (p / DESCRIPTION).is_file()]
                packages.extend((ModelKey(model.name, version.name), version) for version in versions)
        return packages

    def _offer(self, name: str, versions: tuple[str, ...]) -> Offer:
        chosen = self._folder / name / CHAMPION
        champion = chosen.read_text(encoding="utf-8").strip() if chosen.is_file() else versions[-1]
        return Offer(versions, champion if champion in versions else None)


def _order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else 0, version)


def served_name(name: str) -> str:
    """Return a name that may stand in an address: other characters than letters, digits, '.', '_', '-' become '-'."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"
