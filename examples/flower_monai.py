# %% [markdown]
# # A Flower ClientApp on MONAI data, as the hospitals of a run
#
# Code that was written for Flower need not be written again. Here a plain ClientApp trains a MONAI network on MONAI's
# own test images, in the manner of Flower's quickstart; medfl-ray runs the rounds, with its checkpoints and receipts.
# Run it from the checkout's root: `python examples/flower_monai.py [--fast]`; for `medfl-ray run`, put the folder of
# your module on PYTHONPATH.

# %%
import sys
from pathlib import Path
from tempfile import mkdtemp

from actors.train import drive
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

FAST = "--fast" in sys.argv
work = Path(mkdtemp(prefix="medfl-flower-monai-"))

# %% [markdown]
# The Flower side: network, data of a partition, and what the app does with a message. `algo` says how a hospital of
# the run gets its app.

# %%
SOURCE = """
import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from monai.data import DataLoader, Dataset, create_test_image_2d
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from monai.utils import set_determinism

from actors.flower.app import algo_of

HOSPITALS = ("north", "south")


def network(spatial_dims, in_channels, out_channels):
    return UNet(spatial_dims, in_channels, out_channels, channels=(8, 16), strides=(2,))


def load_data(partition_id):
    draw = np.random.RandomState(partition_id)
    pairs = [create_test_image_2d(32, 32, num_objs=4, rad_max=8, num_seg_classes=1, random_state=draw, channel_dim=0)
             for _ in range(12)]
    cases = [{"image": np.float32(image), "label": np.float32(label)} for image, label in pairs]
    return DataLoader(Dataset(cases[:8]), batch_size=4), DataLoader(Dataset(cases[8:]), batch_size=4)


app = ClientApp()


@app.train()
def train(message, context):
    set_determinism(0)
    model = network(2, 1, 2)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    batches, _ = load_data(context.node_config["partition-id"])
    optimizer = torch.optim.Adam(model.parameters(), lr=context.run_config["lr"])
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    for _ in range(context.run_config["epochs"]):
        for batch in batches:
            optimizer.zero_grad()
            loss = loss_of(model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(batches.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    model = network(2, 1, 2).eval()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, batches = load_data(context.node_config["partition-id"])
    dice = DiceMetric(include_background=False)
    with torch.no_grad():
        for batch in batches:
            dice(one_hot(model(batch["image"]).argmax(1, keepdim=True), 2), one_hot(batch["label"], 2))
    metrics = MetricRecord({"dice": float(dice.aggregate()), "num-examples": len(batches.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def algo(hospital):
    return algo_of(app, hospital, HOSPITALS.index(hospital), len(HOSPITALS), {"lr": 0.01, "epochs": 2})
"""
(work / "my_flower_app.py").write_text(SOURCE)
sys.path.insert(0, str(work))

# %% [markdown]
# The run: who takes part, and the network whose weights travel. The data stay the app's own.

# %%
raw = {
    "name": "flower-monai",
    "data": {
        "hospitals": [{"id": "north", "num_patients": 8}, {"id": "south", "num_patients": 8}],
        "declared": "synthetic",
        "labels": {1: "circles"},
        "channels": ["image"],
        "spatial_dims": 2,
    },
    "model": {"type": "custom", "factory": "my_flower_app:network", "size_divisor": 2},
    "training": {"client_algo": "my_flower_app:algo", "patch_size_voxels": 32},
    "federation": {"rounds": 2 if FAST else 10, "local_steps": 4, "pool": "local"},
    "privacy": {"enable_dp": False},
    "output": {"directory": str(work / "runs"), "report": False, "export": False},
}
run = parse_run_config(raw)
folder = RunFolder.create(run)
with folder.locked():
    outcome = drive(run, tuple(list_hospitals(run)), folder.path, lambda event: None)

# %%
print(outcome.reason)
for result in folder.results():
    dice = {hospital: metrics["dice"].value for hospital, metrics in result.metrics.items()}
    print(f"round {result.round}: " + ", ".join(f"{hospital} Dice {value:.3f}" for hospital, value in dice.items()))
