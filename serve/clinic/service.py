"""What the clinicians' routes share: the models, the reader of uploads, the jobs, and the PACS that are configured."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import structlog
from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from medfl_ray.data.results.mask_files import (
    DICOM_FORMATS,
    ENDINGS,
    MASK_FORMATS,
    MEDIA_TYPES,
    MaskFormat,
    MaskOrigin,
    check_writable,
    write_mask,
)
from medfl_ray.data.uploads.limits import CHUNK_BYTES, UploadLimits
from medfl_ray.data.uploads.process import MASK, UploadReader
from medfl_ray.data.uploads.read import Upload
from medfl_ray.data.volume import Volume
from medfl_ray.export.description import PackageDescription
from medfl_ray.export.predictor import Segmentation
from medfl_ray.store.state_folders import state_root
from serve.clinic.jobs import JobBook, JobLimits, JobResult
from serve.clinic.pacs import store_in_pacs
from serve.clinic.pacs_target import PacsTarget
from serve.clinic.pools import ANSWERS, DISK, PACS, until_done
from serve.clinic.scratch import Scratch
from serve.clinic.sessions import SessionBook
from serve.refusals import Forbidden, Refusal, TooLarge, Unavailable

Output = Literal["nifti", "nrrd", "dicom-seg", "rtstruct", "json", "png"]
Progress = Callable[[float], None]
UPLOAD = "upload"
FILE_FIELDS = ("file", "image", "files")
MAX_FIELD_BYTES = 64 * 1024
SWEEP_S = 60.0
log = structlog.get_logger("medfl_ray.serve")


class Summary(Protocol):
    """What the routes must know of a model."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def description(self) -> PackageDescription: ...


class SegmentBackend(Protocol):
    """Runs models; a version is the registry's, None the one that is served."""

    async def models(self) -> Sequence[Summary]: ...

    async def summary(self, model: str, version: str | None = None) -> Summary: ...

    async def segment(
        self, model: str, version: str | None, volume: Volume, progress: Progress | None = None
    ) -> Segmentation: ...


@dataclass(frozen=True)
class SegmentRequest:
    """What a request asks for."""

    model: str
    version: str | None
    output: Output = "nifti"
    bundle: bool = False
    series: tuple[str, ...] = ()
    store: PacsTarget | None = None


class SegmentationService:
    """The work behind the routes: a file in, a mask out."""

    def __init__(
        self,
        backend: SegmentBackend,
        limits: UploadLimits | None = None,
        pacs: Iterable[PacsTarget] = (),
        root: Path | None = None,
        job_limits: JobLimits | None = None,
    ) -> None:
        """Open the book of jobs; the process that reads uploads starts with the application.

        Args:
          root: where jobs and sessions lie, one for all replicas of a machine; in the state folder by default.
        """
        self.backend = backend
        self.limits = limits or UploadLimits()
        self.pacs: Mapping[str, PacsTarget] = {target.name: target for target in pacs}
        self.reader = UploadReader(self.limits)
        self.root = root or state_root() / "serve"
        self.jobs = JobBook(self.root / "jobs", job_limits)
        self.sessions = SessionBook(self.root / "sessions")
        self.scratch = Scratch(self.root / "scratch")

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Start the reader's process before the first upload and end it with the application; sweep all along."""
        starting = asyncio.create_task(asyncio.to_thread(self.reader.start))
        sweeping = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            await until_done(sweeping)
            await asyncio.gather(starting, return_exceptions=True)
            await self.jobs.close()
            await asyncio.to_thread(self.reader.close)
            await DISK.run(self.scratch.close)

    async def _sweep(self) -> None:
        """Remove what expired and what ended processes left, at once and then every minute."""
        while True:
            for sweep in (self.scratch.sweep, self.sessions.sweep, self.jobs.sweep):
                try:
                    await DISK.run(sweep)
                except OSError as error:  # the next turn may go well
                    log.error("not_swept", error=type(error).__name__)
            await asyncio.sleep(SWEEP_S)

    async def check(self, wish: SegmentRequest) -> SegmentRequest:
        """Refuse what cannot work before a body is read; return the wish with the version that it is to keep to.

        Raises:
          Refusal: the model is not served or does not segment, or what is stored would not be DICOM.
        """
        summary = await self.backend.summary(wish.model, wish.version)
        if summary.description.task != "segmentation":
            raise Refusal(f"the model is for {summary.description.task}; use its /infer route")
        if wish.store is not None and wish.output not in DICOM_FORMATS:
            raise Refusal(f"a PACS takes DICOM objects; with store= ask for output={' or '.join(DICOM_FORMATS)}")
        return replace(wish, version=summary.version)

    async def segment(
        self, file: Path, folder: Path, wish: SegmentRequest, progress: Progress | None = None
    ) -> JobResult:
        """Read a file, run the model, write the result and store it where that is asked for."""
        upload = await self.reader.read(file, folder, wish.series)
        if wish.output in MASK_FORMATS:
            check_writable(upload, wish.output)
        result = await self.backend.segment(wish.model, wish.version, upload.volume, progress)
        written = await self._dicom_object(upload, result, wish, folder) if wish.output in DICOM_FORMATS else None
        answer, raw = await ANSWERS.run(_write_answer, upload, result, wish, written)
        if wish.store is not None:
            await PACS.run(store_in_pacs, wish.store, raw)
            answer.headers["X-Stored-In"] = wish.store.name
        return answer

    async def _dicom_object(self, upload: Upload, result: Segmentation, wish: SegmentRequest, folder: Path) -> bytes:
        """Have the process that reads uploads write the mask: no stranger's header is parsed in this one."""
        await DISK.run(np.save, folder / MASK, result.mask)
        file = await self.reader.write(upload, result.labels, cast(MaskFormat, wish.output), _origin_of(result), folder)
        return await DISK.run(file.read_bytes)


