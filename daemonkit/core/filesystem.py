"""What a file lies on: locks, change notices and shared memory reach the processes of one host only."""

from __future__ import annotations

import os
from typing import Final

_DISKS: Final = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "gfs2", "9p")
_FUSE: Final = ("fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph")
_NETWORK: Final = frozenset((*_DISKS, *_FUSE))


def file_system_of(path: str, mounts: str = "/proc/self/mountinfo") -> str:
    """The type of the file system that ``path`` lies on (proc(5), mountinfo); empty if that cannot be known."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open(mounts) as file:
            for line in file:
                words = line.split()
                if words[2] == wanted:
                    return words[words.index("-") + 1]
    except (OSError, ValueError):
        return ""
    return ""


def is_network(kind: str) -> bool:
    """Whether other hosts may have a file there open."""
    return kind in _NETWORK
