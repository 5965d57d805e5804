"""Where served models come from, and which version a request gets.

A version is looked up once per request. A newly promoted version is loaded before it takes over, and one that cannot
be loaded does not.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from medfl_ray.errors import ConfigError, MedflError
from medfl_ray.export.description import DESCRIPTION, PackageDescription, read_description
from serve.refusals import NotServed, Unavailable

CHAMPION = "champion"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
log = structlog.get_logger("medfl_ray.serve")


@dataclass(frozen=True, order=True)
class ModelKey:
    """One version of a model; `text` is its id between replicas."""

    name: str
    version: str

    @property
    def text(self) -> str:
        """Name and version in one word."""
        return f"{self.name}@{self.version}"

    @classmethod
    def parse(cls, text: str) -> ModelKey:
        """Read what `text` wrote."""
        name, _, version = text.rpartition("@")
        return cls(name, version)


@dataclass(frozen=True)
class Offer:
    """The versions of one model; `champion` is what requests without a version get, None if nothing is promoted."""

    versions: tuple[str, ...]
    champion: str | None


class ModelSource(Protocol):
    """A place that has model packages."""

    def offers(self) -> dict[str, Offer]:
        """Return every model with its versions, as they are now."""
        ...

    def package(self, key: ModelKey, into: Path) -> Path:
        """Return the folder of one version's package, fetched into a folder if it is not on this machine."""
        ...


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


class Catalogue:
    """The models that are served now. `refresh` follows the source; `resolve` gives one request its version."""

    def __init__(
        self,
        source: ModelSource,
        describe: Callable[[ModelKey], Awaitable[PackageDescription]],
        only: str | None = None,
        on_change: Callable[[ModelKey], None] = lambda key: None,
    ) -> None:
        """Take a source of models.

        Args:
          describe: loads a version where it will run, and says what it is; raises where it cannot be loaded.
          only: serve this model alone.
          on_change: called with each version that has become the served one.
        """
        self._source, self._describe, self._only, self._on_change = source, describe, only, on_change
        self._offers: dict[str, Offer] = {}
        self._champions: dict[str, ModelKey] = {}
        self._refused: set[ModelKey] = set()
        self._descriptions: dict[ModelKey, PackageDescription] = {}

    @property
    def ready(self) -> bool:
        """Whether a model is loaded and can answer."""
        return bool(self._champions)

    @property
    def champions(self) -> Mapping[str, ModelKey]:
        """The version that a request without one gets, by model."""
        return self._champions

    def versions(self, name: str) -> tuple[str, ...]:
        """Return the versions of a model that may be asked for.

        Raises:
          NotServed: there is no such model.
        """
        self._check(name)
        return self._offers[name].versions

    def names(self) -> list[str]:
        """Return the names of all models that have a served version."""
        return sorted(self._champions)

    def resolve(self, name: str, version: str | None = None) -> ModelKey:
        """Return the version that a request gets; it must keep to it.

        Raises:
          NotServed: there is no such model or version.
          Unavailable: the model has no served version yet.
        """
        self._check(name)
        if version is not None:
            if version not in self._offers[name].versions:
                raise NotServed(f"the model {name!r} has no version {version[:64]!r}")
            return ModelKey(name, version)
        if name not in self._champions:
            raise Unavailable(
                f"no version of the model {name!r} is promoted and could be loaded; promote one, or name a version"
            )
        return self._champions[name]

    async def description(self, key: ModelKey) -> PackageDescription:
        """Return what a version's package says of itself."""
        if key not in self._descriptions:
            self._descriptions[key] = await self._describe(key)
        return self._descriptions[key]

    async def refresh(self) -> None:
        """Look at the source and take over what was promoted; where that fails, what was served stays served."""
        try:
            offers = await asyncio.to_thread(self._source.offers)
        except (MedflError, OSError) as error:
            log.error("models_not_listed", error=type(error).__name__)
            return
        if self._only is not None:
            offers = {name: offer for name, offer in offers.items() if name == self._only}
        self._offers = offers
        for gone in self._champions.keys() - offers.keys():
            del self._champions[gone]
        for name, offer in offers.items():
            if offer.champion is None:
                self._champions.pop(name, None)
            elif self._champions.get(name) != (key := ModelKey(name, offer.champion)):
                await self._take_over(key)

    async def _take_over(self, key: ModelKey) -> None:
        try:
            await self.description(key)
        except MedflError as error:
            if key not in self._refused:
                log.error("version_refused", model=key.name, version=key.version, reason=str(error))
            self._refused.add(key)
            return
        self._refused.discard(key)
        self._champions[key.name] = key
        self._on_change(key)
        log.info("version_served", model=key.name, version=key.version)

    def _check(self, name: str) -> None:
        if name not in self._offers:
            raise NotServed(f"there is no model {name[:64]!r}; GET /v2/models lists what is served")
