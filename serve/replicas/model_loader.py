"""Where served models come from, and which version a request gets.

A version is looked up once per request. A newly promoted version is loaded before it takes over, and one that cannot
be loaded does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from medfl_ray.errors import MedflError
from medfl_ray.export.description import PackageDescription
from serve.refusals import NotServed, Unavailable

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
        self._has_looked = False
        self._offers: dict[str, Offer] = {}
        self._champions: dict[str, ModelKey] = {}
        self._refused: set[ModelKey] = set()
        self._descriptions: dict[ModelKey, PackageDescription] = {}

    @property
    def ready(self) -> bool:
        """Whether every champion of the first look was loaded, if it could be, and one can answer."""
        return self._has_looked and bool(self._champions)

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
        self._has_looked = True

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
