"""What a cluster of ours writes, nobody else reads: logs, sockets and spilled objects, during its life and after."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from actors import session_folders
from actors.session_folders import LOCK, claim_root, discard, hold, owner_only_files, session_root, sweep
from medfl_ray.errors import ClusterError

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="another user's folder can only be made by root")


@pytest.fixture
def short(monkeypatch):
    """A folder whose path leaves room for the paths of sockets; pytest's do not."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def opened_to_others(root):
    """List the files that others may read or write, whatever the folders above them."""
    return sorted(
        path.name
        for path in root.rglob("*")
        if not path.is_symlink() and not path.is_dir() and stat.S_IMODE(path.lstat().st_mode) & 0o077
    )


def in_a_worker():
    import resource

    print("patient 17 has a file that cannot be read")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_text("")
        return stat.S_IMODE(file.stat().st_mode), resource.getrlimit(resource.RLIMIT_CORE)[0]


def test_hole_no_other_user_reads_what_our_cluster_logs(ray_cluster):
    import ray

    mode, core_bytes = ray.get(ray.remote(num_cpus=0)(in_a_worker).remote())
    assert (mode, core_bytes) == (0o600, 0)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    root = session.parents[1]
    assert root == session_root()
    assert (stat.S_IMODE(root.stat().st_mode), root.stat().st_uid) == (0o700, os.getuid())
    assert len(list((session / "logs").iterdir())) > 5
    assert opened_to_others(root) == []
    if os.getuid() == 0:
        other = subprocess.run(
            ["/bin/ls", str(session / "logs")], user=NOBODY, group=NOBODY, extra_groups=(), cwd="/",
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Permission denied" in other.stderr


LIFE = """
import sys, urllib.error, urllib.request
from pathlib import Path
from actors.cluster import connect, disconnect
connect(num_cpus=1, metrics=False)
import ray

@ray.remote(num_cpus=0)
class HospitalActor:
    def train(self):
        return 1

ray.get([HospitalActor.remote().train.remote() for _ in range(2)])
(node,) = ray.nodes()
print("page", node["MetricsExportPort"])
session = Path(ray._private.worker._global_node.get_session_dir_path())
spilled = session / "ray_spilled_objects"
spilled.mkdir()
(spilled / "update").write_bytes(b"an update before its noise")
import os
print("umask", oct(os.umask(0o022)))
disconnect()
"""


@pytest.mark.ci
def test_hole_a_cluster_that_ended_leaves_its_logs_alone_and_counts_no_calls_where_cohorts_are_secret(short):
    """Ray counts finished calls by the method's name, `HospitalActor.train`, on a page that asks for no token."""
    done = subprocess.run(
        [sys.executable, "-c", LIFE],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        umask=0o022,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "umask 0o22" in done.stdout, "the process that started the cluster has its own umask back"
    assert next(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("page")) <= 0
    (session,) = (path for path in (short / f"medfl-ray-{os.getuid()}" / "ray").glob("session_2*"))
    assert sorted(path.name for path in session.iterdir()) == sorted([LOCK, "logs"])
    assert list((session / "logs").glob("worker-*.out"))
    every = [session.parents[1], *session.parents[1].rglob("*")]
    assert [path.name for path in every if not path.is_symlink() and stat.S_IMODE(path.lstat().st_mode) & 0o077] == []


def test_a_folder_of_ours_is_made_once_and_taken_again(short):
    assert claim_root(session_root()) == claim_root(session_root()) == short / f"medfl-ray-{os.getuid()}" / "ray"


def test_hole_a_session_folder_that_is_a_link_is_refused(short):
    (short / "elsewhere").mkdir(mode=0o700)
    session_root().symlink_to(short / "elsewhere")
    with pytest.raises(ClusterError, match="is not a folder of this user"):
        claim_root(session_root())


@as_root
def test_hole_a_session_folder_of_another_user_is_refused(short):
    session_root().mkdir(mode=0o700)
    os.chown(session_root(), NOBODY, NOBODY)
    with pytest.raises(ClusterError, match="is not a folder of this user"):
        claim_root(session_root())


@pytest.mark.parametrize(("own", "around"), [(0o750, 0o700), (0o705, 0o700), (0o700, 0o777)])
def test_hole_a_session_folder_that_others_may_enter_or_replace_is_refused(short, own, around):
    session_root().mkdir()
    session_root().chmod(own)
    short.chmod(around)
    with pytest.raises(ClusterError, match="other users may enter or replace"):
        claim_root(session_root())


def test_a_shared_folder_with_the_sticky_bit_will_do(short):
    short.chmod(0o1777)
    assert claim_root(session_root()).parent.is_dir()


def test_paths_of_sockets_stay_short(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 60)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(long))
    assert session_root() == Path("/tmp") / f"medfl-ray-{os.getuid()}"
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ClusterError, match="RAY_TMPDIR is too long"):
        session_root()


def session(folder, name, age_s=0.0):
    path = folder / f"session_{name}"
    for part in ("logs", "sockets", "ray_spilled_objects_1"):
        (path / part).mkdir(parents=True)
        (path / part / "file").write_text("")
    (path / "port").write_text("1")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def names_in(path):
    return {one.name for one in path.iterdir()}


def test_sessions_that_ended_are_swept_and_those_that_live_are_left(tmp_path):
    ended, alive, starting, forgotten, week_old = (
        session(tmp_path, name, age_s)
        for name, age_s in (("1_1", 0), ("1_2", 0), ("1_3", 60), ("1_4", 2 * 86400), ("1_5", 8 * 86400))
    )
    os.close(hold(ended))
    lock = hold(alive)
    whole = names_in(alive)
    sweep(tmp_path)
    os.close(lock)
    assert names_in(ended) == {"logs", LOCK}
    assert names_in(alive) == whole == {"logs", "sockets", "ray_spilled_objects_1", "port", LOCK}
    assert names_in(starting) == {"logs", "sockets", "ray_spilled_objects_1", "port"}
    assert names_in(forgotten) == {"logs"}
    assert not week_old.exists()


def test_a_link_in_a_session_is_removed_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    own = session(tmp_path, "1_1")
    (own / "link").symlink_to(outside)
    outside.chmod(0o755)
    discard(own)
    assert names_in(own) == {"logs"}
    assert names_in(outside) == {"kept"}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_a_lock_is_never_there_without_being_held(tmp_path, monkeypatch):
    own, seen = session(tmp_path, "1_1"), []
    flock = fcntl.flock
    monkeypatch.setattr(
        session_folders.fcntl, "flock", lambda *arguments: (seen.append(names_in(own)), flock(*arguments))
    )
    os.close(hold(own))
    assert LOCK not in seen[0]
    assert LOCK in names_in(own)


def test_umask_and_core_limit_are_the_process_own_again_whatever_happens():
    import resource

    limits, before = resource.getrlimit(resource.RLIMIT_CORE), os.umask(0o027)
    try:
        with suppress(KeyError), owner_only_files() as own:
            assert own == 0o027
            raise KeyError
        assert os.umask(0o027) == 0o027
        assert resource.getrlimit(resource.RLIMIT_CORE) == limits
    finally:
        os.umask(before)
