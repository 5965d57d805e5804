"""Crops made up from label maps: shape, classes, intensities and the same bits for the same generator."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medfl_ray.config.pretrain import CropsConfig
from medfl_ray.data.phantoms.structure_crops import draw_crop, load_structures
from medfl_ray.errors import LayoutError, UnreadableFile

WHITE, STRUCTURE = 2, 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two maps with an ellipsoid 40 voxels long, and one with a stump of 10."""
    path = tmp_path_factory.mktemp("maps")
    place = np.indices((60, 70, 60)) - np.array([30, 35, 30]).reshape(3, 1, 1, 1)
    for number, length in enumerate((20, 20, 5)):
        radii = (8, length, 8)
        inside = sum((axis / radius) ** 2 for axis, radius in zip(place, radii, strict=True)) < 1
        labels = np.where(inside, 2, 1).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), path / f"{number}.nii.gz")
    (path / "labels.json").write_text(json.dumps({"index_to_freesurfer": {"1": WHITE, "2": STRUCTURE}}))
    return path


def config_of(folder: Path, **fields: object) -> CropsConfig:
    return CropsConfig.model_validate({"labelmaps": folder, "structures": [STRUCTURE], **fields})


def test_a_damaged_structure_is_left_out(folder: Path) -> None:
    assert len(load_structures(folder, (STRUCTURE,))) == 2


def test_a_crop_is_normalised_and_has_front_and_back(folder: Path) -> None:
    config = config_of(folder, margin_voxels=[4, 6], front_fraction=[0.3, 0.4], random_contrast=0.0)
    structures = load_structures(folder, config.structures)
    for seed in range(5):
        image, classes = draw_crop(structures, config, np.random.default_rng(seed))
        assert image.shape == (1, *classes.shape)
        assert image.dtype == np.float32
        assert abs(image.mean()) < 1e-3
        assert abs(image.std() - 1) < 1e-3
        inside = np.argwhere(classes > 0)
        lengths = np.ptp(inside, axis=0) + 1
        assert all(8 <= extra <= 12 for extra in np.array(classes.shape) - lengths)
        front, back = np.argwhere(classes == 1)[:, 1], np.argwhere(classes == 2)[:, 1]
        assert front.min() == back.max() + 1
        assert 0.25 <= (np.ptp(front) + 1) / lengths[1] <= 0.45
        # In T1-weighted contrast grey matter is darker than the white matter around it.
        assert image[0][classes > 0].mean() < image[0][classes == 0].mean()


def test_any_contrast_turns_up_where_it_is_asked_for(folder: Path) -> None:
    config = config_of(folder, random_contrast=1.0, front_fraction=None)
    structures = load_structures(folder, config.structures)
    brighter = []
    for seed in range(20):
        image, classes = draw_crop(structures, config, np.random.default_rng(seed))
        assert set(np.unique(classes)) == {0, 1}
        brighter.append(image[0][classes > 0].mean() > image[0][classes == 0].mean())
    assert 3 <= sum(brighter) <= 17


def test_the_generator_alone_decides(folder: Path) -> None:
    config = config_of(folder)
    structures = load_structures(folder, config.structures)
    first, again, other = (draw_crop(structures, config, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape != other[0].shape or not np.array_equal(first[0], other[0])


def test_a_structure_that_no_map_shows_is_said(folder: Path) -> None:
    with pytest.raises(LayoutError, match=r"\[99\].*crops\.structures"):
        load_structures(folder, (99,))


def test_a_damaged_map_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text((folder / "labels.json").read_text())
    (tmp_path / "broken.nii.gz").write_bytes(b"not an image")
    with pytest.raises(UnreadableFile, match=r"broken\.nii\.gz"):
        load_structures(tmp_path, (STRUCTURE,))
