# %% [markdown]
# # Bring your own strategy
#
# A strategy is a pair of pure functions: `init(size)` gives the server's state, `apply(state, weights, mean_update)`
# the next state and weights. It sees the mean update and nothing of a single hospital, so that it costs no epsilon.
# Run it from the checkout's root: `python examples/own_strategy.py [--fast]`; for `medfl-ray run`, put the folder of
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
work = Path(mkdtemp(prefix="medfl-own-strategy-"))

# %% [markdown]
# Here: server momentum in the manner of Nesterov. The state is an array of float32 per name; checkpoints keep it, so
# that a resumed run goes on with the same momentum.

# %%
SOURCE = """
import numpy as np

from medfl_ray.aggregation.strategies import Strategy


def nesterov(config):
    beta, rate = np.float32(config.server_momentum), np.float32(config.server_learning_rate)

    def init(size):
        return {"velocity": np.zeros(size, dtype=np.float32)}

    def apply(state, weights, mean_update):
        velocity = beta * state["velocity"] + mean_update
        return {"velocity": velocity}, weights + rate * (mean_update + beta * velocity)

    return Strategy(init, apply)
"""
(work / "my_strategies.py").write_text(SOURCE)
sys.path.insert(0, str(work))

# %%
raw = {
    "name": "own-strategy",
    "data": {
        "phantom": {"preset": "balls", "num_hospitals": 3, "patients_per_hospital": 12, "size_voxels": 32, "seed": 3},
        "name": "balls",
        "spatial_dims": 2,
    },
    "model": {"type": "unet2d", "features": [4, 8]},
    "training": {"learning_rate": 0.02, "patch_size_voxels": 32},
    "federation": {"rounds": 2 if FAST else 10, "local_epochs": 1, "pool": "local"},
    "privacy": {"enable_dp": False},
    "aggregation": {
        "strategy": "custom",
        "factory": "my_strategies:nesterov",
        "server_momentum": 0.5,
        "server_learning_rate": 0.7,
    },
    "output": {"directory": str(work / "runs"), "report": False, "export": False},
}
run = parse_run_config(raw)

# %% [markdown]
# Beside it, the same run with plain averaging.


# %%
def train(run):
    folder = RunFolder.create(run)
    with folder.locked():
        drive(run, tuple(list_hospitals(run)), folder.path, lambda event: None)
    figures = [metrics["dice"].value for metrics in folder.results()[-1].metrics.values() if "dice" in metrics]
    return sum(figures) / len(figures)


averaging = parse_run_config({**raw, "name": "averaging", "aggregation": {"strategy": "fedavg"}})
print(f"mean Dice with nesterov {train(run):.3f}, with fedavg {train(averaging):.3f}")
