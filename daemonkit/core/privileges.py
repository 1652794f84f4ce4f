"""Drop root for good, or refuse to go on (setresuid(2), initgroups(3))."""

from __future__ import annotations

import os
from typing import NamedTuple

from daemonkit.errors import PrivilegeError


class Owner(NamedTuple):
    """The account that a daemon runs as."""

    uid: int
    gid: int
    name: str
    home: str
    shell: str


def resolve(user: str | None, group: str | None) -> Owner | None:
    """Look up the configured user and group (names or numbers); None if neither is set.

    Raises:
        PrivilegeError: no such user or group, or we are not root and it is another than ours.
    """
    if user is None and group is None:
        return None
    import grp
    import pwd

    uid = os.geteuid()
    try:
        if user is not None:
            uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
        account = pwd.getpwuid(uid)
    except KeyError:
        raise PrivilegeError(f"become user {user or uid}: no such user; create it or change the option") from None
    try:
        gid = account.pw_gid if group is None else int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise PrivilegeError(f"become group {group}: no such group; create it or change the option") from None
    if os.geteuid() != 0 and (uid, gid) != (os.geteuid(), os.getegid()):
        raise PrivilegeError(
            f"become user {account.pw_name}, gid {gid}: only root may; start it as root or as that user"
        )
    return Owner(uid, gid, account.pw_name, account.pw_dir, account.pw_shell)


def drop(owner: Owner) -> None:
    """Take on ``owner``: real, effective and saved ids and the supplementary groups, beyond recall.

    Raises:
        PrivilegeError: something of the old identity is left, or could be had again.
    """
    if os.geteuid() == 0:
        try:
            os.initgroups(owner.name, owner.gid)
            os.setresgid(owner.gid, owner.gid, owner.gid)
            os.setresuid(owner.uid, owner.uid, owner.uid)
        except OSError as error:
            raise PrivilegeError(f"become user {owner.name}: {error.strerror}; not started as root instead") from error
    if os.getresuid() != (owner.uid,) * 3 or os.getresgid() != (owner.gid,) * 3:
        raise PrivilegeError(f"become user {owner.name}: the kernel left us with more; not started")
    if owner.uid != 0 and _root_is_within_reach():
        raise PrivilegeError(f"become user {owner.name}: root could be had again; not started")
    os.environ.update(HOME=owner.home, USER=owner.name, LOGNAME=owner.name, SHELL=owner.shell)


def _root_is_within_reach() -> bool:
    try:
        os.setuid(0)
    except PermissionError:
        return False
    return True