def _origin_of(result: Segmentation) -> MaskOrigin:
    return MaskOrigin(result.model, result.version or "1")


def _write_answer(
    upload: Upload, result: Segmentation, wish: SegmentRequest, written: bytes | None = None
) -> tuple[JobResult, bytes]:
    """Return the answer, and the file of the mask alone where there is one; it may be written already."""
    headers = {
        "X-Model-Name": result.model, "X-Model-Version": result.version,
        "X-Volumes-Ml": json.dumps({name: round(value, 4) for name, value in result.volumes_ml.items()}),
    }  # fmt: skip
    name, media_type, raw = _write_output(upload, result, wish.output, written)
    if not wish.bundle:
        return JobResult(raw, media_type, name, headers), raw
    files = {name: raw, "volumes.json": _words(upload, result), "overlay.png": _overlay(upload, result)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in files.items():
            archive.writestr(entry, content)
    return JobResult(buffer.getvalue(), "application/zip", "segmentation.zip", headers), raw


def _write_output(
    upload: Upload, result: Segmentation, output: Output, written: bytes | None
) -> tuple[str, str, bytes]:
    if output == "json":
        return "volumes.json", "application/json", _words(upload, result)
    if output == "png":
        return "overlay.png", "image/png", _overlay(upload, result)
    raw = written or write_mask(result.mask, upload, result.labels, output, _origin_of(result))
    stem = {"dicom-seg": "segmentation", "rtstruct": "structures"}.get(output, "mask")
    return f"{stem}{ENDINGS[output]}", MEDIA_TYPES[output], raw


def _words(upload: Upload, result: Segmentation) -> bytes:
    words = {
        "model_name": result.model, "model_version": result.version, "volumes_ml": result.volumes_ml,
        "labels": {str(value): name for value, name in result.labels.items()},
        "shape": list(result.mask.shape), "spacing_mm": list(upload.volume.spacing_mm),
        "notes": list(upload.volume.notes),
    }  # fmt: skip
    return json.dumps(words, indent=1).encode()


def _overlay(upload: Upload, result: Segmentation) -> bytes:
    from medfl_ray.analytics.overlay import overlay_png

    return overlay_png(upload.volume, result.mask, result.labels)


async def receive_file(request: Request, folder: Path, limits: UploadLimits) -> Path:
    """Write a request's file into a folder, in parts; the body is the file itself, or a form with one file.

    Raises:
      Refusal: there is no file, or the body is compressed, over its limits, or a damaged form.
    """
    if _is_form(request):
        file, _ = await receive_form(request, folder, limits)
        if file is None:
            raise Refusal(f"the form has no file; send one as {' or '.join(FILE_FIELDS)}")
        return file
    _check_encoding(request)
    await _write_parts(request.stream(), folder / UPLOAD, limits)
    return folder / UPLOAD


async def receive_form(request: Request, folder: Path, limits: UploadLimits) -> tuple[Path | None, dict[str, str]]:
    """Write a form's file, if it has one, into a folder; return it and the other fields.

    Raises:
      Refusal: the form is damaged, over its limits, or has more than one file.
    """
    _check_encoding(request)
    try:
        async with request.form(max_files=1, max_fields=32, max_part_size=MAX_FIELD_BYTES) as form:
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            for name in FILE_FIELDS:
                if isinstance(file := form.get(name), UploadFile):
                    await _write_parts(_parts_of(file), folder / UPLOAD, limits)
                    return folder / UPLOAD, fields
            return None, fields
    except (MultiPartException, HTTPException, FormParserError) as error:
        if isinstance(error.__cause__, Refusal):
            raise error.__cause__ from None
        raise Refusal("the form is damaged or has more than one file; send one, zipped if it is a series") from None


def _is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").startswith("multipart/form-data")


def _check_encoding(request: Request) -> None:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal("the body is compressed as a whole; send it as it is, a .nii.gz too")


async def _parts_of(file: UploadFile) -> AsyncIterator[bytes]:
    while part := await file.read(CHUNK_BYTES):
        yield part


async def _write_parts(parts: AsyncIterator[bytes], target: Path, limits: UploadLimits) -> None:
    size = 0
    waiting = bytearray()
    try:
        with target.open("wb") as sink:
            async for part in parts:
                size += len(part)
                if size > limits.max_upload_bytes:
                    raise TooLarge(f"the upload is larger than {limits.max_upload_bytes} bytes, which is the most")
                waiting += part
                if len(waiting) >= CHUNK_BYTES:
                    await DISK.run(sink.write, bytes(waiting))
                    waiting.clear()
            await DISK.run(sink.write, bytes(waiting))
    except OSError as error:
        raise Unavailable(f"there is no room for the upload ({type(error).__name__}); send it again later") from None
    if not size:
        raise Refusal("the request has no body; send a NIfTI, NRRD or DICOM file, or a zip of a DICOM series")


def owner_of(request: Request) -> str:
    """Return whose jobs and sessions a request may use: its token's SHA-256, which no later token of its name has."""
    return str(request.scope["state"]["owner"])


def check_may_store(request: Request) -> None:
    """Refuse a request to write to a PACS whose token was not made for it.

    Raises:
      Forbidden: the token has no role `store`.
    """
    if "store" not in request.scope["state"]["roles"]:
        raise Forbidden("the token has no role 'store'; ask without store=, or with a token made by tokens add --store")
