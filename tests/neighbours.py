"""Random private folders that differ by one patient, in every layout and format, for tests of what moves another.

A folder is written from a list of patients; each one's files follow from the patient's own seed and oddity alone, so
that the other patients' files are the same bytes in both folders of a pair.
"""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from dicom_builder import DicomBuilder
from PIL import Image
from pydicom.uid import generate_uid

from medfl_ray.config.files import parse_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import open_hospital_data
from medfl_ray.errors import MedflError

SHAPE = (7, 8, 6)
LAYOUTS = (
    "decathlon", "nnunet", "csv nifti", "json nrrd", "csv png", "classes png", "classes nifti", "dicom seg",
    "dicom rtstruct", "csv dicom",
)  # fmt: skip
ODDITIES = (
    "", "", "missing image", "damaged image", "unknown label", "missing label", "other shape", "label elsewhere",
    "more channels", "holdout", "train", "nonsense split", "both sides", "free text", "no patient id",
    "half a row", "somebody else's image",
)  # fmt: skip
DICOM_ODDITIES = (
    "", "no t1", "two t1", "segment 4711", "other numbers", "damaged file", "no reference", "text", "missing slice",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """One patient: a name, what his images are drawn from, and what is odd about him."""

    name: str
    seed: int
    oddity: str = ""


@dataclass(frozen=True)
class Pair:
    """Two folders that differ by one patient, and the run that opens each."""

    layout: str
    folders: tuple[Path, Path]
    runs: tuple[RunConfig, RunConfig]
    differing: str


def neighbours(folder: Path, seed: int, pool: Callable[[str, Person], Path] | None = None) -> Pair:
    """Write a pair of neighbouring folders; the layout follows from the seed."""
    rng = np.random.default_rng([seed, 31])
    layout = LAYOUTS[seed % len(LAYOUTS)]
    odd = DICOM_ODDITIES if "dicom" in layout else ODDITIES
    people = [Person(f"P{i:02d}", i, str(rng.choice(odd[:-1])) if rng.random() < 0.2 else "") for i in range(10, 22)]
    people = [people[int(i)] for i in sorted(rng.permutation(len(people))[: int(rng.integers(10, 13))])]
    other = Person(str(rng.choice(["A00", "P15x", "Z99"])), int(rng.integers(40, 48)), str(rng.choice(odd)))
    change = ("add", "remove", "change")[seed // len(LAYOUTS) % 3]
    if change == "add":
        place = int(rng.integers(len(people) + 1))
        second, differing = [*people[:place], other, *people[place:]], other.name
    else:
        place = int(rng.integers(len(people)))
        differing = people[place].name
        changed = [] if change == "remove" else [replace(other, name=differing)]
        second = [*people[:place], *changed, *people[place + 1 :]]
    pool = pool or dicom_patient
    folders = folder / "one", folder / "two"
    for place_of, who in zip(folders, (people, second), strict=True):
        write(place_of, layout, who, pool)
    named = bool(rng.integers(2))
    return Pair(layout, folders, (run_of(folders[0], layout, named), run_of(folders[1], layout, named)), differing)


def run_of(folder: Path, layout: str, named: bool = True, **sections: Any) -> RunConfig:
    """Return the run that trains on a folder; without `named`, names come from the layout's header where it has one."""
    flat, classes = "png" in layout, layout.startswith("classes")
    data: dict[str, Any] = {
        "task": "classification" if classes else "segmentation",
        "spatial_dims": 2 if flat else 3,
        "holdout_fraction": 0.3,
        "hospitals": [{"id": "a", "directory": str(folder), "num_patients": 10, "max_epsilon": 50}],
        "labels": {1: "lesion"},
        "channels": ["t1"],
    }
    if layout in ("decathlon", "nnunet") and not named:
        del data["labels"], data["channels"]
    if layout in ("nnunet", "csv nifti"):
        data["channels"] = ["flair", "t1"]
        if not named:
            del data["channels"]
    raw = {
        "name": "neighbours",
        "data": data,
        "model": {"type": "unet2d" if flat else "unet3d", "features": [2, 4]},
        "training": {"patch_size_voxels": 8, "patient_group_size": 2, "batch_size": 3},
        "federation": {"rounds": 2, "local_steps": 1, "pool": "local"},
        "privacy": {"enable_dp": True, "noise_multiplier": 2.0, "epsilon": 20.0},
        "output": {"report": False, "export": False},
    }
    if classes:
        raw["model"] = {"type": "densenet", "spatial_dims": data["spatial_dims"]}
        raw["training"] |= {"patch_size_voxels": 32, "patient_group_size": 1}
    return parse_run_config({**raw, **sections})


def write(folder: Path, layout: str, people: Sequence[Person], pool: Callable[[str, Person], Path]) -> None:
    """Write a folder of a layout."""
    folder.mkdir(parents=True)
    if layout.startswith("dicom"):
        for person in people:
            shutil.copytree(pool(layout.split()[1], person), folder / f"folder-{person.name}")
        return
    if layout == "csv dicom":
        rows = []
        for person in people:
            shutil.copytree(pool("seg", person), folder / person.name)
            rows.append({"patient_id": person.name, "image": f"{person.name}/t1", "label": f"{person.name}/label.dcm"})
        _write_csv(folder, rows, people)
        return
    entries = [_entry(folder, layout, person, people) for person in people]
    if layout in ("decathlon", "nnunet"):
        _write_dataset_json(folder, layout, entries)
    elif layout == "json nrrd":
        rows = [row for row in entries if row]
        (folder / "manifest.json").write_text(json.dumps({"cases": rows}))
    else:
        _write_csv(folder, entries, people)


def _entry(folder: Path, layout: str, person: Person, people: Sequence[Person]) -> dict[str, Any]:
    """Write one patient's files and return what the layout's list says of him."""
    rng = np.random.default_rng([person.seed, 5])
    odd, flat = person.oddity, "png" in layout
    edge = (9, 9, 5) if odd == "other shape" else SHAPE
    shape = edge[:2] if flat else edge
    label = np.zeros(shape, np.uint8)
    label[2:5, 2:6] = 9 if odd == "unknown label" else 1
    image = (rng.integers(0, 100, shape) + 100 * (label > 0)).astype(np.int16)
    ending = ".png" if flat else ".nrrd" if "nrrd" in layout else ".nii.gz"
    prefix = {"decathlon": "imagesTr/", "nnunet": "imagesTr/"}.get(layout, "")
    several = layout in ("nnunet", "csv nifti")
    paths = [f"{prefix}{person.name}_{i:04d}{ending}" if several else f"{prefix}{person.name}{ending}" for i in (0, 1)]
    for channel, path in enumerate(paths if several else paths[:1]):
        shown = image if channel == 0 else image[::-1]  # a channel that took the other's place would be seen
        _write_image(folder / path, np.stack([shown, shown], -1) if odd == "more channels" and not flat else shown)
        if odd == "damaged image":
            (folder / path).write_bytes((folder / path).read_bytes()[:40])
        if odd == "missing image":
            (folder / path).unlink()
    target = f"{'labelsTr/' if prefix else ''}{person.name}{'' if prefix else '-label'}{ending}"
    if odd != "missing label":
        _write_image(folder / target, label[1:] if odd == "label elsewhere" else label)
    entry: dict[str, Any] = {"patient_id": person.name, "label": target}
    if layout.startswith("classes"):
        entry["label"] = {"unknown label": "7", "missing label": ""}.get(odd, str(person.seed % 2))
    if odd == "somebody else's image":
        first = next(one.name for one in people if one is not person)
        paths = [path.replace(person.name, first) for path in paths]
    if layout == "csv nifti":
        entry |= {"image_flair": paths[0], "image_t1": paths[1]}
    elif layout != "nnunet":
        entry["image"] = paths[0]
    entry |= {"split": odd} if odd in ("holdout", "train") else {}
    entry |= {"split": "on leave"} if odd == "nonsense split" else {}
    entry |= {"remark": "private words 4711"} if odd == "free text" else {}
    if odd == "no patient id":
        entry["patient_id"] = ""
    return entry


def _write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(array.astype(np.uint8)).save(path)
    elif path.suffix == ".nrrd":
        import nrrd

        nrrd.write(str(path), array[..., 0] if array.ndim == 4 else array)
    else:
        nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.0, 2.0, 1.0])), path)


