"""A volume of 128^3 voxels through our service, through bare onnxruntime and through MONAI in PyTorch, in one run.

Ours is timed from the request's first byte to the answer's last: upload, reading, preparation, windows, blending, the
way back to the file's grid and the mask's file. The other two get the prepared image and stop at the labels. All have
the same number of threads and take turns; a ratio is taken within a turn, and the figure is the median over turns.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import psutil
from harness import Goal, Options, benchmark, describe_machine, report, table
from inference_model import Case, make_cases, trained_package
from runs import ROOT

from medfl_ray.export.description import read_description
from medfl_ray.training.scoring.evaluation import dice_per_label

GOALS = (
    Goal("http_over_ort", at_most=1.1),
    Goal("vs_monai_throughput", at_least=1.2),
    Goal("reduced_vs_monai_throughput", at_least=1.5),
    Goal("reduced_dice_loss", at_most=0.002),
    Goal("mask_dice_min", at_least=0.999),
    Goal("peak_memory_ratio", at_most=1.5),
)
SCRIPT = Path(__file__).with_name("inference_contender.py")
REDUCED = ("int8", "float16")
CLIENTS = 2
MIB = 1024**2


class Contender:
    """A process that answers one line of JSON with another."""

    def __init__(self, kind: str, package: Path, detail: str, threads: int) -> None:
        """Start it and wait for its first answer, which is kept."""
        command = [sys.executable, str(SCRIPT), kind, str(package), detail, str(threads)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.first = self._read()

    def run(self, case: Case, mask: Path | None = None) -> float:
        """Return the seconds for one prepared image."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"image": str(case.prepared), "mask": mask and str(mask)}) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def peak_mib(self) -> float:
        """Return the most memory that the process has had."""
        return _peak_mib(self._process.pid)

    def replica_peak_mib(self) -> float:
        """Return the most memory of the Serve replica that runs the model, among the process's descendants."""
        workers = psutil.Process(self._process.pid).children(recursive=True)
        return max(_peak_mib(p.pid) for p in workers if "ServeReplica:medfl:models" in " ".join(p.cmdline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"a contender ended with exit code {self._process.wait()}")


class Service:
    """Our service in its own processes, and a client of it."""

    def __init__(self, package: Path, variant: str, threads: int) -> None:
        """Start Ray and Serve and wait until the model is loaded."""
        self.contender = Contender("serve", package, variant, threads)
        url, token = self.contender.first["url"], self.contender.first["token"]
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=600)
        self._model = self._client.get("/v2/models").json()["models"][0]["name"]

    def segment(self, case: Case) -> tuple[float, Any]:
        """Return the seconds of one request and the mask that it brought."""
        content = case.upload.read_bytes()
        started = time.perf_counter()
        answer = self._client.post(f"/v2/models/{self._model}/segment", content=content)
        seconds = time.perf_counter() - started
        answer.raise_for_status()
        image: Any = nib.Nifti1Image.from_stream(_gunzipped(answer.content))
        return seconds, np.asarray(image.dataobj)

    def stream(self, cases: Sequence[Case]) -> float:
        """Return volumes per second of two clients that send one volume after the other."""
        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(self.segment, cases))
        return len(cases) / (time.perf_counter() - started)

    def close(self) -> None:
        """End client and service."""
        self._client.close()
        self.contender.close()


@dataclass
class Measured:
    """Seconds and rates of the turns with one variant of the model."""

    ours_s: list[float] = field(default_factory=list)
    bare_s: list[float] = field(default_factory=list)
    monai_s: list[float] = field(default_factory=list)
    ours_rate: list[float] = field(default_factory=list)
    monai_rate: list[float] = field(default_factory=list)
    peaks_mib: dict[str, float] = field(default_factory=dict)
    masks: list[Any] = field(default_factory=list)


@contextmanager
def contenders(package: Path, variant: str, threads: int) -> Iterator[tuple[Service, Contender, Contender]]:
    """Yield our service, bare onnxruntime and MONAI, started and warm."""
    file = read_description(package).variants[variant].file  # type: ignore[index]
    started: list[Service | Contender] = []
    try:
        service = Service(package, variant, threads)
        started.append(service)
        plain = Contender("bare", package, file, threads)
        started.append(plain)
        monai = Contender("monai", package, "1", threads)
        started.append(monai)
        yield service, plain, monai
    finally:
        for one in reversed(started):
            one.close()


