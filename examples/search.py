# %% [markdown]
# # Search for a configuration
#
# How much Dice is there for how much epsilon? A search trains small federations on synthetic hospitals, draws what they
# show and writes the configuration that it recommends. `medfl-ray tune configs/search_demo.yaml` is a larger one. Run
# it from the checkout's root: `python examples/search.py [--fast]`.

# %%
import sys
from pathlib import Path
from tempfile import mkdtemp

import yaml

from actors.cluster import connect, disconnect
from tune.report import epsilon_needed, write_report
from tune.search import create_search, run_search, write_recommendation
from tune.space import load_search

FAST = "--fast" in sys.argv
work = Path(mkdtemp(prefix="medfl-search-"))

# %% [markdown]
# The final run, as a file for `medfl-ray run`. Trials are runs like it.

# %%
run = {
    "name": "balls",
    "data": {
        "phantom": {"preset": "balls", "num_hospitals": 2, "patients_per_hospital": 60, "size_voxels": 32, "seed": 3},
        "name": "balls",
        "spatial_dims": 2,
    },
    "model": {"type": "unet2d", "features": [4, 8]},
    "training": {"learning_rate": 0.01, "optimizer": "adam", "patch_size_voxels": 32, "patient_gradients": "single"},
    "federation": {"rounds": 2 if FAST else 6, "local_steps": 4, "eval_every": 2},
    "privacy": {"enable_dp": True, "epsilon": 8, "max_grad_norm": 0.2, "sample_rate": 0.5},
}
(work / "run.yaml").write_text(yaml.safe_dump(run))

# %% [markdown]
# The search: what is varied between which bounds. On synthetic data its trials charge no hospital.

# %%
search = {
    "name": "balls",
    "run": "run.yaml",
    "space": {"epsilon": {"low": 2, "high": 30}, "learning_rate": {"low": 0.005, "high": 0.05}},
    "trials": 3 if FAST else 12,
    "stopping": "none",
    "directory": str(work / "searches"),
}
(work / "search.yaml").write_text(yaml.safe_dump(search))
prepared = create_search(load_search(work / "search.yaml"))
print(prepared.terms.words)


# %%
def show(trial):
    if trial.result is None:
        print(f"trial {trial.number} {trial.state}: {trial.reason}")
    else:
        print(f"trial {trial.number}: epsilon {trial.result.epsilon:.2f}, Dice {trial.result.dice:.3f}")


cluster = connect()
try:
    outcome = run_search(prepared, cluster.num_cpus, show)
finally:
    disconnect()

# %% [markdown]
# The report has the front of epsilon, Dice and traffic; the recommended configuration goes straight into a run.

# %%
print(f"report: {write_report(outcome)}")
print(f"recommended: medfl-ray run {write_recommendation(outcome)}")

# %% [markdown]
# What `medfl-ray privacy plan --search` says: the epsilon (patient-level, add/remove) that a Dice needs.

# %%
wanted = round(0.9 * outcome.best.dice, 2)
answer = epsilon_needed(prepared.folder, wanted)
print(f"for Dice >= {wanted} you need epsilon about {answer.epsilon:.2f} (patient, delta={answer.delta:g}, add/remove)")