def _write_dataset_json(folder: Path, layout: str, entries: Sequence[dict[str, Any]]) -> None:
    listed = [{k: v for k, v in e.items() if k != "patient_id" or v} for e in entries]
    document: dict[str, Any] = {
        "training": listed,
        "labels": {"0": "background", "1": "lesion"},
        "modality": {"0": "t1"},
    }
    if layout == "nnunet":
        document = {
            "channel_names": {"0": "flair", "1": "t1"},
            "labels": {"background": 0, "lesion": 1},
            "file_ending": ".nii.gz",
        }
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(document))


def _write_csv(folder: Path, rows: Sequence[dict[str, Any]], people: Sequence[Person]) -> None:
    """Write a manifest; its header is the same whoever is in it."""
    images = ("image_flair", "image_t1") if any("image_flair" in row for row in rows) else ("image",)
    columns = ("patient_id", *images, "label", "split", "remark")
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for row, person in zip(rows, people, strict=True):
            values = [row.get(column, "") for column in columns]
            writer.writerow(values[:2] if person.oddity == "half a row" else values)
            if person.oddity == "both sides":
                writer.writerow([row.get(column, "") if column != "split" else "holdout" for column in columns])


@lru_cache(maxsize=1)
def _pool_folder() -> Path:
    import atexit
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="medfl-neighbours-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def dicom_patient(kind: str, person: Person) -> Path:
    """Return a folder with one patient's series and label object, written when it is first needed."""
    folder = _pool_folder() / f"{kind}-{person.name}-{person.seed}-{person.oddity.replace(' ', '-') or 'plain'}"
    if not folder.exists():
        _write_dicom(folder, kind, person)
    return folder


