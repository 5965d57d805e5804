"""What lies in a state folder: for its owner's eyes alone, whatever the umask, and safe on a file system of others."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from medfl_ray.errors import LedgerError
from medfl_ray.messages import Mechanism
from medfl_ray.store import file_systems, private_files, signing_key
from medfl_ray.store.file_systems import is_on_network
from medfl_ray.store.ledger.account import PrivacyLedger
from medfl_ray.store.ledger.file import KEY_NAME, LedgerFile
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.ledger.recovery import recover
from medfl_ray.store.ledger.simulated import SimulatedLedgers
from medfl_ray.store.run.hospital_memory import HospitalMemory
from medfl_ray.store.signing_key import create_key, load_key

DELTA = 1e-5
MECHANISM = Mechanism(
    noise_multiplier=20.0, sample_rate=1.0, max_grad_norm=1.0, num_steps=2, num_patients=40, delta=DELTA
)
MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:26 / /srv rw,nosuid - tmpfs tmpfs rw
31 22 0:44 / /srv/state\\040of\\040north rw,relatime shared:9 master:3 - nfs4 filer:/export rw,vers=4.2
32 31 8:2 / /srv/state\\040of\\040north/local rw - xfs /dev/sdb rw
33 22 0:45 / /mnt/share rw - cifs //filer/share rw
34 33 8:3 / /mnt/share rw - ext4 /dev/sdc rw
35 22 0:46 / /home/me/far rw - fuse.sshfs me@far: rw
"""


@pytest.fixture(params=[0o000, 0o022, 0o377])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def opened(folder: Path) -> PrivacyLedger:
    return PrivacyLedger.open(folder / "ledger.sqlite", "north", "scans", DELTA, None)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes_below(folder: Path) -> set[int]:
    return {mode(path) for path in folder.rglob("*") if path.is_file()}


def test_hole_files_of_a_state_folder_are_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    site = tmp_path / "site"
    site.mkdir()
    site.chmod(0o755)
    ledger = opened(site)
    holder = sqlite3.connect(site / "ledger.sqlite")  # keeps the -wal and -shm files there
    holder.execute("SELECT count(*) FROM ledger_events").fetchone()
    ledger.reserve("job", 1, 0, MECHANISM, None)
    assert mode(site) == 0o700
    assert {path.name for path in site.iterdir()} >= {"ledger.sqlite", "ledger.sqlite-wal", KEY_NAME}
    assert modes_below(site) == {0o600}
    holder.close()
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    mirror.chmod(0o755)
    copies = LedgerMirror(mirror)
    copies.keep(ledger.export())
    copies.accept_key("north", "scans", "ab" * 32)
    assert {path.name for path in mirror.iterdir()} >= {"mirror.sqlite", "coordinator.key", "key_receipts.jsonl"}
    assert modes_below(mirror) == {0o600}


def test_what_a_hospital_remembers_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        HospitalMemory(tmp_path, "job", 3).save(1, {"weights": np.zeros(3, dtype=np.float32)})
    finally:
        os.umask(before)
    assert modes_below(tmp_path) == {0o600}


def test_hole_a_ledger_in_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir(mode=0o755)
    opened(site).reserve("job", 1, 0, MECHANISM, None)
    export = opened(site).export()
    for open_to in (0o755, 0o710, 0o770, 0o701):
        site.chmod(open_to)
        for action in (
            lambda: opened(site),
            lambda: LedgerFile(site / "ledger.sqlite"),
            lambda: SimulatedLedgers(site, lambda hospital: pytest.fail("not reached")),
            lambda: recover(site / "ledger.sqlite", [export], DELTA),
        ):
            with pytest.raises(LedgerError, match=r"other users may enter the state folder 'site'.*`chmod 700`"):
                action()
    site.chmod(0o700)
    assert opened(site).export() == export


def test_a_ledgers_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    opened(tmp_path)
    (tmp_path / "ledger.sqlite").chmod(0o644)
    opened(tmp_path)
    assert mode(tmp_path / "ledger.sqlite") == 0o600


