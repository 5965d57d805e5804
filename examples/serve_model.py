# %% [markdown]
# # Serve a model
#
# A run's exported model behind an address that asks for a token: the Open Inference Protocol for programs, and a volume
# in, a mask out for people. `medfl-ray deploy` does the same from the command line. Run it from the checkout's root:
# `python examples/serve_model.py [RUN]`; without the folder of a run it trains a small one first.

# %%
import socket
import sys
from pathlib import Path
from tempfile import mkdtemp

import httpx
import nibabel as nib
import numpy as np

from actors.train import drive
from medfl_ray.config.files import parse_run_config
from medfl_ray.data.sources import list_hospitals
from medfl_ray.export.description import read_description
from medfl_ray.export.onnx_export import export_run
from medfl_ray.store.run.folder import RunFolder
from serve.auth import add_token
from serve.launcher import served
from serve.settings import ServeSettings

work = Path(mkdtemp(prefix="medfl-serve-"))
runs = [Path(word) for word in sys.argv[1:] if (Path(word) / "model.onnx").exists()]

# %%
if not runs:
    run = parse_run_config(
        {
            "name": "heads",
            "data": {"phantom": {"num_hospitals": 2, "patients_per_hospital": 6, "size_voxels": 16, "seed": 3}},
            "model": {"type": "unet3d", "features": [4, 8]},
            "training": {"learning_rate": 0.01, "optimizer": "adam", "patch_size_voxels": 16},
            "federation": {"rounds": 2, "local_steps": 2, "pool": "local"},
            "privacy": {"enable_dp": False},
            "output": {"directory": str(work / "runs")},
        }
    )
    folder = RunFolder.create(run)
    with folder.locked():
        drive(run, tuple(list_hospitals(run)), folder.path, lambda event: None)
    export_run(folder.path)
    runs = [folder.path]

# %% [markdown]
# Only the SHA-256 of a token is kept. The service is Ray Serve on a cluster of its own, on loopback; `served` ends
# both.

# %%
token = add_token(work / "tokens.json", "example")
settings = ServeSettings(models=runs[0], tokens=work / "tokens.json")
scan = work / "scan.nii.gz"
num_channels = read_description(runs[0]).num_channels  # several sequences lie on the last axis
image = np.random.default_rng(0).normal(size=(40, 40, 40, num_channels)).squeeze(-1 if num_channels == 1 else ())
nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), scan)

# %%
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
with served(settings, port=port) as url:
    stranger = httpx.get(f"{url}/v2/models")
    print(f"without a token: HTTP {stranger.status_code}")
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=120) as client:
        name = client.get("/v2/models").json()["models"][0]["name"]
        answer = client.post(f"/v2/models/{name}/segment", content=scan.read_bytes())
        answer.raise_for_status()

# %%
(work / "mask.nii.gz").write_bytes(answer.content)
mask = np.asarray(nib.load(work / "mask.nii.gz").dataobj)
print(f"{name}: a mask of shape {mask.shape} with labels {sorted(np.unique(mask).tolist())}")
