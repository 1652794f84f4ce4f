"""What only ZooKeeper has: URLs, users, ACLs, chroots, and sessions that are lost."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import PATIENCE
from ports import free_ports
from zookeeper import LOCAL, Ensemble, ensemble, stop

from daemonkit.cluster import address
from daemonkit.cluster.connect import check, connect
from daemonkit.cluster.coordinator import Coordinator
from daemonkit.cluster.recipe import boot_time
from daemonkit.cluster.session import SURE, Session
from daemonkit.cluster.tree import State
from daemonkit.core.inotify import SLEEP
from daemonkit.errors import CoordinatorError, MissingLibrary, UsageError

SESSION = 1.0  # seconds, where one is to end
CALM = 10.0  # where none is to; who speaks to a server too early is silent for two thirds of it


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ensemble]:
    with ensemble(tmp_path_factory.mktemp("zookeeper"), LOCAL) as made:
        yield made


Open = Callable[[str], Coordinator]


@pytest.fixture
def opened() -> Iterator[Open]:
    made: list[Coordinator] = []

    def opened(url: str) -> Coordinator:
        made.append(connect(url))
        return made[-1]

    yield opened
    for each in made:
        each.close()


def named(servers: Ensemble, user: str, path: str = "", **options: object) -> str:
    return servers.url(path, **options).replace("//", f"//{user}@")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("local", "there are: local, zookeeper:"),
        ("zokeeper://u:secret@h", "did you mean zookeeper:?"),
        ("local:cluster", "a path that begins with /"),
        ("local:/x?y=1", "and nothing else"),
        ("zookeeper:h1", "zookeeper://HOST"),
        ("zookeeper://", "'' is no HOST"),
        ("zookeeper://h1,,h2", "'' is no HOST"),
        ("zookeeper://h1:0", "'h1:0' is no HOST"),
        ("zookeeper://h1:x/y", "'h1:x' is no HOST"),
        ("zookeeper://h1/a//b", "no part of it may be empty"),
        ("zookeeper://user@h1", "USER:PASSWORD"),
        ("zookeeper://h1?sesion_timeout=3", "did you mean session_timeout?"),
        ("zookeeper://h1?session_timeout=0", "session_timeout"),
        ("zookeeper://h1?session_timeout=", "has no value"),
        ("zookeeper://h1?tls=maybe", "none of no, yes"),
        ("zookeeper://h1?ca=/x", "are for tls=yes"),
        ("zookeeper://h1?tls=yes&key=/x", "which is missing"),
        ("zookeeper://h1?acl=creator", "needs a USER:PASSWORD@"),
        ("zookeeper://h1?auth=sasl", "USER:PASSWORD@ before the hosts"),
        ("zookeeper://u:secret@h1?namespace=a/b", "without /"),
        ("zookeeper://app:p@sssecret@h1", "@ is written %40"),
        ("zookeeper://app:a/secret@h1", "/ %2F"),
        ("zookeeper://app:secret/a@h1", "/ %2F"),
        ("zookeeper://app:secret?a@h1", "? %3F"),
        ("zookeeper://app:p@x/secret@h1", "@ is written %40"),
        ("zookeeper:/app:secret@h1", "@ is written %40"),
        ("zookeeper:app:secret@h1", "@ is written %40"),
        ("zookeeper//app:secret@h1", "did you mean zookeeper:?"),
        ("app:secret@h1", "there are: local"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_with_a_sentence(url: str, words: str) -> None:
    with pytest.raises(UsageError) as told:
        check(url)
    assert words in str(told.value)
    assert "secret" not in str(told.value)


def test_a_url_says_all_there_is_to_say() -> None:
    url = "zookeeper://u%40x:p%3Aw@h1,[::1]:99,h3:2182/a/b?session_timeout=4s&namespace=n&acl=read&tls=yes&ca=/ca"
    found = address.parse(url)
    assert found == address.Address(
        url.replace("u%40x:p%3Aw", "***"),
        ("h1:2181", "[::1]:99", "h3:2182"),
        "/a/b",
        "u@x",
        "p:w",
        4.0,
        "n",
        "digest",
        "read",
        True,
        "/ca",
        None,
        None,
    )


def test_no_server_is_told_within_a_sessions_time_out(opened: Open) -> None:
    lost = opened(f"zookeeper://127.0.0.1:1?session_timeout={SESSION}")
    until = time.monotonic() + PATIENCE
    while lost.tree.error is None:  # a thread of the library's may need a while for its first try
        assert time.monotonic() < until
        time.sleep(SLEEP)
    began = time.monotonic()
    with pytest.raises(CoordinatorError, match=r"reach zookeeper://127.0.0.1:1\?.*refused; are the servers running"):
        lost.get("/x")
    assert time.monotonic() - began < PATIENCE


def test_who_watches_by_hand_is_told_that_no_server_answers() -> None:
    there = f"zookeeper://127.0.0.1:1?session_timeout={3 * SESSION}"  # time enough for a first try
    command = [sys.executable, "-m", "daemonkit", "cluster", "watch", "/x", there]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 1
    assert "refused; are the servers running" in done.stderr


def test_a_chroot_that_is_not_there_is_told_and_not_made(servers: Ensemble, opened: Open) -> None:
    lost = opened(servers.url("/not/there"))
    with pytest.raises(CoordinatorError, match=r"there is no node /not/there; create it .*, or correct the URL"):
        lost.lock("x", timeout=PATIENCE)
    for ask in ("leaders", "groups", "locks"):
        with pytest.raises(CoordinatorError, match="there is no node /not/there; create it"):
            getattr(opened(servers.url("/not/there")), ask)()
    with pytest.raises(CoordinatorError, match="there is no node /not/there; create it"):
        lost.get("/x")
    assert opened(servers.url()).children("/not") == []


def test_what_one_user_has_made_another_may_not_change_nor_read(servers: Ensemble, opened: Open) -> None:
    mine, theirs = opened(named(servers, "me:secret")), opened(named(servers, "you:other"))
    mine.set("/mine", b"1")
    for act in (theirs.get, lambda path: theirs.set(path, b"2"), opened(servers.url()).get):
        with pytest.raises(
            CoordinatorError, match=r"/mine at .*: the ACL of a node forbids it; give USER:PASSWORD@"
        ) as e:
            act("/mine")
        assert "other" not in str(e.value)
    assert opened(named(servers, "me:secret")).get("/mine").data == b"1"
    public = opened(named(servers, "me:secret", acl="read"))
    public.set("/public", b"1")
    assert theirs.get("/public").data == b"1"
    with pytest.raises(CoordinatorError, match="forbids it"):
        theirs.set("/public", b"2")


def test_a_user_by_sasl_is_known_and_a_wrong_password_refused(tmp_path: Path, opened: Open) -> None:
    jaas = tmp_path / "jaas.conf"
    jaas.write_text(
        'Server { org.apache.zookeeper.server.auth.DigestLoginModule required user_me="secret"; };\n',
    )
    provider = "authProvider.1=org.apache.zookeeper.server.auth.SASLAuthenticationProvider"
    made = Ensemble(tmp_path, LOCAL, [provider])
    made.servers[0].java = [f"-Djava.security.auth.login.config={jaas}"]
    try:
        made.start()
        mine = opened(named(made, "me:secret", auth="sasl"))
        mine.set("/mine", b"1")
        with pytest.raises(CoordinatorError, match="the ACL of a node forbids it"):
            opened(made.url()).get("/mine")
        with pytest.raises(CoordinatorError, match="the server refuses user and password, or knows no auth=sasl"):
            opened(named(made, "me:wrong", auth="sasl")).get("/mine")
    finally:
        made.close()


def test_a_user_by_sasl_is_told_of_a_server_that_knows_none(servers: Ensemble, opened: Open) -> None:
    mine = opened(named(servers, "me:secret", auth="sasl", session_timeout=SESSION))
    candidacy = mine.elect("job")
    until = time.monotonic() + PATIENCE
    while mine.tree.state is not State.REFUSED:
        assert time.monotonic() < until
        with contextlib.suppress(CoordinatorError):
            mine.wait(PATIENCE)
    assert not candidacy.is_held
    for _ in range(2):
        with pytest.raises(CoordinatorError, match=r"the server refuses user and password, or knows no auth=sasl"):
            mine.get("/x")


def test_tls_checks_the_servers_certificate_and_its_host_name(tmp_path: Path, opened: Open) -> None:
    certify(tmp_path, "localhost")
    (port,) = free_ports(1)
    settings = [
        f"secureClientPort={port}",
        "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory",
        f"ssl.keyStore.location={tmp_path}/server.p12",
        "ssl.keyStore.password=secret",
        "ssl.clientAuth=none",
    ]
    with ensemble(tmp_path, LOCAL, settings):
        query = f"tls=yes&session_timeout=3&ca={tmp_path}"
        opened(f"zookeeper://localhost:{port}?tls=yes&session_timeout=30&ca={tmp_path}/ca.pem").set("/x", b"1")
        for url in (f"127.0.0.1:{port}?{query}/ca.pem", f"localhost:{port}?{query}/other.pem"):
            # In a process of its own: the library forgets to close the socket of a handshake that has failed.
            command = [sys.executable, "-m", "daemonkit", "cluster", "get", "/x", f"zookeeper://{url}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
            assert done.returncode == 1
            assert "certificate verify failed" in done.stderr


@pytest.mark.parametrize("key", ["ca", "cert"])
def test_a_file_that_cannot_be_read_is_named(key: str) -> None:
    with pytest.raises(CoordinatorError, match=rf"use zookeeper://h1\?.*: {key}=/not/there.pem: No such file"):
        connect(f"zookeeper://h1?tls=yes&{key}=/not/there.pem")


def certify(path: Path, host: str) -> None:
    """An authority, another, and a server's certificate for ``host`` by the first."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=path, check=True, capture_output=True)

    new = ("req", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-x509", "-subj")
    for name in ("ca", "other"):
        usage = ("-addext", "keyUsage=critical,keyCertSign")
        openssl(*new, f"/CN={name}", *usage, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    words = (f"subjectAltName=DNS:{host}", "basicConstraints=critical,CA:FALSE", "authorityKeyIdentifier=keyid")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", *(part for word in words for part in ("-addext", word)))
    openssl(*new, f"/CN={host}", *signed, "-keyout", "server.key", "-out", "server.pem")
    openssl(
        "pkcs12",
        "-export",
        "-in",
        "server.pem",
        "-inkey",
        "server.key",
        "-out",
        "server.p12",
        "-passout",
        "pass:secret",
    )


def test_two_namespaces_know_nothing_of_each_other(servers: Ensemble, opened: Open) -> None:
    one, other = opened(servers.url(namespace="one")), opened(servers.url(namespace="other"))
    with one.lock("x"), other.lock("x", timeout=PATIENCE):
        assert [len(each.locks()) for each in (one, other)] == [1, 1]


def test_a_lock_whose_server_is_gone_is_not_held_and_one_whose_session_is_gone_never_again(
    tmp_path: Path, opened: Open
) -> None:
    with ensemble(tmp_path, LOCAL) as own:
        coordinator = opened(own.url(session_timeout=CALM))
        held = coordinator.lock("x")
        assert held.is_held()
        own.servers[0].kill()
        await_state(coordinator, State.SUSPENDED)
        assert not held.is_held()
        own.start()
        await_state(coordinator, State.CONNECTED)
        # A server that begins anew gives each session that it knows its whole time again.
        assert held.is_held() == (coordinator.tree.session == held.session)


def test_a_session_is_counted_on_for_a_part_of_its_time_out_after_its_last_proof_and_no_longer(
    tmp_path: Path, opened: Open
) -> None:
    with ensemble(tmp_path, LOCAL) as own:
        coordinator = opened(own.url(session_timeout=SESSION))
        held = coordinator.lock("x")
        server = own.servers[0]
        stop(server.pid)
        stopped = boot_time()
        try:
            until = time.monotonic() + PATIENCE
            while held.is_held():
                assert time.monotonic() < until
            assert coordinator.tree.valid_until <= stopped + SESSION * SURE
            # The library has not noticed yet that nobody answers.
            assert boot_time() >= coordinator.tree.valid_until or coordinator.tree.state is State.SUSPENDED
        finally:
            server.signal(signal.SIGCONT)


def test_a_proof_after_silence_counts_no_longer_than_what_the_servers_have_known_before() -> None:
    session, now = Session(4.0), boot_time()
    session.begin(now - 3.6)
    session.connect("s")
    session.prove("s", now - 3.6)
    assert session.valid_until == pytest.approx(now - 1.2)
    assert not session.prove("s", now)  # as after SIGSTOP and SIGCONT: the servers end it at now + 0.4
    assert session.valid_until < now
    assert not session.prove("s", now + 0.1)  # nor need their leader know of that yet
    assert session.valid_until < now
    assert session.prove("s", now + 1)
    assert session.valid_until == pytest.approx(now + 1 + 2.4)


def test_pings_tell_that_the_silence_before_a_proof_was_short() -> None:
    session, now = Session(10.0), boot_time()
    session.begin(now - 3600)
    session.connect("s")
    for n in range(1000):
        session.hear(now - 3600 + 3.6 * n)
    assert session.prove("s", now)
    assert session.valid_until > now + 10 / 3


def test_a_session_with_which_much_is_read_is_counted_on_as_long_as_a_silent_one(
    servers: Ensemble, opened: Open
) -> None:
    """Between two requests that are less than a third of the time-out apart, the library sends no ping."""
    tree = opened(servers.url(session_timeout=4.0)).tree
    tree.get("/")
    began = boot_time()
    while boot_time() < began + 0.83 * 4.0:
        tree.get("/")
    asked = boot_time()
    tree.keep_valid(tree)
    assert tree.valid_until > asked + 4.0 / 3


def test_a_session_goes_on_in_another_process_with_what_it_has(servers: Ensemble, opened: Open) -> None:
    coordinator = opened(servers.url())
    candidacy = coordinator.elect("job", unique="u" * 32)
    while not candidacy.is_held:
        coordinator.wait(PATIENCE)
    credentials = coordinator.tree.credentials()
    assert credentials is not None
    token, session = candidacy.token, coordinator.tree.session
    coordinator.tree.leave()
    again = connect(servers.url(), credentials=credentials)
    try:
        goes_on = again.elect("job", unique="u" * 32)
        while not goes_on.is_held:
            again.wait(PATIENCE)
        assert (goes_on.token, again.tree.session) == (token, session)
    finally:
        again.close()


def test_without_the_library_one_sentence_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['kazoo'] = None\n"
        "from daemonkit.cluster.connect import connect\n"
        "try:\n    connect('zookeeper://h')\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said == (
        f"{MissingLibrary.__name__} use a zookeeper: coordinator: the library kazoo is not installed; "
        "pip install 'daemonkit[zookeeper]'\n"
    )


def await_state(coordinator: Coordinator, state: State) -> None:
    until = time.monotonic() + PATIENCE
    while coordinator.tree.state is not state:
        assert time.monotonic() < until
        coordinator.wait(PATIENCE)
