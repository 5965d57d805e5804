"""The part of MONAI Label's protocol that 3D Slicer's plug-in needs to segment an image with a served model.

There is no data store, no training and no active learning behind it; their routes say so. The plug-in signs in with a
user name, which is ignored, and the service's token as the password.

Source: the server and the Slicer plug-in of MONAI Label 0.8 (routes, fields and the form of answers).
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from urllib3 import encode_multipart_formdata

import medfl_ray
from medfl_ray.export.predictor import label_values
from serve.clinic.jobs import JobResult
from serve.clinic.service import (
    Output,
    SegmentationService,
    SegmentRequest,
    Summary,
    owner_of,
    receive_file,
    receive_form,
)
from serve.clinic.sessions import KEEP_S, SessionBook
from serve.refusals import NotServed, Refusal

EXTENSIONS: dict[str, Output] = {".nii.gz": "nifti", ".nii": "nifti", ".nrrd": "nrrd", ".seg.nrrd": "nrrd"}
NO_DATASTORE = "this service keeps no images or labels; open the image in Slicer and segment it in a session"


class NotOffered(Refusal):
    """A part of MONAI Label's protocol that this service does not have."""

    status = 501


def monai_label_router(clinic: SegmentationService) -> APIRouter:
    """Return MONAI Label's routes."""
    router = APIRouter(tags=["MONAI Label"])
    sessions = clinic.sessions
    _add_information(router, clinic)
    _add_inference(router, clinic, sessions)
    _add_sessions(router, clinic, sessions)
    _add_absent(router)
    return router


def _add_information(router: APIRouter, clinic: SegmentationService) -> None:
    @router.get("/info/")
    async def info() -> dict[str, Any]:
        """Say which models there are and what they label."""
        models = {m.name: _model(m) for m in await clinic.backend.models() if _segments(m)}
        labels = list(dict.fromkeys(name for model in models.values() for name in model["labels"]))
        return {
            "name": "medfl-ray", "description": "Models of federated runs", "version": medfl_ray.__version__,
            "labels": labels, "models": models, "trainers": {}, "strategies": {}, "scoring": {}, "train_stats": {},
            "datastore": {"total": 0, "completed": 0}, "config": {},
        }  # fmt: skip

    @router.get("/auth/")
    def auth() -> dict[str, Any]:
        """Say that a token is needed."""
        return {"enabled": True}

    @router.get("/auth/token/valid")
    def valid(request: Request) -> dict[str, Any]:
        """Say whose token came; without a valid one no request comes this far."""
        return {"username": str(request.scope["state"]["token"])}


def _segments(summary: Summary) -> bool:
    return summary.description.task == "segmentation"


def _model(summary: Summary) -> dict[str, Any]:
    description = summary.description
    return {
        "type": "segmentation", "dimension": description.spatial_dims,
        "labels": {name: value for value, name in label_values(description).items()},
        "description": f"{summary.name}, version {summary.version}; channels: {', '.join(description.channels)}",
        "config": {},
    }  # fmt: skip


def _add_inference(router: APIRouter, clinic: SegmentationService, sessions: SessionBook) -> None:
    @router.post("/infer/{model}")
    async def infer(
        request: Request,
        model: str,
        session_id: Annotated[str, Query(max_length=64)] = "",
        output: Literal["all", "image", "json"] = "all",
    ) -> Response:
        """Segment the image of a session, or a file that comes with the request."""
        async with clinic.scratch.folder() as folder:
            file, fields = await receive_form(request, folder, clinic.limits)
            if session_id:
                file = sessions.image(session_id, owner_of(request))
            if file is None:
                raise NotServed(NO_DATASTORE)
            wish = await clinic.check(SegmentRequest(model, None, _output(fields)))
            started = time.perf_counter()
            answer = await clinic.segment(file, folder, wish)
        summary = await clinic.backend.summary(model, answer.headers["X-Model-Version"] or None)
        params = {
            "label_names": {name: value for value, name in label_values(summary.description).items()},
            "latencies": {"total": round(time.perf_counter() - started, 3)},
            "volumes_ml": json.loads(answer.headers["X-Volumes-Ml"]),
        }  # fmt: skip
        return _answer(answer, params, output)


def _output(fields: dict[str, str]) -> Output:
    """Return the format of the extension that the plug-in asks for in its params."""
    try:
        params = json.loads(fields.get("params") or "{}")
        extension = params.get("result_extension", ".nii.gz")
    except (ValueError, AttributeError):
        raise Refusal("the field params is not a JSON object") from None
    if extension not in EXTENSIONS:
        raise Refusal(f"result_extension is not known; expected one of {', '.join(EXTENSIONS)}")
    return EXTENSIONS[extension]


def _answer(answer: JobResult, params: dict[str, Any], output: str) -> Response:
    """Return the form of params and image that MONAI Label sends, or one of the two."""
    if output == "json":
        return JSONResponse(params, headers=answer.headers)
    # The plug-in shows a .seg.nrrd by another path, where its own file extension is the same; a plain name suits all.
    name = answer.filename.replace(".seg.nrrd", ".nrrd")
    if output == "image":
        headers = {**answer.headers, "Content-Disposition": f'attachment; filename="{name}"'}
        return Response(answer.body, headers=headers, media_type=answer.media_type)
    body, content_type = encode_multipart_formdata(
        {"params": json.dumps(params), "image": (name, answer.body, answer.media_type)}
    )
    return Response(body, headers=answer.headers, media_type=content_type)


def _add_sessions(router: APIRouter, clinic: SegmentationService, sessions: SessionBook) -> None:
    @router.put("/session/")
    async def create(request: Request) -> dict[str, Any]:
        """Keep an image for a while."""
        name, folder = sessions.open(owner_of(request))
        try:
            await receive_file(request, folder, clinic.limits)
        except BaseException:
            sessions.delete(name)
            raise
        return {"session_id": name, "session_info": {"image": name, "expiry": KEEP_S}}

    @router.get("/session/{session_id}")
    def get(request: Request, session_id: str) -> dict[str, Any]:
        """Say that a session is there."""
        sessions.image(session_id, owner_of(request))
        return {"image": session_id}

    @router.delete("/session/{session_id}")
    def remove(request: Request, session_id: str) -> dict[str, Any]:
        """Forget an image."""
        sessions.image(session_id, owner_of(request))
        sessions.delete(session_id)
        return {"image": session_id}


def _add_absent(router: APIRouter) -> None:
    @router.get("/datastore/")
    def datastore() -> dict[str, Any]:
        """Say that no images are kept here."""
        return {"total": 0, "completed": 0, "label_tags": {}, "train": []}

    @router.api_route("/datastore/{rest:path}", methods=["GET", "PUT", "DELETE", "HEAD"])
    @router.put("/datastore/")
    def no_datastore(rest: str = "") -> None:
        """Refuse what needs a store of images."""
        raise NotOffered(NO_DATASTORE)

    @router.api_route("/train/", methods=["GET", "POST", "DELETE"])
    @router.api_route("/train/{rest:path}", methods=["GET", "POST", "DELETE"])
    @router.post("/activelearning/{rest:path}")
    @router.api_route("/scoring/{rest:path}", methods=["GET", "POST", "DELETE"])
    def no_training(rest: str = "") -> None:
        """Refuse training, which hospitals do."""
        raise NotOffered("this service does not train or choose images; models are trained by medfl-ray run")
