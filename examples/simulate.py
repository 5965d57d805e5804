# %% [markdown]
# # Simulate a federation
#
# Virtual hospitals that share the processes of one machine: to see what a thousand hospitals do, or what noise costs,
# before any real hospital is asked. Run it from the checkout's root: `python examples/simulate.py`; with `--fast` it is
# over in seconds.

# %%
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from actors.train import drive
from medfl_ray import load_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

FAST = "--fast" in sys.argv
SMALL = ("data.phantom.num_hospitals=20", "federation.rounds=3", "federation.fraction=0.5", "federation.eval_every=1")

# %% [markdown]
# The configuration is the one of `medfl-ray simulate configs/sim_1000.yaml`; any field can be set from here.

# %%
run = load_run_config(Path("configs/sim_1000.yaml"), ("federation.num_actors=2", *(SMALL if FAST else ())))
policies = tuple(list_hospitals(run))
print(f"{len(policies)} hospitals, {run.federation.rounds} rounds, {run.federation.fraction:.0%} of them in each")

# %% [markdown]
# Every event of the run is handed to a function of ours; the rounds are enough here.


# %%
def show(event):
    if event.type == "timing":
        print(f"round {event.round}: {event.num_hospitals} hospitals in {event.duration_s:.1f} s")


folder = RunFolder.create(run)
with folder.locked():
    outcome = drive(run, policies, folder.path, show)
print(outcome.reason)

# %% [markdown]
# What each round reached, from the run's folder: it is all there after the program has ended.


# %%
def mean_dice(result):
    figures = [metrics["dice"].value for metrics in result.metrics.values() if "dice" in metrics]
    return sum(figures) / len(figures)


evaluated = [result for result in folder.results() if any("dice" in m for m in result.metrics.values())]
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot([result.round for result in evaluated], [mean_dice(result) for result in evaluated], marker="o")
axes.set_xlabel("round")
axes.set_ylabel("mean Dice of the hospitals that evaluate")
figure.savefig(folder.path / "dice.png")
print(f"mean Dice {mean_dice(evaluated[-1]):.3f} after round {evaluated[-1].round}")
