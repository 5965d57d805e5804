"""A cluster with its dashboard: loopback only, refuses whoever has no token, runs, stops and resumes jobs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from small_runs import small_run

from medfl_ray.config_files import dump_yaml

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]
PROCESS = Path(__file__).parent / "guarded_cluster.py"
RAY = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SHORT = [
    "--set",
    "data.phantom.patients_per_hospital=8",
    "--set",
    "federation.local_steps=1",
    "--set",
    "federation.baselines=[]",
    "--set",
    "privacy.epsilon=40",
    "--set",
    "output.report=false",
    "--set",
    "output.register_model=false",
    "--set",
    "output.export=false",
    "--actors",
    "2",
]


@pytest.fixture(scope="module")
def guarded():
    """Where a cluster of our own with a dashboard listens."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, str(PROCESS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        where = json.loads(process.stdout.readline())
        yield {**where, "process": process.pid}
        process.stdin.close()
        assert process.wait(60) == 0


def with_token(guarded, token=None):
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or guarded["token"], "RAY_ADDRESS": ""}


def job(guarded, *words, token=None, timeout=240):
    verb, *rest = words
    command = [*RAY, "job", verb, "--address", guarded["dashboard"], *rest]
    return subprocess.run(
        command, env=with_token(guarded, token), capture_output=True, text=True, timeout=timeout, check=False
    )


def test_everything_listens_on_loopback_the_metrics_port_included(guarded):
    listening = [
        connection.laddr
        for process in psutil.Process(guarded["process"]).children(recursive=True)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    ports = {address.port for address in listening}
    assert {address.ip for address in listening} <= LOOPBACK
    assert {guarded["metrics_port"], int(guarded["gcs"].rpartition(":")[2])} <= ports
    assert int(guarded["dashboard"].rpartition(":")[2]) in ports


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("GET", "/api/version"),
        ("GET", "/nodes?view=summary"),
        ("GET", "/api/v0/actors"),
        ("GET", "/api/v0/logs"),
        ("GET", "/api/cluster_status"),
        ("GET", "/api/serve/applications/"),
        ("PUT", "/api/serve/applications/"),
        ("GET", "/api/data/datasets"),
    ],
)
def test_the_dashboards_routes_refuse_without_the_token(guarded, method, path):
    anyone = httpx.request(method, guarded["dashboard"] + path, json={"entrypoint": "true"})
    assert anyone.status_code == 401, anyone.text
    stranger = httpx.request(
        method,
        guarded["dashboard"] + path,
        headers={"Authorization": f"Bearer {'0' * 64}"},
        json={"entrypoint": "true"},
    )
    assert stranger.status_code == 403, stranger.text
    assert guarded["token"] not in anyone.text + stranger.text


def test_with_the_token_they_answer(guarded):
    headers = {"Authorization": f"Bearer {guarded['token']}"}
    assert httpx.get(guarded["dashboard"] + "/api/jobs/", headers=headers).json() == []


def test_the_client_port_refuses_without_the_token(guarded):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = [
        sys.executable,
        "-m",
        "ray.util.client.server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--address",
        guarded["gcs"],
    ]
    script = f"import ray; ray.init('ray://127.0.0.1:{port}', logging_level=50); print(ray.cluster_resources()['CPU'])"

    def join(token):
        environment = with_token(guarded, token)
        return subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    with subprocess.Popen(server, env=with_token(guarded), stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: port in listening_ports(process.pid))
            assert join(guarded["token"]).stdout.strip() == "2.0"
            stranger = join("0" * 64)
            assert stranger.returncode != 0
            assert "2.0" not in stranger.stdout
            assert "token" in stranger.stderr.lower()
        finally:
            process.terminate()


def listening_ports(process_id):
    connections = psutil.Process(process_id).net_connections(kind="tcp")
    return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}


def wait_until(is_so, within_s=120, every_s=0.3):
    ends = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(every_s)


@pytest.fixture
def clean_folder(tmp_path):
    """A folder with the demo's configuration in it, and nothing else."""
    folder = tmp_path / "clean"
    folder.mkdir()
    shutil.copy(ROOT / "configs" / "demo.yaml", folder)
    return folder


