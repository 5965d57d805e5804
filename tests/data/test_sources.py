from __future__ import annotations

import numpy as np
import pytest
import yaml

from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import ConfigError, LayoutError

PHANTOM = {"preset": "brain_tumour_t1c_flair", "num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16}


def folder_run(make_run, folder, **data):
    return make_run({"directory": str(folder), "declared": "public", **data}, training={"patch_size_voxels": 8})


def test_public_folder_is_counted_and_partitioned(decathlon, make_run):
    run = folder_run(make_run, decathlon("abcdefgh", site=list("xxxxyyyy")), partition={"by": "field", "field": "site"})
    policies = list_hospitals(run)
    assert [(p.hospital, p.num_patients, p.declared) for p in policies] == [("x", 3, "public"), ("y", 3, "public")]
    data = open_hospital_data(run, ("x",))
    assert (data.num_train_patients, len(data.holdout), data.labels) == (3, 1, {1: "core", 2: "rim"})


def test_central_is_the_union_of_the_hospitals(decathlon, make_run):
    run = folder_run(make_run, decathlon("abcdefgh"), partition={"by": "iid", "num_hospitals": 2})
    parts = [open_hospital_data(run, (f"hospital-{i}",)) for i in (1, 2)]
    union = open_hospital_data(run, ("hospital-1", "hospital-2"))
    assert union.hospital_ids == ("hospital-1", "hospital-2")
    assert union.num_train_patients == sum(part.num_train_patients for part in parts)
    patches = union.train_patches(parts[0].num_train_patients, 1, np.random.default_rng(0))[0]
    assert np.array_equal(patches, parts[1].train_patches(0, 1, np.random.default_rng(0))[0])


def test_private_folder_must_declare_its_size(decathlon, make_run):
    run = make_run({"directory": str(decathlon())})
    with pytest.raises(ConfigError, match=r"data\.hospitals with num_patients"):
        list_hospitals(run)


def test_private_hospital_must_declare_its_size_and_is_never_counted(tmp_path, decathlon, make_run):
    with pytest.raises(ConfigError, match="no num_patients"):
        list_hospitals(make_run({"hospitals": [{"id": "a", "directory": str(decathlon())}]}))
    absent = {"id": "a", "directory": str(tmp_path / "not-here"), "num_patients": 50, "max_epsilon": 4}
    policy = list_hospitals(make_run({"hospitals": [absent]}))[0]
    assert (policy.num_patients, policy.declared, policy.max_epsilon) == (50, "private", 4)


def test_site_file_wins_over_the_run(tmp_path, decathlon, make_run):
    folder = decathlon()
    site = {
        "hospital": {"id": "a"},
        "data": {
            "directory": folder.name,
            "labels": {1: "lesion", 2: "edge"},
            "preprocessing": {"intensity": "percentile"},
            "data_set": "ward-7",
        },
        "privacy": {"num_patients": 40, "epsilon": 3.0},
    }
    (folder.parent / "hospital_config.yaml").write_text(yaml.safe_dump(site))
    hospital = {
        "id": "a",
        "site_config": str(folder.parent / "hospital_config.yaml"),
        "num_patients": 7,
        "declared": "public",
    }
    run = make_run({"hospitals": [hospital]}, training={"patch_size_voxels": 8})
    policy = list_hospitals(run)[0]
    assert (policy.num_patients, policy.data_set, policy.declared, policy.max_epsilon) == (40, "ward-7", "private", 3.0)
    assert policy.require_dp
    data = open_hospital_data(run, ("a",))
    assert data.labels == {1: "lesion", 2: "edge"}
    assert data.declared == "private"
    assert data.holdout[0].image.max() == 1.0


def test_run_may_not_send_a_hospital_to_another_folder(tmp_path, make_run):
    """Another folder under the same data-set name would spend a budget that is not its own."""
    path = tmp_path / "hospital_config.yaml"
    site = {"hospital": {"id": "a"}, "data": {"directory": "images"}, "privacy": {"num_patients": 9}}
    path.write_text(yaml.safe_dump(site))
    hospital = {"id": "a", "site_config": str(path), "directory": str(tmp_path / "elsewhere")}
    with pytest.raises(ConfigError, match="the site file decides"):
        open_hospital_data(make_run({"hospitals": [hospital]}), ("a",))


def test_site_file_of_another_hospital_is_refused(tmp_path, make_run):
    path = tmp_path / "hospital_config.yaml"
    path.write_text(
        yaml.safe_dump({"hospital": {"id": "b"}, "data": {"directory": "."}, "privacy": {"num_patients": 9}})
    )
    with pytest.raises(ConfigError, match="is of hospital 'b'"):
        list_hospitals(make_run({"hospitals": [{"id": "a", "site_config": str(path)}]}))


def test_phantoms_are_listed_without_rendering_and_opened(make_run):
    run = make_run({"phantom": PHANTOM}, training={"patch_size_voxels": 8})
    policies = list_hospitals(run)
    assert [p.num_patients for p in policies] == [3, 3]
    data = open_hospital_data(run, tuple(p.hospital for p in policies))
    assert (data.declared, data.channels, data.num_train_patients) == ("synthetic", ("T1c", "FLAIR"), 6)
    assert data.holdout[0].image.shape == (2, 16, 16, 16)
    assert data.train_patches(0, 2, np.random.default_rng(0))[0].shape == (2, 2, 8, 8, 8)


def test_phantom_slices_classify(make_run):
    run = make_run(
        {"phantom": PHANTOM | {"preset": "tumour_slices"}, "task": "classification", "spatial_dims": 2},
        model={"type": "densenet"},
        training={"patch_size_voxels": 16},
    )
    data = open_hospital_data(run, (list_hospitals(run)[0].hospital,))
    images, targets = data.train_patches(0, 1, np.random.default_rng(0))
    assert images.shape == (1, 2, 16, 16)
    assert set(data.labels) == {1}
    assert targets.shape == (1,)


def test_a_channel_can_be_picked_by_name(make_run, decathlon):
    folder = decathlon(channels=2)
    both = open_hospital_data(folder_run(make_run, folder), ("hospital-1",))
    one = open_hospital_data(folder_run(make_run, folder, channels=["m1"]), ("hospital-1",))
    assert (both.channels, one.channels) == (("M0", "M1"), ("m1",))
    assert np.array_equal(one.holdout[0].image[0], both.holdout[0].image[1])
    phantom = make_run({"phantom": PHANTOM, "channels": ["FLAIR"]})
    assert open_hospital_data(phantom, (list_hospitals(phantom)[0].hospital,)).channels == ("FLAIR",)


def test_same_holdout_whatever_the_order_of_the_hospitals(decathlon, make_run):
    run = folder_run(make_run, decathlon("abcdefgh"))
    first = {case.patient_id for case in open_hospital_data(run, ("hospital-1",)).holdout}
    second = {case.patient_id for case in open_hospital_data(run, ("hospital-1",)).holdout}
    assert first == second
    assert len(first) == 2


def test_unknown_hospital_and_wrong_channels_are_refused(decathlon, make_run):
    folder = decathlon(channels=2)
    with pytest.raises(ConfigError, match="its hospitals are hospital-1"):
        open_hospital_data(folder_run(make_run, folder), ("mars",))
    with pytest.raises(ConfigError, match=r"data\.channels is \['T9'\]"):
        open_hospital_data(folder_run(make_run, folder, channels=["T9"]), ("hospital-1",))


def test_hospitals_that_differ_in_labels_do_not_pool(tmp_path, decathlon, make_run):
    import shutil

    first = decathlon()
    second = tmp_path / "second"
    shutil.copytree(first, second)
    text = (second / "dataset.json").read_text().replace('"2": "rim"', '"3": "rim"')
    (second / "dataset.json").write_text(text.replace('"core"', '"nucleus"'))
    hospitals = [{"id": "a", "directory": str(first)}, {"id": "b", "directory": str(second)}]
    run = make_run({"hospitals": hospitals, "declared": "public"})
    with pytest.raises(LayoutError, match="do not fit one network"):
        open_hospital_data(run, ("a", "b"))
