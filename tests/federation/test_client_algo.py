"""MonaiAlgo of a small bundle as two hospitals of a run: the round's mean is that of what MONAI itself trains."""

import json
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from pydantic import ValidationError
from safetensors.numpy import load_file

from medfl_ray.assembly.run import hospital_specs, initial_weights, local_pool, run_in_process
from medfl_ray.config.files import load_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import ConfigError, ModelError
from medfl_ray.params import Layout, to_tensors
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.training.rules.client_algo import AlgoTrainer, make_algo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]
NUM_PATIENTS = {"north": 4, "south": 2}
DATA = (
    "$[{'image': (torch.arange(512.).reshape(1, 8, 8, 8) + 100 * i) % 7, "
    "'label': ((torch.arange(512).reshape(1, 8, 8, 8) + i) % 7 > 3).float()} for i in range(@count)]"
)


def write_bundle(folder, count):
    (folder / "configs").mkdir(parents=True)
    loader = {"_target_": "DataLoader", "dataset": {"_target_": "Dataset", "data": "@data"}, "batch_size": 2}
    document = {
        "imports": ["$import torch"],
        "count": count,
        "bundle_root": ".",
        "dataset_dir": ".",
        "device": "$torch.device('cpu')",
        "network_def": {
            "_target_": "UNet",
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 2,
            "channels": [4, 8],
            "strides": [2],
        },
        "network": "$@network_def.to(@device)",
        "data": DATA,
        "loss": {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True},
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": 0.05},
        "train": {
            "trainer": {
                "_target_": "SupervisedTrainer",
                "max_epochs": 1,
                "device": "@device",
                "train_data_loader": loader,
                "network": "@network",
                "loss_function": "@loss",
                "optimizer": "@optimizer",
            }
        },
        "validate": {
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": loader,
                "network": "@network",
                "postprocessing": {
                    "_target_": "Compose",
                    "transforms": [
                        {"_target_": "AsDiscreted", "keys": ["pred", "label"], "argmax": [True, False], "to_onehot": 2}
                    ],
                },
                "key_val_metric": {
                    "val_mean_dice": {
                        "_target_": "MeanDice",
                        "include_background": False,
                        "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
                    }
                },
            }
        },
        "initialize": [],
        "run": [],
        "finalize": [],
    }
    (folder / "configs" / "train.json").write_text(json.dumps(document))
    return folder


def monai_algo(bundle):
    return MonaiAlgo(str(bundle), local_epochs=1, config_evaluate_filename=["configs/train.json"])


