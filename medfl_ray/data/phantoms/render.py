"""One synthetic patient: a real anatomy, deformed, with a tumour, as one hospital's scanner sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage, stats

from medfl_ray.data.phantoms.anatomy import Anatomy, list_label_maps, load_label_map
from medfl_ray.data.phantoms.geometry import FloatArray, Grid, Pose, draw_pose, scanner_grid
from medfl_ray.data.phantoms.head_template import load_template
from medfl_ray.data.phantoms.lesion import Lesion, LesionMaps, draw_lesion, lesion_maps
from medfl_ray.data.phantoms.preset import HospitalProfile, PhantomPreset, load_preset
from medfl_ray.data.phantoms.profiles import hospital_profile
from medfl_ray.data.phantoms.scanner import acquire

PLACEMENT_SPACING_MM = 4

LabelArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Phantom:
    """A rendered examination.

    `image` is [C, D, H, W] (slices along the last axis) or [C, H, W]; `label` is the hospital's annotation
    [D, H, W] or a class; `truth` is exact, before the annotators' habits. `affine` maps array indices to
    RAS millimetres. A sequence that the hospital does not acquire is a channel of zeros.
    """

    image: FloatArray
    label: LabelArray | int
    truth: LabelArray | int
    affine: npt.NDArray[np.float64]
    patient_id: str = field(repr=False)
    channels: tuple[str, ...]
    labels: dict[int, str]


def render_phantom(
    preset: str | Path | PhantomPreset,
    hospital_index: int,
    patient_index: int,
    size_voxels: int = 64,
    seed: int = 0,
    labelmaps: Path | None = None,
) -> Phantom:
    """Render one patient of one hospital; the same bits for the same arguments in any process.

    Args:
      preset: name of a preset, a YAML file, or the preset itself.
      size_voxels: edge length; anatomy and lesion do not depend on it.
      labelmaps: folder of whole-head label maps with labels.json, instead of the MNI152 head.

    Raises:
      ConfigError: the preset does not exist or is wrong.
      LayoutError: the label map folder is not one.
    """
    chosen = load_preset(preset)
    profile = hospital_profile(chosen, hospital_index, seed)
    if chosen.figure == "ball":
        return _render_ball(chosen, profile, (hospital_index, patient_index), size_voxels, seed)
    entropy = [seed & (2**64 - 1), hospital_index, patient_index]
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(entropy).spawn(3)]
    anatomy, placement = _anatomies(profile, size_voxels, labelmaps, int(streams[0].integers(2**31)))
    pose = draw_pose(streams[0])
    sick = bool(streams[1].random() < profile.prevalence)
    lesion = draw_lesion(streams[1], chosen.lesion, profile.size_factor, placement.lesion_sites_mm)
    height = _slice_height(lesion, pose, streams[1]) if chosen.spatial_dims == 2 else None
    grid = scanner_grid(profile, size_voxels, height)
    fractions, head, maps = _compose(anatomy, grid, pose.anatomy_coordinates(grid), lesion if sick else None, chosen)
    image = acquire(fractions, head, grid, chosen.channels, profile, streams[2])
    name = f"P{hospital_index:03d}-{patient_index:04d}"
    if chosen.task == "classification":
        plane = np.ascontiguousarray(image[..., 0].transpose(0, 2, 1))
        affine = grid.affine[:, [1, 0, 2, 3]]
        return Phantom(plane, int(sick), int(sick), affine, name, chosen.channels, dict(chosen.labels))
    truth = _labels(maps.whole, maps.core, chosen, 0.5, 0.5)
    label = _annotate(maps, grid, profile, chosen)
    return Phantom(image, label, truth, grid.affine, name, chosen.channels, dict(chosen.labels))


def _render_ball(
    preset: PhantomPreset, profile: HospitalProfile, who: tuple[int, int], size_voxels: int, seed: int
) -> Phantom:
    """Render a disc or ball in noise, whose contrast is the hospital's: little to learn, and nearly free to make."""
    rng = np.random.default_rng(np.random.SeedSequence([seed & (2**64 - 1), *who], spawn_key=(2,)))
    shape = (size_voxels,) * preset.spatial_dims
    centre = rng.uniform(0.25, 0.75, len(shape)) * size_voxels
    radius = rng.uniform(0.1, 0.25) * size_voxels * profile.size_factor
    axes = np.meshgrid(*(np.arange(edge, dtype=np.float32) for edge in shape), indexing="ij", sparse=True)
    inside = sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True)) <= radius**2
    image = rng.standard_normal(shape, dtype=np.float32) / np.float32(profile.snr / 10) + profile.contrast * inside
    label = inside.astype(np.uint8)
    affine = np.eye(4)
    name = f"P{who[0]:03d}-{who[1]:04d}"
    return Phantom(image[None].astype(np.float32), label, label, affine, name, preset.channels, dict(preset.labels))


