"""A bundle as MONAI sees it: its commands check it, load it, and make the masks that our own predictor makes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from medfl_ray.data.formats.readers import read_volume
from medfl_ray.data.phantoms.render import render_phantom
from medfl_ray.errors import ConfigError, ExportError
from medfl_ray.export.monai_bundle import bundle_metadata, inference_config, write_bundle
from medfl_ray.export.onnx_export import export_run
from medfl_ray.export.onnx_session import OnnxModel
from medfl_ray.export.predictor import Predictor

pytestmark = [
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
]
# What docs/source/mb_specification.rst of MONAI says of metadata.json, in words of JSON schema.
SPECIFICATION = {
    "type": "object",
    "required": [
        "version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task",
        "description", "authors", "copyright", "network_data_format",
    ],
    "properties": {
        "version": {"type": "string"},
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "monai_version": {"type": "string"},
        "pytorch_version": {"type": "string"},
        "numpy_version": {"type": "string"},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tensor"}},
        },
    },
    "$defs": {
        "tensor": {
            "type": "object",
            "required": [
                "type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data",
                "channel_def",
            ],
            "properties": {
                "type": {"enum": ["image", "series", "tuples", "probabilities"]},
                "format": {"enum": ["magnitude", "hounsfield", "labels", "classes", "segmentation"]},
                "num_channels": {"type": "integer", "minimum": 1},
                "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
                "dtype": {"const": "float32"},
                "value_range": {"type": "array"},
                "is_patch_data": {"type": "boolean"},
                "channel_def": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the first export stays for the other tests."""
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def exported(make_run, kept, tmp_path):
    """A 3D run whose label 1 has the value 7 in files."""
    if kept.is_dir():
        return shutil.copytree(kept, tmp_path / "run")
    folder = make_run(
        data={
            "hospitals": [{"id": "university", "directory": "/nowhere", "declared": "private", "num_patients": 20}],
            "channels": ["T1c", "FLAIR"],
            "labels": {7: "tumour"},
        },
        model={"type": "unet3d", "features": [4, 8], "in_channels": 2, "out_channels": 2},
        training={"patch_size_voxels": 16, "device": "cpu"},
    )
    export_run(folder)
    shutil.copytree(folder, kept)
    return folder


@pytest.fixture
def bundle(exported, tmp_path):
    """Its bundle."""
    path = tmp_path / "bundles" / "tumours"
    write_bundle(exported, path)
    return path


@pytest.fixture
def images(tmp_path):
    """A phantom with its axes turned and mirrored, which preparation has to put right and restoration to undo."""
    folder = tmp_path / "images"
    folder.mkdir()
    phantom = render_phantom("brain_tumour_t1c_flair", 0, 0, 24)
    turned = np.moveaxis(phantom.image, 0, -1)[::-1].transpose(2, 0, 1, 3)[:, :20]
    affine = np.array([[0, -1.5, 0, 30], [0, 0, 1.2, 4], [2.0, 0, 0, -7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(turned.astype(np.float32), affine), folder / "case.nii.gz")
    return folder


def test_monai_runs_the_inference_and_the_mask_is_ours(exported, bundle, images, tmp_path):
    import monai.bundle

    monai.bundle.run(
        config_file=str(bundle / "configs" / "inference.json"), bundle_root=str(bundle), dataset_dir=str(images),
        output_dir=str(tmp_path / "masks"),
    )  # fmt: skip
    written = nib.load(tmp_path / "masks" / "case_mask.nii.gz")
    ours = Predictor(OnnxModel.open(exported)).segment(read_volume(images / "case.nii.gz"))
    mask = np.asarray(written.dataobj)
    assert set(np.unique(mask)) == {0, 7}
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, ours.mask)
    np.testing.assert_allclose(written.affine, nib.load(images / "case.nii.gz").affine)


def test_monai_loads_weights_and_torchscript(bundle):
    import monai.bundle

    network = monai.bundle.load(bundle.name, bundle_dir=str(bundle.parent), workflow_type="inference").eval()
    scripted, metadata, _ = monai.bundle.load(bundle.name, bundle_dir=str(bundle.parent), load_ts_module=True)
    windows = torch.randn(2, 2, 16, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(scripted(windows), network(windows))
    assert metadata["task"] == "Segmentation of tumour"
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in weights.values())


def test_monai_verifies_the_metadata(bundle, tmp_path):
    import monai.bundle

    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SPECIFICATION))
    metadata = bundle / "configs" / "metadata.json"
    own = {"filepath": str(schema), "hash_val": hashlib.md5(schema.read_bytes()).hexdigest()}
    monai.bundle.verify_metadata(meta_file=str(metadata), **own)
    damaged = json.loads(metadata.read_text())
    del damaged["network_data_format"]["outputs"]["pred"]["channel_def"]
    metadata.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="channel_def"):
        monai.bundle.verify_metadata(meta_file=str(metadata), **own)


def test_the_bundle_has_what_people_look_for(bundle):
    page = (bundle / "docs" / "README.md").read_text()
    assert "## Privacy" in page
    assert "monai.bundle run" in page
    assert "does not choose a licence" in (bundle / "LICENSE").read_text()
    text = "".join(path.read_text() for path in bundle.rglob("*.json"))
    assert "nowhere" not in text


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"intensity": "zscore"}, "NormalizeIntensityd"),
        ({"intensity": "percentile"}, "ScaleIntensityRangePercentilesd"),
        ({"intensity": "window", "window": (-100.0, 200.0)}, "ScaleIntensityRanged"),
        ({"spacing_mm": (2.0, 2.0, 2.0)}, "Spacingd"),
    ],
)
def test_preparation_is_the_packages_own(exported, images, changes, step):
    """MONAI's transforms of the bundle give the array that our preparation gives."""
    from monai.bundle import ConfigParser

    from medfl_ray.export.description import read_description

    description = read_description(exported)
    prepared = description.preprocessing.model_copy(update=changes)
    config = inference_config(description.model_copy(update={"preprocessing": prepared}))
    steps = config["preprocessing"]["transforms"]
    assert step in [entry["_target_"] for entry in steps]
    parser = ConfigParser(config)
    found = parser.get_parsed_content("preprocessing")({"image": str(images / "case.nii.gz")})["image"]
    expected = prepared.prepare(read_volume(images / "case.nii.gz")).image
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4)


def test_what_is_refused(make_run, exported, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="'full' holds files"):
        write_bundle(exported, tmp_path / "full")
    from medfl_ray.export.description import DESCRIPTION, read_description

    classifier = read_description(exported).model_copy(update={"task": "classification"})
    (exported / DESCRIPTION).write_text(classifier.model_dump_json())
    with pytest.raises(ExportError, match="classifier"):
        write_bundle(exported, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_metadata_name_channels_and_classes(exported):
    from medfl_ray.export.description import read_description

    form = bundle_metadata(read_description(exported))["network_data_format"]
    assert form["inputs"]["image"]["channel_def"] == {"0": "T1c", "1": "FLAIR"}
    assert form["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "tumour"}


@pytest.mark.ci
@pytest.mark.parametrize("network", [[], ["--network", "$torch.jit.load('models/model.ts')"]])
def test_the_command_of_the_readme(bundle, images, tmp_path, network):
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--dataset_dir",
        str(images), "--output_dir", str(tmp_path / "masks"), *network,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "masks" / "case_mask.nii.gz").is_file()
