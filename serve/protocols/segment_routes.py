"""A volume in, a mask out: in one request, or as a job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from serve.clinic.jobs import JobResult, Work
from serve.clinic.pacs import choose_pacs
from serve.clinic.service import Output, SegmentationService, SegmentRequest, check_may_store, owner_of, receive_file

SeriesUid = Annotated[str, Query(pattern=r"^[0-9.]{1,64}$")]
PacsName = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,32}$")]
MAX_SERIES = 16


def segment_router(clinic: SegmentationService) -> APIRouter:
    """Return the routes of segmentation and its jobs."""
    router = APIRouter(prefix="/v2", lifespan=clinic.lifespan)

    @router.post("/models/{model}/segment")
    @router.post("/models/{model}/versions/{version}/segment")
    async def segment(
        request: Request,
        model: str,
        version: str | None = None,
        output: Output = "nifti",
        bundle: bool = False,
        series: Annotated[list[SeriesUid] | None, Query(max_length=MAX_SERIES)] = None,
        store: PacsName = None,
        as_job: Annotated[bool, Query(alias="async")] = False,
    ) -> Response:
        """Segment a NIfTI or NRRD file, a DICOM file or a zipped DICOM series."""
        if store is not None:
            check_may_store(request)
        wish = SegmentRequest(model, version, output, bundle, tuple(series or ()), choose_pacs(store, clinic.pacs))
        wish = await clinic.check(wish)
        if as_job:
            return await _start_job(request, clinic, wish)
        async with clinic.scratch.folder() as folder:
            file = await receive_file(request, folder, clinic.limits)
            return _response(await clinic.segment(file, folder, wish))

    @router.get("/jobs/{job}")
    def job_state(request: Request, job: str) -> dict[str, Any]:
        """Say how far a job is."""
        return clinic.jobs.get(job, owner_of(request)).public()

    @router.get("/jobs/{job}/result")
    def job_result(request: Request, job: str) -> Response:
        """Return what the request would have returned."""
        path, state = clinic.jobs.result(job, owner_of(request))
        return FileResponse(path, 200, state.headers, media_type=state.media_type, filename=state.filename)

    @router.get("/jobs/{job}/events")
    def job_events(request: Request, job: str) -> Response:
        """Send the job's progress as server-sent events until it ends."""
        owner = owner_of(request)
        clinic.jobs.get(job, owner)
        return StreamingResponse(
            clinic.jobs.events(job, owner), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @router.delete("/jobs/{job}", status_code=204)
    async def delete_job(request: Request, job: str) -> None:
        """Stop a job and remove its result."""
        await clinic.jobs.delete(job, owner_of(request))

    return router


async def _start_job(request: Request, clinic: SegmentationService, wish: SegmentRequest) -> Response:
    state = clinic.jobs.open(owner_of(request))
    try:
        async with clinic.jobs.beating(state.id):
            file = await receive_file(request, clinic.jobs.scratch(state.id), clinic.limits)
    except BaseException:
        await clinic.jobs.discard(state.id)
        raise
    clinic.jobs.start(state.id, _work(clinic, file, wish))
    return JSONResponse(state.public(), 202, {"Location": f"{request.scope.get('root_path', '')}/v2/jobs/{state.id}"})


def _work(clinic: SegmentationService, file: Path, wish: SegmentRequest) -> Work:
    async def work(folder: Path, progress: Any) -> JobResult:
        return await clinic.segment(file, folder, wish, progress)

    return work


def _response(answer: JobResult) -> Response:
    headers = {**answer.headers, "Content-Disposition": f'attachment; filename="{answer.filename}"'}
    return Response(answer.body, headers=headers, media_type=answer.media_type)