SOURCE = """
from pathlib import Path
from monai.fl.client import MonaiAlgo

def algo(hospital):
    folder = Path(__file__).parent / hospital
    return MonaiAlgo(str(folder), local_epochs=1, config_evaluate_filename=["configs/train.json"])

def nothing(hospital):
    return hospital
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    for hospital, count in NUM_PATIENTS.items():
        write_bundle(tmp_path / hospital, count)
    (tmp_path / "client_algos_of_a_test.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("client_algos_of_a_test", None)
    return "client_algos_of_a_test"


def run_of(tmp_path, module, **sections):
    raw = {
        "name": "algos",
        "data": {
            "hospitals": [{"id": name, "num_patients": count} for name, count in NUM_PATIENTS.items()],
            "declared": "synthetic",
            "labels": {1: "stripes"},
            "channels": ["image"],
        },
        "model": {"type": "bundle", "bundle": str(tmp_path / "north")},
        "training": {"client_algo": f"{module}:algo", "batch_size": 2, "patch_size_voxels": 8},
        "federation": {"rounds": 1, "local_epochs": 1, "pool": "local", "seed": 5, "min_clients": 2},
        "privacy": {"enable_dp": False},
        "output": {"directory": str(tmp_path / "runs"), "report": False, "export": False},
    }
    for section, values in sections.items():
        raw[section] = {**raw[section], **values}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load_run_config(file)


def finished(run):
    policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
    pool = local_pool(hospital_specs(run, policies, folder.path))
    outcome = run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    return outcome, folder


def test_two_of_them_make_the_mean_of_what_monai_trains(tmp_path, module):
    run = run_of(tmp_path, module)
    outcome, folder = finished(run)
    assert outcome.completed, folder.results()[0].receipt
    layout, first = initial_weights(run)(1, 2)
    total = np.zeros(layout.size)
    for hospital, count in NUM_PATIENTS.items():
        algo = monai_algo(tmp_path / hospital)
        algo.initialize({ExtraItems.CLIENT_NAME: hospital})
        named = {name: torch.from_numpy(part.copy()) for name, part in to_tensors(first, layout).items()}
        algo.train(ExchangeObject(weights=named, weight_type=WeightType.WEIGHTS))
        change = algo.get_weights().weights
        total += count * np.concatenate([np.asarray(change[name]).ravel() for name in layout.names])
    found = load_file(folder.path / "model.safetensors")
    weights = np.concatenate([found[name].ravel() for name in layout.names])
    assert np.abs(weights - first).max() > 1e-4
    np.testing.assert_allclose(weights, first + total / 6, atol=1e-6)
    metrics = folder.results()[0].metrics
    assert set(metrics) == set(NUM_PATIENTS)
    assert all(0 <= one["dice"].value <= 1 for one in metrics.values())
    assert metrics["north"]["dice"].value == metrics["north"]["val_mean_dice"].value


@pytest.mark.ci
def test_another_number_of_steps_than_the_plans_is_refused_with_the_number(tmp_path, module):
    outcome, folder = finished(run_of(tmp_path, module, federation={"local_steps": 7, "local_epochs": None}))
    assert not outcome.completed
    reasons = [failure.reason for failure in folder.results()[0].receipt.failures]
    assert any("took 2 steps; the plan asks for 7" in reason for reason in reasons)


def test_what_does_not_go_with_it_is_refused(tmp_path, module):
    run = run_of(tmp_path, module).model_dump()
    private = {"enable_dp": True, "noise_multiplier": 1.0}
    for section, values, said in (
        ("privacy", private, "not ours to bound"),
        ("federation", {"pool": "virtual"}, "a process per hospital"),
        ("aggregation", {"strategy": "scaffold"}, "asks for more than weights"),
        ("data", {"labels": {}}, "must be named"),
    ):
        with pytest.raises(ValidationError, match=said):
            RunConfig.model_validate({**run, section: {**run[section], **values}})
    for factory, said in (("no_module:f", "cannot be imported"), (f"{module}:nothing", "returned a str")):
        with pytest.raises(ConfigError, match=said):
            make_algo(factory, "north")


class Stub:
    """A ClientAlgo's answers, to look at what the adapter makes of them."""

    def __init__(self, weights, kind, metrics=None):
        self._answer = ExchangeObject(weights=weights, weight_type=kind, metrics=metrics)

    def train(self, data):
        self.given = data

    def get_weights(self):
        return self._answer

    def evaluate(self, data):
        return self._answer


def adapter(stub):
    made = AlgoTrainer.__new__(AlgoTrainer)
    made.layout, made._algo = Layout(("a", "b"), ((2,), ())), stub
    return made


def test_weights_and_differences_are_told_apart_and_others_refused():
    start, job = np.array([1, 2, 3], np.float32), SimpleNamespace(num_steps=4, mechanism=None)
    named = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor(5.0)}
    assert adapter(Stub(named, WeightType.WEIGHTS)).train(start, None, job).delta.tolist() == [1, 0, 2]
    assert adapter(Stub(named, WeightType.WEIGHT_DIFF)).train(start, None, job).delta.tolist() == [2, 2, 5]
    for wrong in ({"a": named["a"]}, {"a": torch.zeros(3), "b": named["b"]}, None):
        with pytest.raises(ModelError, match="its network must be the run's"):
            adapter(Stub(wrong, WeightType.WEIGHTS)).train(start, None, job)
    broken = {"a": torch.tensor([2.0, float("nan")]), "b": torch.tensor(5.0)}
    with pytest.raises(ModelError, match="no numbers"):
        adapter(Stub(broken, WeightType.WEIGHTS)).train(start, None, job)
