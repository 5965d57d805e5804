"""Routes of the Open Inference Protocol v2."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

import medfl_ray
from medfl_ray.export.description import PackageDescription
from serve.backend import Backend
from serve.clinic.pools import ANSWERS
from serve.clinic.scratch import Scratch
from serve.clinic.spool import spooled
from serve.protocols.open_inference import HEADER_LENGTH, Encoded, InferRequest, metadata, read_request, write_answer
from serve.refusals import Refusal
from serve.replicas.model_loader import ModelKey
from serve.settings import Limits

VERSION_HEADER = "X-Model-Version"
SEND_BYTES = 1024**2


def open_inference_router(backend: Backend, limits: Limits, scratch: Scratch) -> APIRouter:
    """Return the routes below /v2."""
    router = APIRouter(prefix="/v2")

    @router.get("")
    async def server() -> dict[str, Any]:
        """Say who answers."""
        return {"name": "medfl-ray", "version": medfl_ray.__version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Say that the process answers."""
        return {"live": True}

    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        """Say whether a model is loaded."""
        is_ready = backend.catalogue.ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """List the models that have a served version; an extension of the protocol."""
        return {"models": [{"name": key.name, "version": key.version} for key in _champions(backend)]}

    @router.get("/models/{model}")
    @router.get("/models/{model}/versions/{version}")
    async def model_metadata(model: str, version: str | None = None) -> dict[str, Any]:
        """Describe a model's inputs and outputs."""
        summary = await backend.summary(model, version)
        return metadata(model, summary.versions if version is None else (version,), summary.description)

    @router.get("/models/{model}/ready")
    @router.get("/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> dict[str, Any]:
        """Say whether a model can answer."""
        await backend.summary(model, version)
        return {"name": model, "ready": True}

    @router.post("/models/{model}/infer")
    @router.post("/models/{model}/versions/{version}/infer")
    async def infer(request: Request, model: str, version: str | None = None) -> Response:
        """Run preprocessed images [N, C, *S]; return logits, labels or both."""
        key = backend.catalogue.resolve(model, version)
        description = (await backend.summary(model, key.version)).description
        async with spooled(request, scratch) as body:
            asked = await ANSWERS.run(_read, body, request, description, limits)
            answer = await backend.infer(key, asked.tensor)
        encoded = await ANSWERS.run(
            write_answer, asked, key.name, answer.key.version, answer.logits, description, limits.max_json_bytes
        )
        return _response(encoded, answer.key)

    return router


def _champions(backend: Backend) -> list[ModelKey]:
    return sorted(backend.catalogue.champions.values())


def _read(body: Path, request: Request, description: PackageDescription, limits: Limits) -> InferRequest:
    if request.headers.get("content-encoding", "identity") != "identity":
        raise Refusal("the body is compressed; send it as it is")
    return read_request(
        body, request.headers.get(HEADER_LENGTH), description, limits.max_json_bytes, limits.max_tensor_voxels
    )


def _response(encoded: Encoded, key: ModelKey) -> Response:
    headers = {VERSION_HEADER: key.version, "Content-Length": str(encoded.size)}
    if encoded.header_length is None:
        return Response(bytes(encoded.parts[0]), headers=headers, media_type="application/json")
    headers[HEADER_LENGTH] = str(encoded.header_length)
    return StreamingResponse(_parts(encoded), headers=headers, media_type="application/octet-stream")


async def _parts(encoded: Encoded) -> AsyncIterator[bytes]:
    for part in encoded.parts:
        for start in range(0, len(part), SEND_BYTES):
            yield bytes(part[start : start + SEND_BYTES])
