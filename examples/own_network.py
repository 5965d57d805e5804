# %% [markdown]
# # Bring your own network
#
# A function that returns a `torch.nn.Module` is all that is needed. It passes through the same door as the catalogue's
# networks: one that couples patients, as batch norm does, is refused for training under differential privacy. Run it
# from the checkout's root: `python examples/own_network.py [--fast]`; for `medfl-ray run`, put the folder of your
# module on PYTHONPATH.

# %%
import sys
from pathlib import Path
from tempfile import mkdtemp

from actors.train import drive
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.errors import NotFitForDP
from medfl_ray.models.catalogue import build_network
from medfl_ray.store.run.folder import RunFolder

FAST = "--fast" in sys.argv
work = Path(mkdtemp(prefix="medfl-own-network-"))

# %% [markdown]
# The module, as you would keep it beside your configuration.

# %%
SOURCE = '''
from torch import nn


def plain(spatial_dims, in_channels, out_channels):
    """A few convolutions with group norm, which looks at one patient at a time."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, out_channels, 1),
    )


def coupled(spatial_dims, in_channels, out_channels):
    """Batch norm mixes the patients of a batch."""
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, out_channels, 1))
'''
(work / "my_networks.py").write_text(SOURCE)
sys.path.insert(0, str(work))

# %%
raw = {
    "name": "own-network",
    "data": {
        "phantom": {"preset": "balls", "num_hospitals": 3, "patients_per_hospital": 12, "size_voxels": 32, "seed": 3},
        "name": "balls",
        "spatial_dims": 2,
    },
    "model": {"type": "custom", "factory": "my_networks:plain", "spatial_dims": 2},
    "training": {"learning_rate": 0.01, "optimizer": "adam", "patch_size_voxels": 32},
    "federation": {"rounds": 2 if FAST else 10, "local_epochs": 1, "pool": "local"},
    "privacy": {"enable_dp": True, "epsilon": 8, "max_grad_norm": 0.5, "sample_rate": 0.5},
    "output": {"directory": str(work / "runs"), "report": False, "export": False},
}
run = parse_run_config(raw)

# %% [markdown]
# Whether a network is fit for differential privacy is found out before anything is trained.

# %%
coupled = run.model.model_copy(update={"factory": "my_networks:coupled"})
try:
    build_network(coupled, 2, 1, 2, True, (32, 32))
except NotFitForDP as refusal:
    print(f"refused: {refusal}")

# %%
folder = RunFolder.create(run)
with folder.locked():
    outcome = drive(run, tuple(list_hospitals(run)), folder.path, lambda event: None)
print(outcome.reason)
