"""A MONAI bundle as a run's model: its definition is read as data, and only networks are built from it."""

import json

import pytest
import torch
import yaml

from medfl_ray.config.bundle import with_bundle
from medfl_ray.config.files import load_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, ModelError
from medfl_ray.models.bundle_network import allowed_class
from medfl_ray.models.catalogue import build_network
from medfl_ray.params import flatten, layout_of

UNET = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": "@num_classes",
    "channels": "$(4, 8)",
    "strides": [2],
    "norm": ["group", {"num_groups": 2}],
}
PREPARED = {
    "_target_": "Compose",
    "transforms": [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": "@spacing", "mode": "bilinear"},
        {
            "_target_": "ScaleIntensityRanged",
            "keys": "image",
            "a_min": -100,
            "a_max": 250,
            "b_min": 0.0,
            "b_max": 1.0,
            "clip": True,
        },
    ],
}


def bundle_at(folder, network=UNET, prepared=PREPARED, **more):
    (folder / "configs").mkdir(parents=True)
    document = {"num_classes": 2, "spacing": [1.5, 1.5, 2.0], "network_def": network, "preprocessing": prepared, **more}
    (folder / "configs" / "inference.json").write_text(json.dumps(document))
    return folder


def file_at(tmp_path, bundle, **model):
    raw = {
        "name": "bundled",
        "data": {"phantom": {"num_hospitals": 2, "patients_per_hospital": 4, "size_voxels": 16}},
        "model": {"type": "bundle", "bundle": str(bundle), **model},
        "training": {"patch_size_voxels": 16},
        "privacy": {"enable_dp": False},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def built(run, for_dp=False):
    model = run.model
    return build_network(model, run.spatial_dims, model.in_channels, model.out_channels, for_dp, run.patch_size)


def test_network_shape_and_preparation_come_from_the_bundle_and_its_path_is_forgotten(tmp_path):
    run = load_run_config(file_at(tmp_path, bundle_at(tmp_path / "my_bundle")))
    assert (run.model.in_channels, run.model.out_channels, run.model.size_divisor) == (1, 2, 2)
    assert run.model.network["channels"] == [4, 8]
    assert (run.data.spacing_mm, run.data.intensity, run.data.window) == ((1.5, 1.5, 2.0), "window", (-100.0, 250.0))
    assert str(tmp_path) not in run.model_dump_json()
    network = built(run, for_dp=True)
    assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    own = UNet(3, 1, 2, (4, 8), (2,), norm=("group", {"num_groups": 2}))
    assert layout_of(own) == layout_of(network)


def test_the_definition_is_part_of_what_the_run_is(tmp_path):
    first = load_run_config(file_at(tmp_path, bundle_at(tmp_path / "a")))
    again = load_run_config(file_at(tmp_path, bundle_at(tmp_path / "elsewhere")))
    other = load_run_config(file_at(tmp_path, bundle_at(tmp_path / "b", {**UNET, "act": "relu"})))
    assert first.config_hash == again.config_hash != other.config_hash


def test_what_the_run_names_wins(tmp_path):
    raw = yaml.safe_load(file_at(tmp_path, bundle_at(tmp_path / "a"), size_divisor=4).read_text())
    raw["data"]["spacing_mm"] = 3.0
    found = with_bundle(raw)
    assert found["model"]["size_divisor"] == 4
    assert found["data"]["spacing_mm"] == 3.0
    assert found["data"]["intensity"] == "window"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": {**UNET, "out_channels": "$__import__('os').system('true')"}}, "would have to be evaluated"),
        ({"network": {**UNET, "out_channels": "@absent"}}, "refers to 'absent'"),
        ({"network": {**UNET, "out_channels": "@network_def::out_channels"}}, "refers to itself"),
        ({"network": {"channels": 3}}, "defines no network"),
        (
            {"prepared": [{"_target_": "ScaleIntensityd", "keys": "image"}]},
            r"prepares images with ScaleIntensity \{\}, which data.spacing_mm",
        ),
    ],
)
def test_what_a_run_cannot_take_over_is_said(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        load_run_config(file_at(tmp_path, bundle_at(tmp_path / "a", **changes)))


def test_a_folder_that_is_no_bundle_and_a_type_of_its_own_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no MONAI bundle"):
        load_run_config(file_at(tmp_path, tmp_path))
    with pytest.raises(ConfigError, match=r"belongs to model\.type: bundle"):
        load_run_config(file_at(tmp_path, bundle_at(tmp_path / "a"), type="unet3d"))
    raw = {"type": "bundle"}
    file = tmp_path / "none.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load((tmp_path / "run.yaml").read_text()), "model": raw}))
    with pytest.raises(ConfigError, match=r"needs the folder of a MONAI bundle"):
        load_run_config(file)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "monai.bundle.run",
        "monai.networks.nets.unet.warnings.warn",
        "eval",
        "torch.nn.functional.relu",
        "torch.load",
        "monai.networks.utils.torch.load",
    ],
)
def test_only_networks_are_built(tmp_path, target):
    network = {**UNET, "act": {"_target_": target, "command": "true"}}
    with pytest.raises(ModelError, match="only networks and layers"):
        built(load_run_config(file_at(tmp_path, bundle_at(tmp_path / "a", network))))


