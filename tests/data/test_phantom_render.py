"""Phantoms: exact truth, seeds, hospitals that differ, and anatomy that does not depend on the grid."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medfl_ray.data.phantoms.preset import HospitalProfile, PhantomPreset, load_preset, preset_names
from medfl_ray.data.phantoms.profiles import hospital_profile
from medfl_ray.data.phantoms.render import Phantom, render_phantom
from medfl_ray.errors import ConfigError, LayoutError, UnreadableFile

LABEL_MAPS = Path(__file__).parents[2].parent / "shared" / "data" / "brain_labelmaps_synthseg"
QUIET = {"snr": 1000.0, "bias_amplitude": 0.0, "contrast_spread": 0.0}


def one_hospital(**changes: object) -> PhantomPreset:
    """brain_tumour with a single hospital that differs from a plain one in the given fields."""
    profile = HospitalProfile(**{"name": "test", **changes})  # type: ignore[arg-type]
    return load_preset("brain_tumour").model_copy(update={"hospitals": (profile,)})


def centre_mm(phantom: Phantom) -> np.ndarray:
    """Centre of the true tumour in RAS mm."""
    voxels = np.argwhere(phantom.truth > 0).mean(axis=0)
    return (phantom.affine @ [*voxels, 1])[:3]


def volume_ml(phantom: Phantom, label: np.ndarray) -> float:
    return float((label > 0).sum() * abs(np.linalg.det(phantom.affine[:3, :3])) / 1000)


def digest(phantom: Phantom) -> str:
    return hashlib.sha256(phantom.image.tobytes() + np.asarray(phantom.label).tobytes()).hexdigest()


def test_a_volume_has_four_channels_and_two_labels() -> None:
    phantom = render_phantom("brain_tumour", 0, 0, 32)
    assert phantom.image.shape == (4, 32, 32, 32)
    assert phantom.image.dtype == np.float32
    assert phantom.label.shape == (32, 32, 32)
    assert phantom.label.dtype == np.uint8
    assert set(np.unique(phantom.truth)) == {0, 1, 2}
    assert phantom.labels == {1: "core", 2: "oedema"}
    assert np.array_equal(phantom.image, np.rint(phantom.image))
    assert phantom.image.min() >= 0


def test_another_process_with_other_threads_renders_the_same_bits() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_phantom_render import digest, render_phantom;"
        "print(digest(render_phantom('brain_tumour', 5, 3, 40, 11)))"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == digest(render_phantom("brain_tumour", 5, 3, 40, 11))


def test_seed_hospital_and_patient_each_change_the_image() -> None:
    digests = [
        digest(render_phantom("brain_tumour", *a)) for a in ((0, 0, 24, 0), (0, 0, 24, 1), (0, 1, 24, 0), (1, 0, 24, 0))
    ]
    assert len(set(digests)) == 4


def test_the_anatomy_does_not_depend_on_the_grid() -> None:
    small, large = render_phantom("brain_tumour", 0, 4, 32), render_phantom("brain_tumour", 0, 4, 64)
    assert np.allclose(centre_mm(small), centre_mm(large), atol=2.5)
    assert volume_ml(small, small.truth) == pytest.approx(volume_ml(large, large.truth), rel=0.15)


@pytest.mark.parametrize("orientation", ["coronal", "sagittal"])
def test_the_acquisition_plane_turns_the_array_and_not_the_patient(orientation: str) -> None:
    axial = render_phantom(one_hospital(**QUIET), 0, 1, 48)
    turned = render_phantom(one_hospital(**QUIET, orientation=orientation), 0, 1, 48)
    assert not np.allclose(axial.affine, turned.affine)
    assert np.allclose(centre_mm(axial), centre_mm(turned), atol=1.5)


def test_sequences_show_what_they_show_in_a_real_scanner() -> None:
    phantom = render_phantom(one_hospital(**QUIET, slice_thickness_mm=(1, 1)), 0, 2, 64)
    image = dict(zip(phantom.channels, phantom.image, strict=True))
    core, oedema = phantom.truth == 1, phantom.truth == 2
    head = image["T1"] > 0.3 * np.percentile(image["T1"], 95)
    normal = head & (phantom.truth == 0)
    assert np.median(image["T1c"][core]) > 1.3 * np.median(image["T1"][core])  # contrast agent
    assert np.median(image["T2"][oedema]) > 1.3 * np.median(image["T2"][normal])
    assert np.median(image["FLAIR"][oedema]) > 1.3 * np.median(image["FLAIR"][normal])
    assert np.median(image["T1"][oedema]) < np.median(image["T1"][normal])


def test_tumours_have_the_size_that_the_preset_says() -> None:
    low, high = load_preset("brain_tumour").lesion.radius_mm
    for patient in range(12):
        phantom = render_phantom(one_hospital(), 0, patient, 32)
        radius = (volume_ml(phantom, phantom.truth) * 1000 * 3 / (4 * np.pi)) ** (1 / 3)
        assert 0.6 * low < radius < 1.5 * high


def test_a_sequence_that_is_not_acquired_is_zero() -> None:
    phantom = render_phantom(one_hospital(missing=("T2",)), 0, 0, 24)
    assert [bool(channel.any()) for channel in phantom.image] == [True, True, False, True]


def test_annotators_draw_outside_or_inside_the_truth_and_the_truth_stays() -> None:
    plain = render_phantom(one_hospital(), 0, 3, 48)
    wide = render_phantom(one_hospital(annotator_mm=1.5, annotator_smoothing_mm=2), 0, 3, 48)
    tight = render_phantom(one_hospital(annotator_mm=-1.5, annotator_smoothing_mm=2), 0, 3, 48)
    assert np.array_equal(plain.label, plain.truth)
    assert np.array_equal(plain.truth, wide.truth)
    assert np.array_equal(plain.truth, tight.truth)
    assert volume_ml(tight, tight.label) < volume_ml(plain, plain.label) < volume_ml(wide, wide.label)


def test_noise_follows_the_field_strength() -> None:
    def background_std(index: int) -> float:
        image = render_phantom("brain_tumour", index, 0, 32).image[1]
        return float(image[:3, :3, :3].std() / np.percentile(image, 90))

    assert background_std(3) > 1.5 * background_std(0)  # 0.55 T against 3 T


def test_a_thousand_hospitals_have_distinct_profiles() -> None:
    preset = load_preset("brain_tumour")
    profiles = [hospital_profile(preset, i, 0) for i in range(1000)]
    assert len({p.name for p in profiles}) == 1000
    assert len({p.snr for p in profiles[4:]}) == 996
    assert {p.field_tesla for p in profiles} == {0.55, 1.5, 3.0}
    assert {p.orientation for p in profiles} == {"axial", "coronal", "sagittal"}
    assert hospital_profile(preset, 700, 0) == profiles[700]
    assert hospital_profile(preset, 700, 1) != profiles[700]
    assert render_phantom(preset, 999, 0, 24).truth.any()


def test_a_negative_seed_is_a_seed() -> None:
    assert digest(render_phantom("brain_tumour", 7, 0, 16, -1)) != digest(render_phantom("brain_tumour", 7, 0, 16, 1))


def test_a_merged_label_is_the_whole_tumour() -> None:
    phantom = render_phantom("brain_tumour_t1c_flair", 0, 0, 32)
    assert phantom.image.shape[0] == 2
    assert set(np.unique(phantom.truth)) == {0, 1}
    assert phantom.labels == {1: "tumour"}


def test_slices_carry_a_class_with_the_hospitals_prevalence() -> None:
    phantoms = [render_phantom("tumour_slices", 0, patient, 32) for patient in range(60)]
    assert phantoms[0].image.shape == (2, 32, 32)
    sick = sum(int(p.label) for p in phantoms)
    assert 20 <= sick <= 40  # prevalence 0.5: within 2.6 standard deviations


def test_a_slice_with_a_tumour_shows_it() -> None:
    preset = load_preset("tumour_slices")
    quiet = HospitalProfile(name="test", **QUIET, prevalence=1.0)  # type: ignore[arg-type]
    sick = preset.model_copy(update={"hospitals": (quiet,)})
    well = preset.model_copy(update={"hospitals": (quiet.model_copy(update={"prevalence": 0.0}),)})
    for patient in range(10):
        with_tumour = render_phantom(sick, 0, patient, 48).image[1]
        without = render_phantom(well, 0, patient, 48).image[1]
        assert (with_tumour > 1.3 * without + 100).sum() > 20


def test_every_shipped_preset_renders() -> None:
    for name in preset_names():
        assert render_phantom(name, 1, 0, 24).image.any()


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no phantom preset 'brain'.*brain_tumour"):
        render_phantom("brain", 0, 0, 24)


def test_a_preset_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nchannels: [T1]\nlabels: {1: a, 3: b}\n")
    with pytest.raises(ConfigError, match=r"expected 1 \(whole tumour\) or 1 and 2"):
        load_preset(path)
    path.write_text("name: mine\nchannels: [T1]\nlabels: {1: a}\nlesions: {}\n")
    with pytest.raises(ConfigError, match="did you mean 'lesion'"):
        load_preset(path)
    path.write_text("name: mine\nchannels: [T1]\nlabels: {1: whole}\n")
    assert render_phantom(path, 0, 0, 24).image.shape == (1, 24, 24, 24)


def test_a_folder_without_label_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"holds 0 NIfTI files and no labels\.json"):
        render_phantom("brain_tumour", 0, 0, 24, 0, tmp_path)


def test_a_broken_or_brainless_label_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"index_to_freesurfer": {"0": 0, "1": 24}}')
    path = tmp_path / "subject.nii.gz"
    path.write_bytes(b"\x1f\x8b not a gzip file")
    with pytest.raises(UnreadableFile, match="cannot read label map"):
        render_phantom("brain_tumour", 0, 0, 24, 0, tmp_path)
    nib.save(nib.Nifti1Image(np.ones((40, 40, 40), np.uint8), np.eye(4)), path)
    with pytest.raises(LayoutError, match="no cortex or no white matter"):
        render_phantom("brain_tumour", 0, 0, 24, 0, tmp_path)


@pytest.mark.realdata
@pytest.mark.skipif(not LABEL_MAPS.is_dir(), reason="the label maps of real subjects are not beside the checkout")
def test_real_label_maps_give_other_heads() -> None:
    phantoms = [render_phantom("brain_tumour", 0, patient, 32, 0, LABEL_MAPS) for patient in range(2)]
    template = render_phantom("brain_tumour", 0, 0, 32)
    assert all(p.truth.any() for p in phantoms)
    assert digest(phantoms[0]) != digest(template)
    brain = np.percentile(phantoms[0].image[0], 99)
    assert (phantoms[0].image[0] > 0.3 * brain).mean() > 0.12  # a head fills the field of view
