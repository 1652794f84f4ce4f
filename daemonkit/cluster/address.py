"""The URL of a ZooKeeper ensemble: ``zookeeper://[USER:PASSWORD@]HOST[:PORT],HOST.../CHROOT?OPTION=VALUE&...``

=====================  =========================================================================================
``session_timeout``    how long the servers wait for a host that is not heard of, "10s"; they may negotiate another
``namespace``          the node below which elections, locks and the like are made: ``daemonkit``
``auth``               what user and password are for: ``digest`` (default) or ``sasl`` (DIGEST-MD5)
``acl``                of the nodes that we make: ``open``, ``creator`` (default with a user), ``read`` (others may)
``tls``                ``yes``: the servers' certificates are checked, their host names too
``ca``                 file of the authorities that are trusted
``cert``, ``key``      files of our own certificate and its key
=====================  =========================================================================================

The chroot must exist: a wrong one would be another cluster, and another leader.
"""

from __future__ import annotations

import os
import re
from typing import Final, NamedTuple, NoReturn
from urllib.parse import parse_qsl, unquote

from daemonkit.cluster.tree import check_name, check_path
from daemonkit.core.duration import positive_seconds
from daemonkit.core.shown import shown as hidden
from daemonkit.errors import CoordinatorError, UsageError

NAMESPACE: Final = "daemonkit"
PORT: Final = 2181
SESSION_TIMEOUT: Final = 10.0  # seconds
_CHOICES: Final = {"auth": ("digest", "sasl"), "acl": ("open", "creator", "read"), "tls": ("no", "yes")}
_OTHERS: Final = ("session_timeout", "namespace", "ca", "cert", "key")
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d+))?\Z")


class Address(NamedTuple):
    """What a URL says."""

    url: str  # without the password, to be shown
    hosts: tuple[str, ...]  # each with its port
    chroot: str  # empty: none
    user: str
    password: str
    session_timeout: float  # seconds
    namespace: str
    auth: str
    acl: str
    tls: bool
    ca: str | None
    cert: str | None
    key: str | None


def parse(url: str) -> Address:
    """Read ``url``.

    Raises:
        UsageError: it cannot be meant.
    """
    shown = without_password(url)
    if "@" in url and (url.count("@") > 1 or re.search(r"//[^/?]*@", url) is None):  # else a part of it would be told
        _refuse(shown, "in user and password, and after the hosts, @ is written %40, / %2F and ? %3F")
    rest, _, query = url.removeprefix("zookeeper:").partition("?")
    if not rest.startswith("//"):
        _refuse(shown, "it is written zookeeper://HOST[:PORT],HOST.../CHROOT")
    where, slash, chroot = rest[2:].partition("/")
    account, _, listed = where.rpartition("@")
    user, colon, password = account.partition(":")
    if account and not (user and colon and password):
        _refuse(shown, "before the @ stand USER:PASSWORD, quoted as in any URL")
    options = _options(query, shown)
    if "key" in options and "cert" not in options:
        _refuse(shown, "key= is that of a cert=, which is missing")
    if options.get("tls", "no") == "no" and options.keys() & {"ca", "cert", "key"}:
        _refuse(shown, "ca=, cert= and key= are for tls=yes")
    if "auth" in options and not user:
        _refuse(shown, "auth= is what USER:PASSWORD@ before the hosts is for")
    if not user and options.get("acl", "open") != "open":
        _refuse(shown, f"acl={options['acl']} needs a USER:PASSWORD@ before the hosts")
    return Address(
        shown,
        tuple(_host(each, shown) for each in listed.split(",")),
        check_path(f"/{chroot}", f"coordinator {shown!r}: the chroot") if slash and chroot else "",
        unquote(user),
        unquote(password),
        positive_seconds(options.get("session_timeout", SESSION_TIMEOUT), what=f"coordinator {shown}: session_timeout"),
        check_name(options.get("namespace", NAMESPACE), f"coordinator {shown}: namespace"),
        options.get("auth", "digest"),
        options.get("acl", "creator" if user else "open"),
        options.get("tls", "no") == "yes",
        options.get("ca"),
        options.get("cert"),
        options.get("key"),
    )


def check_files(address: Address) -> None:
    """Say which of the files of a URL cannot be read: of TLS one learns no more than that it cannot be used.

    Raises:
        CoordinatorError: the first of them.
    """
    for key, path in (("ca", address.ca), ("cert", address.cert), ("key", address.key)):
        try:
            if path is not None:
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise CoordinatorError(f"use {address.url}: {key}={path}: {error.strerror}") from None


def without_password(url: str) -> str:
    """``url`` as it may be shown."""
    return url if url.startswith("local:/") else hidden(url)


def _host(text: str, shown: str) -> str:
    found = _HOST.match(text)
    if found is None or not 0 < int(found[2] or PORT) < 65536:
        _refuse(shown, f"{text!r} is no HOST or HOST:PORT")
    return f"{found[1]}:{found[2] or PORT}"


def _options(query: str, shown: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _CHOICES and key not in _OTHERS:
            from difflib import get_close_matches

            near = get_close_matches(key, (*_CHOICES, *_OTHERS), 1)
            _refuse(shown, f"unknown option {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        if not value:
            _refuse(shown, f"{key}= has no value")
        if key in _CHOICES and value not in _CHOICES[key]:
            _refuse(shown, f"{key}={value} is none of {', '.join(_CHOICES[key])}")
        options[key] = value
    return options


def _refuse(shown: str, why: str) -> NoReturn:
    raise UsageError(f"coordinator {shown!r}: {why}")
