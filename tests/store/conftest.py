"""A hospital with its mirror, and servers for the registry's tests on loopback: PostgreSQL, and S3 as moto plays it."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from ledger_files import POLICIES, opened, rows_of, train
from warm import warm_parent

from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.run.mirror import RunMirror

PASSWORD = "only-for-tests"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def warm():
    """The parent of processes that use a ledger or a registry, in which everything that they import is imported."""
    modules = ["model_registry", "medfl_ray.store.registry", "medfl_ray.store.ledger", "sqlalchemy.dialects.sqlite",
               "dp_accounting.pld.pld_privacy_accountant"]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with warm_parent(modules, {**os.environ, "PYTHONPATH": path}) as parent:
        yield parent


def postgres_binary(name):
    """Return a server program: on the path, or where Debian keeps it."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return shutil.which(name) or (str(places[0]) if places else None)


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def unprivileged_user():
    """Return whom the server runs as: PostgreSQL refuses root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None)


def start_postgres(folder, user, port):
    """Make a cluster and start its server; return the process."""
    as_user = {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    secret = folder / "password"
    secret.write_text(PASSWORD)
    if user is not None:
        for path in (folder, secret):
            shutil.chown(path, user)
    made = subprocess.run(
        [postgres_binary("initdb"), "-D", str(folder / "data"), "-U", "medfl", "-A", "scram-sha-256",
         f"--pwfile={secret}", "-E", "UTF8", "--no-sync"],
        **as_user, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    settings = ["listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off"]
    options = [word for setting in settings for word in ("-c", setting)]
    with (folder / "log").open("wb") as log:
        command = [postgres_binary("postgres"), "-D", str(folder / "data"), *options]
        return subprocess.Popen(command, **as_user, cwd=folder, stdout=log, stderr=log)


@pytest.fixture(scope="session")
def postgres():
    """Return a function that makes an empty database and returns its URL."""
    if postgres_binary("initdb") is None or postgres_binary("postgres") is None:
        pytest.skip("PostgreSQL's server programs (initdb, postgres) are not installed on this machine")
    user = unprivileged_user()
    if os.getuid() == 0 and user is None:
        pytest.skip("the tests run as root, whom PostgreSQL refuses, and there is no other user to run it")
    import psycopg

    folder = Path(tempfile.mkdtemp(prefix="medfl-ray-postgres-"))
    port = free_port()
    server = start_postgres(folder, user, port)
    address = f"medfl:{PASSWORD}@127.0.0.1:{port}"
    try:
        connection = connect(psycopg, f"postgresql://{address}/postgres", server)
        numbers = iter(range(1000))

        def new_database():
            name = f"registry_{next(numbers)}"
            connection.execute(f"CREATE DATABASE {name}")
            return f"postgresql://{address}/{name}"

        yield new_database
        connection.close()
    finally:
        server.send_signal(signal.SIGINT)  # at SIGTERM it would wait for connections that the tests' pools keep
        server.wait(timeout=30)
        shutil.rmtree(folder)


def connect(psycopg, url, server):
    give_up = time.monotonic() + 60
    while True:
        try:
            return psycopg.connect(url, autocommit=True)
        except psycopg.OperationalError:
            assert server.poll() is None, "PostgreSQL ended while it started"
            assert time.monotonic() < give_up, "PostgreSQL did not start within a minute"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def s3_server():
    """S3 as moto plays it; return the address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """An empty bucket, its access in the environment as an operator would set it; return its URL."""
    import s3fs

    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**environment, "AWS_ENDPOINT_URL": s3_server}.items():
        monkeypatch.setenv(name, value)
    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    name = f"models-{time.monotonic_ns()}"
    files.mkdir(name)
    return f"s3://{name}/registry"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A hospital that has trained two rounds."""
    train(opened(tmp_path / "site"), 1, 2)
    return tmp_path / "site"


@pytest.fixture
def mirror(tmp_path: Path, site: Path) -> RunMirror:
    """A mirror that has seen them."""
    mirror = RunMirror(POLICIES, tmp_path / "run", tmp_path / "state")
    assert mirror.keep(rows_of(opened(site))) == {}
    return mirror


@pytest.fixture
def copies(tmp_path: Path, mirror: RunMirror) -> LedgerMirror:
    return LedgerMirror(tmp_path / "state" / "_mirror")
