"""`flwr run` with Flower's own processes on loopback: the weights are those of one process, bit for bit."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import flwr
import psutil
import pytest
import yaml
from safetensors.numpy import load_file
from small_runs import small_run

from actors.cluster_secrets import make_node, make_secrets
from medfl_ray.assembly.run import hospital_specs, local_pool, run_in_process
from medfl_ray.data.sources import list_hospitals
from medfl_ray.store.run.folder import RunFolder

pytestmark = [pytest.mark.ci, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
LIMIT_S = 1200


def small(tmp_path, num_hospitals):
    phantom = {"num_hospitals": num_hospitals, "patients_per_hospital": 4, "size_voxels": 16, "seed": 3}
    output = {"directory": tmp_path / "runs", "report": False, "export": False}
    run = small_run(data={"phantom": phantom}, output=output, federation={"rounds": 1, "min_clients": num_hospitals})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_defaults=True)))
    return run, file


def weights_alone(run, tmp_path):
    run = run.model_copy(update={"output": run.output.model_copy(update={"directory": tmp_path / "alone"})})
    policies, folder = tuple(list_hospitals(run)), RunFolder.create(run)
    pool = local_pool(hospital_specs(run, policies, folder.path))
    run_in_process(run, policies, folder.path, pool, lambda event: None, threading.Event())
    return load_file(folder.path / "model.safetensors")


def environment(tmp_path):
    """Return what Flower's processes run in: our sources, a home of their own, and nothing told to anybody."""
    scripts = Path(flwr.__file__).parents[4] / "bin"
    path = os.pathsep.join([str(Path(sys.executable).parent), str(scripts), os.environ["PATH"]])
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "MEDFL_STATE_DIR": str(tmp_path / "state"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def process(command, env, log):
    """Run a command of Flower's until the block ends; it and all that it started are ended by their process ids."""
    program = shutil.which(command[0], path=env["PATH"])
    assert program, f"{command[0]} is not installed"
    with log.open("w") as out:
        started = subprocess.Popen([program, *command[1:]], env=env, stdout=out, stderr=out)
        try:
            yield started
        finally:
            family = [*psutil.Process(started.pid).children(recursive=True)] if started.poll() is None else []
            started.terminate()
            _, alive = psutil.wait_procs([psutil.Process(started.pid)] if started.poll() is None else [], timeout=30)
            _, left = psutil.wait_procs(family, timeout=10)
            for one in [*alive, *left]:
                one.kill()
            started.wait(30)


def wait_for(port, superlink, log):
    ends = time.monotonic() + 180
    while time.monotonic() < ends and superlink.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def flwr_run(tmp_path, env, port, connection, settings, *options):
    home = tmp_path / "flower"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\n{connection}\n'
    )
    app = shutil.copytree(ROOT / "examples" / "flower", tmp_path / "app", dirs_exist_ok=True)
    program = shutil.which("flwr", path=env["PATH"])
    command = [program, "run", str(app), "test", "--stream", "--run-config", settings, *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)


def finished_weights(run, said):
    folders = sorted(Path(run.output.directory).glob("*")) if Path(run.output.directory).is_dir() else []
    assert len(folders) == 1, said
    ends = time.monotonic() + 60
    while not (folders[0] / "model.safetensors").is_file() and time.monotonic() < ends:
        time.sleep(1)
    assert (folders[0] / "model.safetensors").is_file(), said
    return load_file(folders[0] / "model.safetensors"), RunFolder.open(folders[0])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_supernodes_over_tls_give_the_weights_of_one_process(tmp_path):
    run, file = small(tmp_path, 3)
    make_secrets(tmp_path / "ca")
    make_node(tmp_path / "ca", tmp_path / "tls", ["127.0.0.1"])
    authority, certificate, key = (
        tmp_path / "ca" / "ca.pem",
        tmp_path / "tls" / "node.pem",
        tmp_path / "tls" / "node_key.pem",
    )
    env, port = environment(tmp_path), free_port()
    tls = ["--ssl-ca-certfile", str(authority), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    log = tmp_path / "superlink.log"
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port), *tls]
    with process([*command, "--disable-runtime-dependency-installation"], env, log) as superlink:
        wait_for(port, superlink, log)
        nodes, logs = [], []
        for policy in list_hospitals(run):
            config = f'hospital="{policy.hospital}" run="{file}"'
            own = ["--host", "127.0.0.1", "--port", str(free_port()), *tls]
            link = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", str(authority)]
            logs.append(tmp_path / f"{policy.hospital}.log")
            nodes.append(process(["flower-supernode", *link, *own, "--node-config", config], env, logs[-1]))
        with nodes[0], nodes[1], nodes[2]:
            done = flwr_run(tmp_path, env, port, f'root-certificates = "{authority}"', f'run="{file}" wait-s=600.0')
            said = done.stdout + done.stderr + "".join(one.read_text()[-2000:] for one in [log, *logs])
            found, folder = finished_weights(run, said)
    assert_same(found, weights_alone(run, tmp_path))
    assert len(folder.results()[0].receipt.trained) == 3
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.long
def test_flowers_simulation_gives_the_weights_of_one_process(tmp_path):
    run, file = small(tmp_path, 2)
    env, port, log = environment(tmp_path), free_port(), tmp_path / "superlink.log"
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    sizes = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=1"
    with process([*command, "--disable-runtime-dependency-installation"], env, log) as superlink:
        wait_for(port, superlink, log)
        done = flwr_run(
            tmp_path, env, port, "insecure = true", f'run="{file}" wait-s=300.0', "--federation-config", sizes
        )
        found, folder = finished_weights(run, done.stdout + done.stderr + log.read_text()[-3000:])
    assert_same(found, weights_alone(run, tmp_path))
    assert len(folder.results()[0].receipt.trained) == 2
