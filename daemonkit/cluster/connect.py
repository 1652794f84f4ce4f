"""From a coordinator's URL to the coordinator."""

from __future__ import annotations

import os

from daemonkit.cluster.coordinator import Coordinator
from daemonkit.cluster.tree import Credentials
from daemonkit.errors import UsageError

SCHEMES = ("local", "zookeeper")


def connect(url: str, daemon: str = "", credentials: Credentials | None = None) -> Coordinator:
    """Begin a session with the coordinator that ``url`` names; does not wait for a server's answer.

    ``local:PATH``; ``zookeeper://[USER:PASSWORD@]HOST[:PORT],HOST.../CHROOT?OPTION=VALUE&...``, see ``address``.

    Args:
        url: of the coordinator.
        daemon: in whose name; others are shown it.
        credentials: go on with this session of another process, if it lives.

    Raises:
        UsageError: the URL cannot be meant.
        CoordinatorError: a local directory cannot be used, or a file that the URL names.
        MissingLibrary: kazoo is wanted, and is not installed.
    """
    scheme = check(url)
    if scheme == "local":
        from daemonkit.cluster.local import LocalTree

        return Coordinator(LocalTree(url.partition(":")[2], credentials), daemon)
    from daemonkit.cluster import address
    from daemonkit.cluster.zookeeper import ZookeeperTree

    found = address.parse(url)
    address.check_files(found)
    return Coordinator(ZookeeperTree(found, credentials), daemon, found.namespace)


def check(url: str) -> str:
    """Return the scheme of ``url`` if it can name a coordinator.

    Raises:
        UsageError: it cannot.
    """
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in SCHEMES:
        from difflib import get_close_matches

        from daemonkit.cluster.address import without_password

        near = get_close_matches(scheme, SCHEMES, 1)
        hint = f"did you mean {near[0]}:?" if near and near[0] != scheme else f"there are: {', '.join(SCHEMES)}:"
        raise UsageError(f"coordinator {without_password(url)!r}: {hint}")
    if scheme == "local":
        if not os.path.isabs(rest) or rest.startswith("//") or "?" in rest:
            raise UsageError(f"coordinator {url!r}: after local: a path that begins with / is wanted, and nothing else")
    else:
        from daemonkit.cluster import address

        address.parse(url)
    return scheme
