"""Whether a folder lies on a file system of another machine, which an SQLite file has to know."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")
NETWORK_TYPES = frozenset(
    [
        *(
            "9p",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "coda",
            "davfs",
            "gfs",
            "gfs2",
            "glusterfs",
            "gpfs",
            "lustre",
            "ncpfs",
        ),
        *("nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"),
        *("fuse.beegfs", "fuse.ceph", "fuse.curlftpfs", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.juicefs"),
        *("fuse.mfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
    ]
)


@lru_cache(maxsize=256)
def is_on_network(folder: Path, mount_table: Path | None = None) -> bool:
    """Say whether a folder is on a network file system, from Linux's table of mounts; False where there is none.

    Args:
      mount_table: file in the form of /proc/self/mountinfo.
    """
    try:
        lines = (mount_table or MOUNT_TABLE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    mounts = [mount for mount in map(_mount_of, lines) if mount is not None]
    place = folder.resolve()
    # The longest mount point above the folder holds it; of two mounts in one place the later one hides the other.
    above = [(len(point.parts), number, kind) for number, (point, kind) in enumerate(mounts) if _is_in(place, point)]
    return bool(above) and max(above)[2] in NETWORK_TYPES


def _mount_of(line: str) -> tuple[Path, str] | None:
    """Return mount point and type of a line; fields before " - " vary in number, the type is the first behind it."""
    before, separator, after = line.partition(" - ")
    fields, kinds = before.split(" "), after.split(" ")
    if not separator or len(fields) < 5:
        return None
    point = fields[4]
    for escaped, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(escaped, character)
    return Path(point), kinds[0]


def _is_in(place: Path, point: Path) -> bool:
    return place == point or point in place.parents
