"""One contender of inference.py in a process of its own: `inference_contender.py bare|monai|serve PACKAGE ...`.

Reads one line per piece of work from its standard input and answers with one line of JSON. `bare` is what somebody
with onnxruntime and NumPy would write; `monai` is MONAI's sliding-window inference in PyTorch, default memory format,
float32. Both get images that are prepared already. `serve` is our service: it says where it listens and waits.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Classes = npt.NDArray[np.uint8]


def bare(package: Path, file: str, threads: int) -> Callable[[Array], Classes]:
    """Return plain onnxruntime over the same windows, summed up in one array as large as the image."""
    import onnxruntime

    from medfl_ray.export.description import read_description
    from medfl_ray.export.sliding_window import plan_windows, window_weights

    description = read_description(package)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(package / file, options, providers=["CPUExecutionProvider"])
    weights = window_weights(description.patch_size, description.sliding_window)

    def run(image: Array) -> Classes:
        plan = plan_windows(image.shape[1:], description.patch_size, description.sliding_window.overlap)
        sums = np.zeros((description.out_channels, *plan.padded_shape), dtype=np.float32)
        for number, start in enumerate(plan.starts):
            (logits,) = session.run(None, {description.input: plan.cut(image, [number])})
            place = tuple(slice(at, at + edge) for at, edge in zip(start, plan.window, strict=True))
            sums[(slice(None), *place)] += logits[0] * weights
        inside = tuple(slice(b, b + n) for b, n in zip(plan.before, plan.image_shape, strict=True))
        return np.asarray(sums[(slice(None), *inside)].argmax(axis=0), dtype=np.uint8)

    return run


def monai(package: Path, windows_at_once: int, threads: int) -> Callable[[Array], Classes]:
    """Return MONAI's inferer over the trained network."""
    import torch
    from monai.inferers.utils import sliding_window_inference

    from medfl_ray.export.description import read_description
    from medfl_ray.export.weights import load_weights
    from medfl_ray.models.catalogue import build_network
    from medfl_ray.params import layout_of, load_into

    torch.set_num_threads(threads)
    description = read_description(package)
    patch, how = description.patch_size, description.sliding_window
    network = build_network(
        description.network, description.spatial_dims, description.num_channels, description.out_channels, False, patch
    ).eval()
    load_into(network, load_weights(package / "model.safetensors", layout_of(network)))

    def run(image: Array) -> Classes:
        with torch.inference_mode():
            logits = sliding_window_inference(
                torch.from_numpy(image)[None], patch, windows_at_once, network, overlap=how.overlap, mode=how.mode,
                sigma_scale=how.sigma_scale, padding_mode=how.padding,
            )  # fmt: skip
            assert isinstance(logits, torch.Tensor)
            return np.asarray(logits[0].argmax(0).to(torch.uint8).numpy())

    return run


def serve(package: Path, variant: str, threads: int) -> None:
    """Serve the package on a free port until the standard input ends."""
    import socket
    import tempfile

    from serve.auth import add_token
    from serve.launcher import served
    from serve.settings import ServeSettings

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        token = add_token(tokens, "benchmark")
        settings = ServeSettings.model_validate(
            {"models": package, "variant": variant, "tokens": tokens, "scaling": {"num_cpus": threads}}
        )
        with served(settings, port=port) as url:
            answer({"url": url, "token": token})
            sys.stdin.read()


def work(run: Callable[[Array], Classes]) -> None:
    """Answer each line {"image": FILE, "mask": FILE or null} with the seconds that its mask took."""
    answer({"ready": True})
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        image = np.load(task["image"])
        started = time.perf_counter()
        classes = run(image)
        seconds = time.perf_counter() - started
        if task["mask"]:
            np.save(task["mask"], classes)
        answer({"seconds": seconds})


def answer(values: dict[str, Any]) -> None:
    """Write one line to whoever started this process."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    kind, folder, detail, cores = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    if kind == "serve":
        serve(folder, detail, cores)
    else:
        work(bare(folder, detail, cores) if kind == "bare" else monai(folder, int(detail), cores))