def test_layers_are_found_by_their_full_name_too():
    assert allowed_class("torch.nn.PReLU") is torch.nn.PReLU
    assert allowed_class("monai.networks.nets.unet.UNet").__name__ == "UNet"


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({**UNET, "_mode_": "debug"}, "'_mode_', which is not taken"),
        ({**UNET, "stride": 3}, "UNet does not take its arguments"),
    ],
)
def test_a_definition_that_does_not_work_is_one_sentence(tmp_path, network, said):
    with pytest.raises(ModelError, match=said):
        built(load_run_config(file_at(tmp_path, bundle_at(tmp_path / "a", network))))


def test_another_number_of_channels_is_said_before_anything_is_charged(tmp_path):
    from medfl_ray.assembly.run import hospital_specs, local_pool

    run = load_run_config(file_at(tmp_path, bundle_at(tmp_path / "four"), out_channels=3))
    specs = hospital_specs(run, tuple(list_hospitals(run)), tmp_path / "run", tmp_path / "state")
    failures = local_pool(specs).describe()
    assert all("takes 1 image channels" in failure.reason and "have 4" in failure.reason for failure in failures)
    run = load_run_config(file_at(tmp_path, bundle_at(tmp_path / "a"), out_channels=5))
    with pytest.raises(ModelError, match="out_channels 2; the run needs 5"):
        built(run)


def command(file, bundle, out):
    from typer.testing import CliRunner

    from medfl_ray.cli.main import app

    options = ["--bundle", str(bundle), "--origin", "public", "--source", "a model zoo", "--out", str(out)]
    return CliRunner().invoke(app, ["models", "bundle", str(file), *options])


def test_its_weights_become_first_weights_with_a_manifest(tmp_path):
    from medfl_ray.assembly.run import initial_weights

    bundle = bundle_at(tmp_path / "a")
    file = file_at(tmp_path, bundle)
    run = load_run_config(file)
    network, out = built(run), tmp_path / "weights.safetensors"
    (bundle / "models").mkdir()
    torch.save({"model": network.state_dict()}, bundle / "models" / "model.pt")
    done = command(file, bundle, out)
    assert done.exit_code == 0, done.output
    manifest = json.loads(out.with_suffix(".manifest.json").read_text())
    assert (manifest["origin"], manifest["source"], manifest["name"]) == ("public", "a model zoo", "a")
    started = load_run_config(file, (f"training.initial_weights={out}",))
    layout, first = initial_weights(started)(1, 2)
    assert first.tobytes() == flatten(network).tobytes()
    assert layout == layout_of(network)


def test_weights_of_another_network_and_a_file_that_would_run_code_are_refused(tmp_path):
    bundle = bundle_at(tmp_path / "a")
    file, model = file_at(tmp_path, bundle), bundle / "models" / "model.pt"
    assert "has no models/model.pt" in str(command(file, bundle, tmp_path / "w").exception)
    model.parent.mkdir()
    torch.save({"a": torch.zeros(1)}, model)
    assert "another network" in str(command(file, bundle, tmp_path / "w").exception)
    torch.save({"a": Runs(tmp_path / "ran")}, model)
    assert "would run code" in str(command(file, bundle, tmp_path / "w").exception)
    assert not (tmp_path / "ran").exists()


class Runs:
    def __init__(self, place):
        self._place = str(place)

    def __reduce__(self):
        return (open, (self._place, "w"))