def test_a_job_from_a_clean_folder_runs_the_demo(guarded, clean_folder, tmp_path):
    runs = tmp_path / "runs"
    arguments = ["--set", "federation.rounds=2", *SHORT, "--set", f"output.directory={runs}"]
    done = job(
        guarded,
        "submit",
        "--submission-id",
        "demo",
        "--working-dir",
        str(clean_folder),
        "--",
        "medfl-ray",
        "run",
        "demo.yaml",
        *arguments,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "all 2 rounds were published." in done.stdout
    assert "round 2/2" in job(guarded, "logs", "demo").stdout
    assert "SUCCEEDED" in job(guarded, "status", "demo").stdout + job(guarded, "status", "demo").stderr
    assert len(list(runs.glob("*/receipts.jsonl"))) == 1
    assert sorted(path.name for path in clean_folder.iterdir()) == ["demo.yaml"]


def test_a_stopped_job_resumes(guarded, clean_folder, tmp_path):
    runs = tmp_path / "runs"
    arguments = ["--set", "federation.rounds=6", *SHORT, "--set", f"output.directory={runs}"]
    job(
        guarded,
        "submit",
        "--no-wait",
        "--submission-id",
        "long",
        "--working-dir",
        str(clean_folder),
        "--",
        "medfl-ray",
        "run",
        "demo.yaml",
        *arguments,
    )
    wait_until(lambda: "round 2/6" in job(guarded, "logs", "long").stdout)
    assert job(guarded, "stop", "long").returncode == 0
    status = job(guarded, "status", "long")
    assert "STOPPED" in status.stdout + status.stderr
    (folder,) = runs.iterdir()
    published = len((folder / "receipts.jsonl").read_text().splitlines())
    assert 2 <= published < 6
    done = job(guarded, "submit", "--submission-id", "again", "--", "medfl-ray", "run", "--resume", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "all 6 rounds were published." in done.stdout
    receipts = [json.loads(line) for line in (folder / "receipts.jsonl").read_text().splitlines()]
    assert [receipt["round"] for receipt in receipts if receipt["published"]] == [1, 2, 3, 4, 5, 6]


HOWTO = ROOT / "docs" / "howto" / "cluster.md"
BLOCK = re.compile(r"^<!-- (test|not tested): ([^>]+) -->\n```sh\n(.*?)```$", re.MULTILINE | re.DOTALL)


def commands(kind):
    """Return the lines of the how-to's blocks of one kind, in order."""
    return [
        line
        for mark, what, body in BLOCK.findall(HOWTO.read_text())
        if (mark, what) == ("test", kind)
        for line in body.splitlines()
    ]


def shell(line, folder, home, guarded=None):
    """Run a line of the how-to as it stands, in a clean folder and with a home of its own."""
    line = line.replace("http://127.0.0.1:8265", guarded["dashboard"] if guarded else "")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    script = f"set -e\n{line}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture
def home(tmp_path, guarded):
    """A user's home with the cluster's token, and ray and medfl-ray on the path."""
    (tmp_path / "bin").mkdir()
    for name, module in (("ray", "ray.scripts.scripts"), ("medfl-ray", "medfl_ray.cli.main")):
        script = tmp_path / "bin" / name
        script.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    secrets = tmp_path / "medfl" / "deploy" / "ray" / "secrets"
    secrets.mkdir(parents=True)
    (secrets / "auth_token").write_text(guarded["token"])
    return tmp_path


def write_run(folder, rounds=2):
    run = small_run(
        name="demo",
        federation={"pool": "ray", "rounds": rounds},
        output={"report": False, "export": False, "register_model": False},
    )
    (folder / "run.yaml").write_text(dump_yaml(run))


def test_the_howtos_commands_for_the_laptop_run_as_they_stand(home, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    write_run(folder)
    lines = commands("laptop")
    assert len(lines) == 2
    for line in lines:
        done = shell(line, folder, home)
        assert done.returncode == 0, done.stderr
        assert "all 2 rounds were published" in done.stdout
    one, other = ((run / "receipts.jsonl").read_text().splitlines()[-1] for run in sorted(folder.glob("runs/*")))
    assert json.loads(one)["weights_after"] == json.loads(other)["weights_after"]


def test_the_howtos_commands_for_jobs_run_as_they_stand(guarded, home, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    write_run(folder)
    export, submit, logs, status, again, stop, resume = commands("job")

    def typed(line):
        return shell(f"{export}\n{line}", folder, home, guarded)

    # The cluster's home is not the user's; on a real one, ~ in the entrypoint is the head's own.
    stays = f"output.directory={tmp_path}/runs"
    here = [line.replace("output.directory=~/medfl/runs", stays) for line in (submit, again)]
    assert all(stays in line for line in here)
    assert "all 2 rounds were published." in typed(here[0]).stdout
    assert "round 2/2" in typed(logs).stdout
    said = typed(status)
    assert "SUCCEEDED" in said.stdout + said.stderr
    before = set((tmp_path / "runs").iterdir())
    assert typed(here[1]).returncode == 0
    wait_until(lambda: "round 1/6" in typed(logs.replace("first", "second")).stdout)
    assert typed(stop).returncode == 0
    (stopped,) = set((tmp_path / "runs").iterdir()) - before
    done = typed(resume.replace("~/medfl/runs/<folder>", str(stopped)))
    assert "all 6 rounds were published." in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_without_the_token_no_job_is_taken(guarded):
    done = job(guarded, "submit", "--", "true", token="0" * 64)
    assert done.returncode != 0