def _write_dicom(folder: Path, kind: str, person: Person) -> None:
    odd = person.oddity
    base = DicomBuilder(person.name)
    series = {"": ("flair", "t1"), "no t1": ("flair",), "two t1": ("flair", "t1", "t1"), "text": ("private 4711", "t1")}
    for number, name in enumerate(series.get(odd, ("flair", "t1"))):
        builder = DicomBuilder(person.name)
        builder.uids = {**base.uids, "series": str(generate_uid())}
        for slice_ in builder.slices:
            slice_.SeriesDescription, slice_.SeriesInstanceUID = name, builder.uids["series"]
            slice_.FrameOfReferenceUID, slice_.StudyInstanceUID = base.uids["frame"], base.uids["study"]
            stored = np.frombuffer(slice_.PixelData, "<u2")
            # Noise of one's own per series: a constant would vanish when intensities are normalised.
            noise = np.random.default_rng([person.seed, number, slice_.InstanceNumber]).integers(0, 200, stored.size)
            slice_.PixelData = (stored + noise).astype("<u2").tobytes()
        if odd == "missing slice" and name == "t1":
            del builder.slices[3]
        where = builder.save(folder / (name if number < 2 else f"{name}-{number}"))
        if number == 0:
            _write_label(folder, kind, builder, odd)
    if odd == "damaged file":
        file = next(where.iterdir())
        file.write_bytes(file.read_bytes()[:300])


def _write_label(folder: Path, kind: str, builder: DicomBuilder, odd: str) -> None:
    names = {"segment 4711": ("private label 4711",), "other numbers": ("other", "lesion")}.get(odd, ("lesion",))
    path = folder / "label.dcm"
    if kind == "seg":
        masks = {name: np.roll(builder.mask(), number, 2) for number, name in enumerate(names)}
        builder.seg(path, masks)
    else:
        outlines = [builder.outline(i) for i in range(builder.box[0].start, builder.box[0].stop)]
        builder.rtstruct(path, dict.fromkeys(names, outlines))
    if odd == "no reference":
        from pydicom import dcmread

        label = dcmread(path)
        for name in ("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence", "FrameOfReferenceUID"):
            if name in label:
                delattr(label, name)
        label.save_as(path)


def opened(run: RunConfig) -> dict[str, Any]:
    """Open a run's only hospital as it does before the first round, and return everything that training would see."""
    try:
        data = open_hospital_data(run, ("a",))
        data.check_cases()
    except MedflError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    seen: dict[str, Any] = {
        "channels": data.channels,
        "labels": data.labels,
        "preprocessing": data.preprocessing.model_dump(),
    }
    for side, cases in (("train", data.train), ("holdout", data.holdout)):
        for case in cases:
            label = case.label.tobytes() if isinstance(case.label, np.ndarray) else case.label
            content = (side, case.image.shape, case.image.tobytes(), label, case.affine.tobytes(), case.spacing_mm)
            seen.setdefault(f"patient {case.patient_id}", []).append(content)
    return seen


def differences(pair: Pair) -> list[str]:
    """Return what differs between a pair's folders, the differing patient apart."""
    one, two = (opened(run) for run in pair.runs)
    mine = f"patient {pair.differing}"
    return [name for name in sorted(one.keys() | two.keys()) if name != mine and one.get(name) != two.get(name)]
