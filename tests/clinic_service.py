"""The serving application with the clinicians' routes and a model that marks bright voxels; also as a process."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from local_service import LocalService
from manual_clock import ManualClock
from onnx import TensorProto, helper, numpy_helper

from medfl_ray.config.model import ModelConfig
from medfl_ray.data.prepare.preprocess import Preprocessing
from medfl_ray.data.uploads.limits import UploadLimits
from medfl_ray.export.description import DESCRIPTION, PackageDescription, Variant
from serve.auth import Role, TokenBook, add_token
from serve.backend import Backend, LocalReplicas
from serve.clinic.jobs import JobLimits
from serve.clinic.pacs_target import PacsTarget
from serve.clinic.service import SegmentationService
from serve.http_app import build_http_app
from serve.protocols.monai_label import monai_label_router
from serve.protocols.segment_routes import segment_router
from serve.replicas.model_loader import Catalogue
from serve.replicas.replica import ModelReplica
from serve.replicas.sources import FolderSource
from serve.serving_metrics import ServingMetrics
from serve.settings import ServeSettings

LABELS = {1: "liver", 2: "tumour"}
BRIGHT, BRIGHTEST = 100.0, 1000.0


def write_threshold_model(folder: Path, name: str = "bright") -> None:
    """Write a package whose network says class 1 above BRIGHT and class 2 above BRIGHTEST."""
    folder.mkdir(parents=True)
    weights = np.array([0, 1, 2], np.float32).reshape(1, 3, 1, 1, 1)
    biases = np.array([0, -BRIGHT, -BRIGHT - BRIGHTEST], np.float32).reshape(1, 3, 1, 1, 1)
    space = ["D", "H", "W"]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["image", "w"], ["scaled"]), helper.make_node("Add", ["scaled", "b"], ["logits"])],
        "bright",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, *space])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, *space])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(biases, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    (folder / "model.onnx").write_bytes(content)
    description = PackageDescription(
        name=name,
        task="segmentation",
        network=ModelConfig.model_validate({"type": "unet3d", "features": [4, 8]}),
        spatial_dims=3,
        channels=("image",),
        labels=LABELS,
        out_channels=3,
        patch_size=(8, 8, 8),
        size_divisor=2,
        dynamic_batch=True,
        dynamic_space=True,
        dynamic_space_note="",
        preprocessing=Preprocessing(channels=("image",), intensity="none"),
        privacy={"differential_privacy": False},
        weights_checksum="bright",
        opset=18,
        input="image",
        output="logits",
        variants={
            "float32": Variant(file="model.onnx", sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        },
        parity={},
    )
    (folder / DESCRIPTION).write_text(description.model_dump_json(), encoding="utf-8")


def clinic_service(
    folder: Path,
    limits: UploadLimits | None = None,
    pacs: Iterable[PacsTarget] = (),
    jobs: JobLimits | None = None,
    serving: dict[str, Any] | None = None,
    roles: tuple[Role, ...] = ("infer", "observe"),
) -> LocalService:
    """Build the application over one replica in this process."""
    models = folder / "models"
    if not models.exists():
        write_threshold_model(models / "bright" / "3")
        (models / "bright" / "champion").write_text("3", encoding="utf-8")
    chosen = ServeSettings.model_validate({"poll_s": 0.05, **(serving or {})})
    metrics = ServingMetrics(chosen.drift_threshold, chosen.drift_smoothing, ray_too=False)
    replicas = LocalReplicas(ModelReplica(lambda: FolderSource(models), chosen))
    catalogue = Catalogue(FolderSource(models), replicas.describe, chosen.only, metrics.served)
    backend = Backend(replicas, catalogue, metrics, chosen.limits.inference_timeout_s)
    clinic = SegmentationService(backend, limits, pacs, folder / "state", jobs)
    tokens = folder / "tokens.json"
    token, clock = add_token(tokens, "test", roles), ManualClock()
    routers = (segment_router(clinic), monai_label_router(clinic))
    app = build_http_app(backend, chosen, TokenBook(tokens, clock), metrics, routers, scratch=clinic.scratch)
    return LocalService(app, backend, metrics, token, tokens, clock)


def _main(folder: Path) -> None:
    """Serve until standard input ends; print the port and the token."""
    import socket

    import uvicorn

    service = clinic_service(folder, serving={"limits": {"requests_per_minute": 1e6, "burst": 100_000}})
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app, log_config=None, ws="none", timeout_graceful_shutdown=1))

    def end_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    print(listening.getsockname()[1], service.token, flush=True)
    server.run([listening])


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
