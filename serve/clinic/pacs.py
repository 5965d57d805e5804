"""Results go to a PACS by STOW-RS; only to addresses that the service was started with, never to one of a request."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import pydicom
import requests
from dicomweb_client.api import DICOMwebClient

from medfl_ray.errors import ConfigError
from serve.clinic.pacs_target import PacsTarget
from serve.refusals import NotServed, Refusal


class PacsFailed(Refusal):
    """A PACS that did not take a result."""

    status = 502


class _Session(requests.Session):
    """Follows no redirect, so that a PACS cannot send the service elsewhere, and has a timeout always."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self._timeout_s = timeout_s
        self.trust_env = False
        self.max_redirects = 0

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = self._timeout_s
        return super().send(request, **kwargs)


def choose_pacs(name: str | None, targets: Mapping[str, PacsTarget]) -> PacsTarget | None:
    """Return the configured PACS of a name; None where a request asks for none.

    Raises:
      NotServed: no PACS of that name is configured.
    """
    if name is None:
        return None
    if name not in targets:
        raise NotServed(f"no PACS of that name is configured; known: {', '.join(sorted(targets)) or 'none'}")
    return targets[name]


def store_in_pacs(target: PacsTarget, raw: bytes) -> None:
    """Send one DICOM object by STOW-RS; returns when the PACS has it.

    Raises:
      PacsFailed: the PACS could not be reached, or refused the object.
    """
    dataset = pydicom.dcmread(io.BytesIO(raw))
    try:
        answer = _client(target).store_instances([dataset])
    except requests.RequestException as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"status {status}" if status else type(error).__name__
        raise PacsFailed(
            f"the PACS {target.name!r} did not take the result ({reason}); ask for the result without store="
        ) from None
    if answer.get("FailedSOPSequence"):
        code = answer.FailedSOPSequence[0].get("FailureReason", "no reason")
        raise PacsFailed(f"the PACS {target.name!r} refused the result (reason {code})")


def _client(target: PacsTarget) -> DICOMwebClient:
    session = _Session(target.timeout_s)
    session.verify = True if target.ca_file is None else str(target.ca_file)
    if target.token_env is not None:
        session.headers["Authorization"] = f"Bearer {_secret(target, target.token_env)}"
    elif target.username_env is not None and target.password_env is not None:
        session.auth = (_secret(target, target.username_env), _secret(target, target.password_env))
    client = DICOMwebClient(target.url, session=session)
    client.set_http_retry_params(retry=False)  # the caller is waiting, and may retry
    return client


def _secret(target: PacsTarget, variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise ConfigError(f"the PACS {target.name!r} needs the environment variable {variable}, which is not set")
    return value
