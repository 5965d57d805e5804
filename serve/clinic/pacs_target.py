"""A PACS that results may be sent to; apart from the sending, whose libraries a model replica does not need."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from medfl_ray.config.base import PositiveFloat, Section


class PacsTarget(Section):
    """One PACS; its secrets stand in the environment, not in the configuration."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$", description="Name by which requests choose it.")
    url: str = Field(description="Root of its DICOMweb service.")
    username_env: str | None = Field(default=None, description="Variable with the user's name.")
    password_env: str | None = Field(default=None, description="Variable with the password.")
    token_env: str | None = Field(default=None, description="Variable with a bearer token.")
    ca_file: Path | None = Field(default=None, description="Certificates to trust instead of the system's.")
    timeout_s: PositiveFloat = Field(default=60.0, description="Longest wait for the PACS.")

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")) or "@" in url:
            raise ValueError("expected http:// or https:// without a name or password in it")
        return url.rstrip("/")