def _anatomies(
    profile: HospitalProfile, size_voxels: int, labelmaps: Path | None, draw: int
) -> tuple[Anatomy, Anatomy]:
    """The anatomy to render, at about three quarters of the voxel's size so that a voxel averages what it covers,
    and the one to place lesions in, which must not depend on the voxel's size.
    """
    spacing = int(np.clip(0.75 * min(profile.field_of_view_mm) / size_voxels, 1, 5))
    if labelmaps is None:
        # Below 2 mm the template, an average of many brains, has no more detail and takes half a minute to build.
        return load_template(max(spacing, 2)), load_template(PLACEMENT_SPACING_MM)
    maps = list_label_maps(Path(labelmaps))
    path = maps[draw % len(maps)]
    return load_label_map(path, spacing), load_label_map(path, PLACEMENT_SPACING_MM)


def _slice_height(lesion: Lesion, pose: Pose, rng: np.random.Generator) -> float:
    """Height of the slice in the room: through the tumour, and at the same heights where there is none."""
    return float(pose.room_point(lesion.centre_mm)[2] + rng.uniform(-0.3, 0.3) * lesion.radius_mm)


def _compose(
    anatomy: Anatomy, grid: Grid, coordinates: list[FloatArray], lesion: Lesion | None, preset: PhantomPreset
) -> tuple[FloatArray, npt.NDArray[np.bool_], LesionMaps]:
    """Return fractions [parts, N] of the N head voxels, the head mask [*grid] and the lesion's maps."""
    distance = lesion.distance(coordinates) if lesion else None
    if lesion and distance is not None:
        coordinates = lesion.displace(coordinates, distance)
    tissue, head = anatomy.sample(coordinates)
    parts = np.zeros((4, tissue.shape[1]), dtype=np.float32)
    empty = np.zeros(grid.shape, dtype=np.float32)
    if lesion is None or distance is None:
        return np.concatenate([tissue, parts]), head, LesionMaps(empty, empty, empty)
    white, brain = empty.copy(), empty.copy()
    white[head], brain[head] = tissue[0], tissue[:3].sum(axis=0)
    maps = lesion_maps(lesion, grid, distance, white, brain)
    whole, core, dead = maps.whole[head], maps.core[head], maps.necrosis[head]
    parts[0] = whole - core
    parts[2] = dead
    parts[3 if lesion.necrosis_share else 1] = core - dead
    parts *= preset.lesion.visibility
    tissue *= 1 - parts.sum(axis=0)
    return np.concatenate([tissue, parts]), head, maps


def _labels(whole: FloatArray, core: FloatArray, preset: PhantomPreset, at_whole: float, at_core: float) -> LabelArray:
    inside_core, inside = core > at_core, whole > at_whole
    if 2 not in preset.labels:
        return (inside | inside_core).astype(np.uint8)
    return np.where(inside_core, 1, np.where(inside, 2, 0)).astype(np.uint8)


def _annotate(maps: LesionMaps, grid: Grid, profile: HospitalProfile, preset: PhantomPreset) -> LabelArray:
    """Draw the borders as this hospital's annotators do: a little outside or inside, and rounded off.

    A Gaussian-smoothed edge crosses Phi(-offset / sigma) at the offset, so one threshold moves the border.
    """
    spacing = float(np.mean(grid.spacing_mm))
    sigma_mm = max(profile.annotator_smoothing_mm, 0.6 * spacing)
    if profile.annotator_mm == 0 and profile.annotator_smoothing_mm == 0:
        return _labels(maps.whole, maps.core, preset, 0.5, 0.5)
    sigma = [sigma_mm / s for s in grid.spacing_mm]
    whole = ndimage.gaussian_filter(maps.whole, sigma, truncate=2.5)
    core = ndimage.gaussian_filter(maps.core, sigma, truncate=2.5)
    threshold = float(stats.norm.cdf(-profile.annotator_mm / sigma_mm))
    return _labels(whole, core, preset, threshold, threshold)
