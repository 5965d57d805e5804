# %% [markdown]
# # Train on your own data
#
# Two hospitals with a folder of images each, and differential privacy with a budget of their own. Here the images are
# rendered, so that the example runs anywhere; put your own folders in their place. Run it from the checkout's root:
# `python examples/own_data.py [--fast]`.

# %%
import sys
from pathlib import Path
from tempfile import mkdtemp

from actors.train import drive
from medfl_ray.config_files import parse_run_config
from medfl_ray.data.inspection import inspect_folder
from medfl_ray.data.phantoms.write_layout import phantom_set, write_phantoms
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run_folder import RunFolder

FAST = "--fast" in sys.argv
PATIENTS, ROUNDS = (8, 2) if FAST else (60, 10)
work = Path(mkdtemp(prefix="medfl-own-data-"))

# %% [markdown]
# The stand-in for your images: 16-voxel heads with a tumour, as NIfTI files with a `manifest.csv` that names patient,
# image and label. A folder in the layout of nnU-Net or of the Decathlon, or of DICOM series, does as well.

# %%
for seed, name in enumerate(("north", "south")):
    heads = phantom_set(
        "brain_tumour",
        num_hospitals=1,
        num_patients=PATIENTS,
        size_voxels=16,
        seed=seed,
        file_format="nifti",
        layout="manifest",
    )
    for _ in write_phantoms(work / name, heads):
        pass

# %% [markdown]
# Look before you train: what was found, and what is wrong with it.

# %%
found = inspect_folder(work / "north")
print(f"north: {found.num_patients} patients; {'; '.join(found.problems) or 'nothing is wrong'}")

# %% [markdown]
# The same as a YAML file for `medfl-ray run`. `num_patients` is public and rounded: it is declared, never counted from
# private files. `max_epsilon` is the budget of the data set over all runs.

# %%
hospitals = [
    {"id": name, "directory": str(work / name), "num_patients": PATIENTS, "max_epsilon": 40}
    for name in ("north", "south")
]
run = parse_run_config(
    {
        "name": "own-data",
        "data": {"hospitals": hospitals, "name": "heads", "labels": {1: "tumour"}, "channels": ["T1"]},
        "model": {"type": "unet3d", "features": [4, 8]},
        "training": {"learning_rate": 0.01, "optimizer": "adam", "patch_size_voxels": 16},
        "federation": {"rounds": ROUNDS, "local_steps": 3, "min_clients": 2},
        "privacy": {"enable_dp": True, "epsilon": 8, "max_grad_norm": 0.1, "sample_rate": 0.5},
        "output": {"directory": str(work / "runs"), "state_directory": str(work / "state")},
    }
)


# %%
def show(event):
    if event.type == "round":
        trained = len(event.result.receipt.trained)
        print(f"round {event.result.round}: {trained} hospitals trained, {event.result.duration_s:.1f} s")


folder = RunFolder.create(run)
with folder.locked():
    outcome = drive(run, tuple(list_hospitals(run)), folder.path, show)
print(outcome.reason)

# %% [markdown]
# What each hospital's patients have been charged (patient-level, add/remove adjacency).

# %%
for name, spent in folder.receipts()[-1].spent.items():
    print(f"{name}: epsilon {spent.epsilon:.2f} (patient-level, delta={spent.delta:g}, add/remove)")