def test_a_folder_of_all_users_is_no_state_folder(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    with pytest.raises(LedgerError, match=r"other users may enter the folder 'shared' \(mode 1777\)"):
        opened(shared)
    assert mode(shared) == 0o1777
    assert list(shared.iterdir()) == []


def test_a_folder_whose_mode_cannot_be_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir(mode=0o755)

    def refuse(*given: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(private_files.Path, "chmod", refuse)
    with pytest.raises(LedgerError, match="choose a folder of your own"):
        opened(site)
    monkeypatch.undo()
    opened(site)
    (site / "ledger.sqlite").chmod(0o640)
    monkeypatch.setattr(private_files.Path, "chmod", refuse)
    with pytest.raises(LedgerError, match="its mode cannot be changed"):
        opened(site)


def test_hole_a_prepared_file_or_link_never_receives_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who knows the name under which a key is first written could keep it open, or point it elsewhere."""
    monkeypatch.setattr(signing_key.secrets, "token_hex", lambda size: "foreseen")
    trap = tmp_path / f".{KEY_NAME}.foreseen.new"
    stolen = tmp_path / "stolen"
    for prepare in (lambda: trap.symlink_to(stolen), lambda: trap.write_bytes(b"")):
        prepare()
        with pytest.raises(LedgerError, match="signing key cannot be written"):
            create_key(tmp_path / KEY_NAME)
        assert not stolen.exists()
        assert not (tmp_path / KEY_NAME).exists()
        trap.unlink()
    monkeypatch.undo()
    for name in (f"{KEY_NAME}.{os.getpid()}.new", f".{KEY_NAME}.{os.getpid()}.new"):
        (tmp_path / name).symlink_to(stolen)
    key = create_key(tmp_path / KEY_NAME)
    assert load_key(tmp_path / KEY_NAME).public_key == key.public_key
    assert mode(tmp_path / KEY_NAME) == 0o600
    assert not stolen.exists()


@pytest.mark.parametrize(
    ("folder", "remote"),
    [
        ("/srv/elsewhere", False),
        ("/srv/state of north", True),
        ("/srv/state of north/medfl-ray/north", True),
        ("/srv/state of north/local/medfl-ray", False),
        ("/srv/state of northern", False),
        ("/mnt/share/x", False),  # mounted over
        ("/home/me/far/away", True),
        ("/home/me", False),
    ],
)
def test_the_nearest_mount_says_whether_a_folder_is_on_the_network(tmp_path: Path, folder: str, remote: bool) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS + "a torn line\n")
    assert is_on_network(Path(folder), table) == remote
    assert not is_on_network(Path(folder), tmp_path / "no such table")


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "9p", "fuse.sshfs", "lustre", "ceph", "ext4"])
def test_hole_a_ledger_on_a_network_file_system_is_kept_without_a_write_ahead_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two machines do not share the memory in which SQLite keeps the log's index: charges would be overwritten."""
    before = opened(tmp_path)
    before.reserve("before", 1, 0, MECHANISM, None)
    table = tmp_path / "mountinfo"
    table.write_text(
        f"22 1 0:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:2 / {tmp_path.resolve()} rw - {kind} somewhere rw\n"
    )
    monkeypatch.setattr(file_systems, "MOUNT_TABLE", table)
    is_on_network.cache_clear()
    try:
        ledger = opened(tmp_path)  # one that was kept with a log before is carried over
        ledger.settle(ledger.reserve("job", 1, 0, MECHANISM, None))
        with ledger._file.reading() as connection:
            journal = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        LedgerMirror(tmp_path / "mirror").keep(ledger.export())
        with sqlite3.connect(tmp_path / "mirror" / "mirror.sqlite") as raw:
            mirrored = raw.execute("PRAGMA journal_mode").fetchone()[0]
    finally:
        is_on_network.cache_clear()
    assert journal == mirrored == ("wal" if kind == "ext4" else "delete")
    assert len(opened(tmp_path).events()) == 3
