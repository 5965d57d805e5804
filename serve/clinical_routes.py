"""All routes for clinicians over one shared service."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter

from medfl_ray.data.uploads.limits import UploadLimits
from serve.clinic.pacs_target import PacsTarget
from serve.clinic.service import SegmentationService, SegmentBackend
from serve.protocols.monai_label import monai_label_router
from serve.protocols.segment_routes import segment_router


def clinical_routers(
    backend: SegmentBackend, limits: UploadLimits | None = None, pacs: Iterable[PacsTarget] = ()
) -> list[APIRouter]:
    """Return the routes for clinicians, to be included behind the gate."""
    clinic = SegmentationService(backend, limits, pacs)
    return [segment_router(clinic), monai_label_router(clinic)]
