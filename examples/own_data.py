# %% [markdown]
# # Train on your own data
#
# Two hospitals with a folder of images each, and differential privacy with a budget of their own. Give two folders with
# images and labels; without them the script renders synthetic heads, as `medfl-ray data make` does. Run it from the
# checkout's root: `python examples/own_data.py [NORTH SOUTH] [--fast]`.

# %%
import sys
from pathlib import Path
from tempfile import mkdtemp

from actors.train import drive
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.inspection import inspect_folder
from medfl_ray.data.phantoms.write_layout import phantom_set, write_phantoms
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

FAST = "--fast" in sys.argv
work = Path(mkdtemp(prefix="medfl-own-data-"))
given = [Path(word).absolute() for word in sys.argv[1:] if Path(word).is_dir()]
# DataKind in public and rounded, never counted from private files.
NUM_PATIENTS = 8 if FAST else 60
ROUNDS, PATCH = (2 if FAST else 10), (32 if given else 16)
LABELS = {1: "core", 2: "oedema"}  # a manifest does not name the values in its masks

# %% [markdown]
# The stand-in for your images: heads of 16 voxels with a tumour, as NIfTI files with a `manifest.csv` that names
# patient, image and label. A folder in the layout of nnU-Net or of the Decathlon, or of DICOM series, does as well.


# %%
def render(folder, seed):
    heads = phantom_set(
        "brain_tumour",
        num_hospitals=1,
        num_patients=NUM_PATIENTS,
        size_voxels=16,
        seed=seed,
        file_format="nifti",
        layout="manifest",
    )
    for _ in write_phantoms(folder, heads):
        pass
    return folder


folders = given[:2] if len(given) >= 2 else [render(work / name, seed) for seed, name in enumerate(("north", "south"))]

# %% [markdown]
# Look before you train: what was found, and what is wrong with it.

# %%
found = inspect_folder(folders[0], labels=None if given else LABELS)
print(f"north: {found.num_patients} patients; {'; '.join(found.problems) or 'nothing is wrong'}")

# %% [markdown]
# The same as a YAML file for `medfl-ray run`. `max_epsilon` is the budget of the data set over all runs. `pool: local`
# keeps both hospitals in this process; without it each has a process of its own on Ray.

# %%
hospitals = [
    {"id": name, "directory": str(folder), "num_patients": NUM_PATIENTS, "max_epsilon": 40}
    for name, folder in zip(("north", "south"), folders, strict=True)
]
run = parse_run_config(
    {
        "name": "own-data",
        "data": {
            "hospitals": hospitals,
            "name": "heads",
            "labels": found.labels or LABELS,
            "channels": list(found.index.channels),
        },
        "model": {"type": "unet3d", "features": [4, 8]},
        "training": {"learning_rate": 0.01, "optimizer": "adam", "patch_size_voxels": PATCH},
        "federation": {"rounds": ROUNDS, "local_steps": 3, "min_clients": 2, "pool": "local"},
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
