"""A service in this process, with tiny models and without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from local_service import LocalService, local_service, running
from tiny_models import promote, write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two versions of one model; the first is promoted."""
    folder = tmp_path_factory.mktemp("served") / "models"
    write_model(folder / "tiny" / "1", mark=1)
    write_model(folder / "tiny" / "2", mark=2)
    promote(folder, 1)
    return folder


@pytest.fixture(scope="module")
def service(models: Path) -> LocalService:
    """The application over one replica in this process."""
    return local_service(models, models.parent, limits={"burst": 10_000, "stall_timeout_s": 0.5})


@pytest.fixture(scope="module")
def client(service: LocalService) -> Iterator[httpx.Client]:
    """A client with a valid token, of a running application."""
    with running(service) as client:
        yield client