def measure_variant(package: Path, variant: str, cases: Sequence[Case], turns: int, options: Options) -> Measured:
    """Let the three take turns on each case, singly and as a stream; the first round warms up and is thrown away."""
    found = Measured()
    with contenders(package, variant, options.own.threads) as (service, plain, monai):
        for index, case in enumerate(cases):
            found.masks.append(service.segment(case)[1])
            for name, one in (("bare", plain), ("monai", monai)):
                one.run(case, options.out / f"{variant}-{name}-{index}.npy")
        for turn in range(turns):
            case = cases[turn % len(cases)]
            steps = [
                lambda case=case: found.ours_s.append(service.segment(case)[0]),
                lambda case=case: found.bare_s.append(plain.run(case)),
                lambda case=case: found.monai_s.append(monai.run(case)),
            ]
            for place in range(len(steps)):
                steps[(turn + place) % len(steps)]()
            found.ours_rate.append(service.stream(cases))
            found.monai_rate.append(len(cases) / sum(monai.run(case) for case in cases))
        found.peaks_mib = {
            "ours": service.contender.replica_peak_mib(), "bare": plain.peak_mib(), "monai": monai.peak_mib()
        }  # fmt: skip
    return found


def figures_of(full: Measured, reduced: Measured | None, cases: Sequence[Case], options: Options) -> dict[str, float]:
    """Return the issue's figures, and those that they come from."""
    labels = {int(value): name for value, name in cases[0].labels.items()}
    expected = [_on_grid(options.out / f"float32-monai-{i}.npy", case) for i, case in enumerate(cases)]
    same = [min(dice_per_label(m, e, labels).values()) for m, e in zip(full.masks, expected, strict=True)]
    figures = {
        "http_over_ort": _ratio(full.ours_s, full.bare_s),
        "vs_monai_throughput": _ratio(full.ours_rate, full.monai_rate),
        "mask_dice_min": min(same),
        "p50_ms": 1000 * median(full.ours_s),
        "p95_ms": 1000 * float(np.percentile(full.ours_s, 95)),
        "ort_p50_ms": 1000 * median(full.bare_s),
        "monai_p50_ms": 1000 * median(full.monai_s),
        "volumes_per_s": median(full.ours_rate),
        "monai_volumes_per_s": median(full.monai_rate),
        "peak_memory_ratio": full.peaks_mib["ours"] / full.peaks_mib["bare"],
        **{f"{name}_peak_mib": value for name, value in full.peaks_mib.items()},
        "dice": _against_truth(full.masks, cases, labels),
    }
    if reduced is not None:
        figures["reduced_vs_monai_throughput"] = _ratio(reduced.ours_rate, reduced.monai_rate)
        figures["reduced_dice_loss"] = figures["dice"] - _against_truth(reduced.masks, cases, labels)
        figures["reduced_http_over_ort"] = _ratio(reduced.ours_s, reduced.bare_s)
        figures["reduced_p50_ms"] = 1000 * median(reduced.ours_s)
    return figures


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def _against_truth(masks: Sequence[Any], cases: Sequence[Case], labels: dict[int, str]) -> float:
    scores = [dice_per_label(m, np.load(c.truth), labels) for m, c in zip(masks, cases, strict=True)]
    return float(np.mean([list(score.values()) for score in scores]))


def _on_grid(classes: Path, case: Case) -> Any:
    """Return labels of a prepared image on the grid of the file that was sent."""
    return case.restore(np.load(classes))


def _peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / MIB
    return math.nan


def _gunzipped(content: bytes) -> io.BytesIO:
    import gzip

    return io.BytesIO(gzip.decompress(content))


def measure(options: Options) -> dict[str, float]:
    """Train or take a model, then measure its float32 and its reduced variant."""
    package = trained_package(options)
    cases = make_cases(package, options.out, count=options.own.volumes, edge=64 if options.quick else 128)
    turns = options.own.turns or (2 if options.quick else 8)
    full = measure_variant(package, "float32", cases, turns, options)
    chosen = options.own.reduced or next((v for v in REDUCED if v in read_description(package).variants), None)
    reduced = measure_variant(package, chosen, cases, turns, options) if chosen else None
    figures = figures_of(full, reduced, cases, options)
    if options.json is not None and options.json.name != "-":
        page = f"{describe_machine()}; {options.own.threads} threads; reduced variant: {chosen}\n\n```\n"
        options.json.with_suffix(".md").write_text(page + table(figures, GOALS) + "\n```\n", encoding="utf-8")
    return figures


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--run", type=Path, metavar="DIR", help="a finished run or a package instead of a short run")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default 2)")
    parser.add_argument("--volumes", type=int, default=4, help="different volumes, and those of a stream (default 4)")
    parser.add_argument("--turns", type=int, help="how often all take their turn (default 8)")
    parser.add_argument("--reduced", choices=REDUCED, help="the reduced variant (default: the first there is)")


if __name__ == "__main__":
    with benchmark(__doc__, add_options=add_options) as options:
        report(options, measure(options), GOALS)
