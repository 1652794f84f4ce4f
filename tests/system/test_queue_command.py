"""daemonkit queue: the tasks of a broker, by hand."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from brokers import beanstalkd, redis_server
from click.testing import CliRunner
from harness import PATIENCE, Box

from daemonkit.cli.queue import command
from daemonkit.queue.beanstalkserver import Server
from daemonkit.queue.broker import NewTask, State
from daemonkit.queue.connect import connect
from daemonkit.queue.sqlite import SqliteBroker


def run(box: Box, *args: str, code: int = 0, text: str | None = None) -> str:
    """What ``daemonkit queue ARGS`` says, if its exit code is ``code``."""
    done = box.call("queue", *args, input=text)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path}/other.db"


def test_what_is_put_is_shown_with_its_state_and_body(box: Box) -> None:
    assert run(box, "put", "mail", '{"task": "send"}') == "1\n"
    assert run(box, "put", "mail", "-", "--delay", "2m", "--priority", "7", text="from stdin") == "2\n"
    assert json.loads(run(box, "put", "sms", "x", "--key", "k", "--json")) == {"queue": "sms", "id": "3"}
    assert run(box, "put", "sms", "y", "--key", "k") == "3\n"
    assert run(box, "stats").splitlines() == [
        "QUEUE  READY  DELAYED  RESERVED  BURIED  PAUSED",
        "mail   1      1        0         0       -",
        "sms    1      0        0         0       -",
    ]
    assert [each["delayed"] for each in json.loads(run(box, "stats", "--json"))] == [1, 0]
    shown = run(box, "peek", "mail", "--state", "delayed").splitlines()
    assert shown[0].startswith("task 2 of mail: delayed, ")
    assert shown[1].endswith(" ago, priority 7, ttr 1m")
    assert shown[-1] == "  body: from stdin"
    assert json.loads(run(box, "peek", "--id", "1", "--json"))[0]["body"] == '{"task": "send"}'
    assert run(box, "peek", "mail", "--state", "buried") == "no buried task in mail\n"


def test_a_body_that_is_no_text_is_shown_all_the_same(box: Box) -> None:
    broker = SqliteBroker(str(box.run_dir / "queue.db"))
    broker.put("mail", NewTask(b"\xff\x00"))
    broker.close()
    assert "body: b'\\xff\\x00'" in run(box, "peek", "mail")
    assert json.loads(run(box, "peek", "mail", "--json"))[0]["body_base64"] == "/wA="


def test_a_task_that_is_named_twice_is_told_once_and_as_done(box: Box) -> None:
    run(box, "put", "mail", "x")
    assert json.loads(run(box, "bury", "1", "1", "--json")) == {"buried": ["1"], "refused": []}
    assert run(box, "kick", "--id", "1", "--id", "1") == "kicked 1\n"
    assert "not deleted: 2: " in run(box, "delete", "1", "2", "1", "2", code=1)


@pytest.mark.parametrize("words", ["peek mail -n", "kick mail", "move mail sms -n"])
def test_a_count_that_no_broker_can_take_is_told_in_a_sentence(box: Box, words: str) -> None:
    run(box, "put", "mail", "x")
    assert f"{2**63} is not in the range" in run(box, *words.split(), str(2**63), code=2)


@pytest.mark.parametrize("words", ["a+é mail", "mail a+é"])
def test_a_name_that_can_be_no_queues_is_told_also_when_there_is_nothing_to_move(box: Box, words: str) -> None:
    run(box, "put", "sms", "x")
    assert "queue 'a+é': a name is up to 200" in run(box, "move", *words.split(), code=2)


def test_what_a_terminal_would_obey_is_shown_and_not_sent_to_it(box: Box) -> None:
    box.call("queue", "put", "mail", "first\nsecond \x1b]0;owned\x07")
    box.call("queue", "bury", "1", "--reason", "no \x1b]0;owned\x07")
    peeked = box.call("queue", "peek", "--id", "1").stdout
    assert "reason: no \\x1b]0;owned\\x07\n" in peeked
    assert peeked.endswith("body: first\nsecond \\x1b]0;owned\\x07\n")
    assert "no \\x1b]0;owned\\x07\n" in box.call("queue", "why", "1").stdout


def test_tasks_are_buried_kicked_and_deleted_by_hand(box: Box) -> None:
    for body in "abc":
        run(box, "put", "mail", body)
    assert run(box, "bury", "1", "2", "--reason", "look at it") == "buried 1, 2\n"
    assert "reason: look at it" in run(box, "peek", "--id", "1")
    assert run(box, "kick", "mail", "1") == "kicked 1 task(s) of mail\n"
    assert run(box, "kick", "--id", "2") == "kicked 2\n"
    assert run(box, "bury", "1", "2") == "buried 1, 2\n"
    assert run(box, "kick", "mail", "--all") == "kicked 2 task(s) of mail\n"
    assert run(box, "delete", "1", "9", code=1) == "daemonkit: not deleted: 9: reserved, or not there\n"
    assert run(box, "kick", "--id", "2", code=1) == "daemonkit: not kicked: 2: neither buried nor delayed\n"
    assert run(box, "empty", "mail", "--yes") == "deleted 2 task(s) of mail\n"
    assert run(box, "stats") == f"no tasks at sqlite:{box.run_dir}/queue.db\n"


def test_what_was_done_is_printed_for_programs_as_well(box: Box, url: str) -> None:
    def said(*args: str, code: int = 0) -> object:
        done = box.call("queue", *args, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    for _ in range(3):
        run(box, "put", "mail", "x")
    assert said("bury", "1", "9", code=1) == {"buried": ["1"], "refused": ["9"]}
    assert said("why", "1") == {"id": "1", "why": run(box, "why", "1").splitlines()}
    assert said("kick", "mail", "5") == {"queue": "mail", "kicked": 1}
    assert said("kick", "--id", "1", code=1) == {"kicked": [], "refused": ["1"]}
    assert said("delete", "1") == {"deleted": ["1"], "refused": []}
    assert said("pause", "mail", "5m") == {"queue": "mail", "paused": 300.0}
    assert said("resume", "mail") == {"queue": "mail", "paused": None}
    assert said("move", "mail", "slow", "-n", "1") == {"queue": "mail", "target": "slow", "moved": 1}
    assert said("empty", "slow", "--yes") == {"queue": "slow", "deleted": 1}
    assert said("drain", "slow") == {"queue": "slow", "left": 0}
    own = f"sqlite:{box.run_dir}/queue.db"
    assert said("migrate", own, url) == {"moved": 1, "queues": ["mail"], "refused": {}, "reserved": 0}
    lost = re.sub(r"[\d,]+ MB free", "some MB free", json.dumps(said("doctor", url)))  # others write there, too
    told = re.sub(r"[\d,]+ MB free", "some MB free", run(box, "doctor", url)).splitlines()
    assert json.loads(lost) == {"broker": url, "lost": told}


def test_empty_asks_first_and_deletes_only_what_is_named(box: Box) -> None:
    run(box, "put", "mail", "a")
    run(box, "put", "mail", "b", "--delay", "1h")
    assert box.call("queue", "empty", "mail", input="n\n").returncode == 130
    done = box.call("queue", "empty", "mail", "--state", "delayed", input="y\n")
    assert done.stdout.endswith("deleted 1 task(s) of mail\n")
    assert "mail   1      0" in run(box, "stats")


def test_drain_waits_until_nothing_is_left_or_says_how_much_is(box: Box, url: str) -> None:
    broker = SqliteBroker(url.partition(":")[2])
    broker.put_many("mail", [NewTask(b"1"), NewTask(b"2", delay=1000)])
    (held,) = broker.reserve("mail")
    assert "1 task(s) are left after 0s" in run(box, "drain", "mail", "--timeout", "0", "--broker", url, code=1)
    draining = box.popen("queue", "drain", "mail", "--broker", url)
    assert broker.delete(held)
    assert draining.communicate(timeout=PATIENCE)[0] == "mail is drained\n"
    assert "1 task(s) are left" in run(box, "drain", "mail", "--delayed", "--timeout", "0.01", "--broker", url, code=1)
    broker.close()


def test_why_says_what_keeps_a_task_from_running(box: Box) -> None:
    run(box, "put", "mail", "first", "--priority", "1")
    run(box, "put", "mail", "second")
    run(box, "put", "mail", "later", "--delay", "1h")
    assert run(box, "why", "2").splitlines() == [
        "task 2 of mail is ready, 1 task(s) of its queue before it",
        "no consumer takes tasks of mail; start a daemon whose script declares one",
    ]
    assert run(box, "why", "3").startswith("task 3 of mail is delayed for another ")
    assert run(box, "pause", "mail", "10m", "--reason", "the relay is down") == "mail is paused for 10m\n"
    assert run(box, "why", "1").splitlines()[-1].endswith(": the relay is down")
    run(box, "bury", "1", "--reason", "no route")
    assert run(box, "why", "1").splitlines()[:2] == [
        "task 1 of mail is buried, after 0 failure(s): no route",
        "daemonkit queue kick --id 1 makes it ready again",
    ]
    assert run(box, "resume", "mail") == "mail is not paused\n"
    assert run(box, "why", "99", code=1).startswith("daemonkit: task 99: there is none at sqlite:")


def test_why_names_the_consumer_and_what_it_does(box: Box) -> None:
    box.start("@task('mail')\ndef wait(): time.sleep(1000)\n", "--concurrency", "1", "--graceful-timeout", "0.1")
    run(box, "put", "mail", '{"task": "wait"}')
    run(box, "put", "mail", '{"task": "wait"}')
    broker = SqliteBroker(str(box.run_dir / "queue.db"))
    until, consumer = time.monotonic() + PATIENCE, None
    while not broker.peek_state("mail", State.RESERVED) or consumer is None:
        assert time.monotonic() < until
        consumer = next(each["pid"] for each in box.status()["children"] if each["name"] == "consumer mail")
    broker.close()
    being_done = run(box, "why", "1")
    assert f".{consumer}." in being_done
    assert "attempt 1; if that is not heard of any more, it is given back in" in being_done
    assert "takes mail; 1 of 1 are busy" in run(box, "why", "2")


def test_an_interruption_waits_until_the_task_is_buried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with beanstalkd(tmp_path) as server, contextlib.closing(connect(server.url)) as broker:
        id = broker.put("mail", NewTask(b"x"))
        copy = Server._copy

        def copy_and_be_interrupted(server: Server, *words: Any) -> int | None:
            job = copy(server, *words)
            signal.raise_signal(signal.SIGINT)
            return job

        monkeypatch.setattr(Server, "_copy", copy_and_be_interrupted)
        done = CliRunner().invoke(command, ["bury", id, "--broker", server.url])
        assert done.exit_code == 1
        (found,) = broker.stats()
        assert (found.ready, found.delayed, found.reserved, found.buried) == (0, 0, 0, 1)


def test_tasks_are_moved_to_another_queue_with_their_delays_and_reasons(box: Box) -> None:
    for body in ("a", "b", "c"):
        run(box, "put", "mail", body)
    run(box, "put", "mail", "later", "--delay", "1h")
    run(box, "bury", "3", "--reason", "no route")
    assert run(box, "move", "mail", "slow", "-n", "1") == "moved 1 task(s) from mail to slow\n"
    states = ["--state", "ready", "--state", "delayed", "--state", "buried"]
    assert run(box, "move", "mail", "slow", *states) == "moved 3 task(s) from mail to slow\n"
    assert run(box, "stats").splitlines()[1:] == ["slow   2      1        0         1       -"]
    assert "reason: no route" in run(box, "peek", "slow", "--state", "buried")
    assert "delayed, " in run(box, "peek", "slow", "--state", "delayed")
    assert "are the same" in run(box, "move", "slow", "slow", code=2)
    run(box, "pause", "slow", "1m", "--reason", os.fsdecode(b"no\xffr"))
    assert run(box, "move", "slow", "mail") == "moved 2 task(s) from slow to mail\n"


def test_migrate_moves_all_to_another_broker_and_can_be_called_again(box: Box, url: str) -> None:
    here = f"sqlite:{box.run_dir}/queue.db"
    broker = SqliteBroker(str(box.run_dir / "queue.db"))
    broker.put_many("mail", [NewTask(b"%d" % n, priority=n % 7) for n in range(250)])
    broker.put_many("sms", [NewTask(b"later", delay=3600.0)] * 3)
    for each in broker.reserve("mail", count=2):
        broker.bury(each, "why")
    broker.pause("sms", 600, "down")
    (held,) = broker.reserve("mail")
    assert f"migrate {here}: 1 task(s) are reserved" in run(box, "migrate", here, url, code=1)
    assert broker.release(held)
    broker.close()
    assert run(box, "migrate", here, url) == "moved 1 task(s) of 1 queue(s)\n"
    assert run(box, "stats", "--broker", here) == f"no tasks at {here}\n"
    found = json.loads(run(box, "stats", "--broker", url, "--json"))
    assert [(each["queue"], each["ready"], each["delayed"], each["buried"]) for each in found] == [
        ("mail", 248, 0, 2),
        ("sms", 0, 3, 0),
    ]
    assert found[1]["pause_reason"] == "down"


def test_migrate_takes_no_task_of_a_new_file_for_one_of_an_old_one(box: Box, url: str) -> None:
    here = box.run_dir / "queue.db"
    for body in ("of the first file", "of the second"):
        run(box, "put", "mail", body, "--delay", "1h")
        assert run(box, "migrate", f"sqlite:{here}", url) == "moved 1 task(s) of 1 queue(s)\n"
        for path in box.run_dir.glob("queue.db*"):
            path.unlink()
    assert json.loads(run(box, "stats", "--json", "--broker", url))[0]["delayed"] == 2


def test_migrate_moves_what_is_paused_and_the_pause(box: Box, url: str) -> None:
    here = f"sqlite:{box.run_dir}/queue.db"
    for body in "abc":
        run(box, "put", "mail", body, "--broker", here)
    run(box, "pause", "mail", "1h", "--broker", here)
    assert run(box, "migrate", here, url) == "moved 3 task(s) of 1 queue(s)\n"
    assert run(box, "stats", "--broker", here) == f"no tasks at {here}\n"
    (found,) = json.loads(run(box, "stats", "--json", "--broker", url))
    assert (found["ready"], found["paused"] > 3000) == (3, True)
    assert "are the same broker" in run(box, "migrate", url, url, code=2)


def test_migrate_to_beanstalkd_keeps_the_pause_of_one_queue_of_several(box: Box, tmp_path: Path) -> None:
    here = f"sqlite:{box.run_dir}/queue.db"
    for queue in ("mail", "sms"):
        run(box, "put", queue, "a", "--broker", here)
        run(box, "pause", queue, "1h", "--broker", here)
    with beanstalkd(tmp_path) as server:
        assert run(box, "migrate", here, server.url) == "moved 2 task(s) of 2 queue(s)\n"
        found = json.loads(run(box, "stats", "--json", "--broker", server.url))
    assert [(each["queue"], each["paused"] is not None) for each in found] == [("mail", True), ("sms", True)]


def test_control_c_while_the_command_is_loaded_ends_it_without_a_traceback(box: Box, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    said = subprocess.run(
        box.command("queue", "stats"),
        env={**box.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (said.returncode, said.stdout, said.stderr) == (-signal.SIGINT, "", "")


def test_migrate_to_a_server_that_takes_less_says_what_has_stayed_and_moves_the_rest(box: Box, tmp_path: Path) -> None:
    here = f"sqlite:{box.run_dir}/queue.db"
    with contextlib.closing(SqliteBroker(str(box.run_dir / "queue.db"))) as broker:
        broker.put_many("mail", [NewTask(b"1"), NewTask(b"2" * 70_000), NewTask(b"3")])
        broker.put_many("mail", [NewTask(b"4", delay=999), NewTask(b"5" * 70_000, delay=999)])
    with beanstalkd(tmp_path, "-z", "65535") as server:
        said = run(box, "migrate", here, server.url, code=1)
        assert "task(s) 2, 5 stay there: put into mail: 70000 bytes; beanstalkd at " in said
        with contextlib.closing(connect(server.url)) as there:
            assert [each[:5] for each in there.stats()] == [("mail", 2, 1, 0, 0)]
    (left,) = json.loads(run(box, "stats", "--json", "--broker", here))
    assert (left["ready"], left["delayed"], left["reserved"]) == (1, 1, 0)


def test_what_others_have_pushed_onto_a_list_is_seen_by_name(box: Box, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        for n in "123":
            server.command("LPUSH", "mail", n)
        assert "the list mail is no queue that anybody has consumed yet" in run(box, "doctor", server.url)
        assert "3 task(s) are left" in run(box, "drain", "mail", "--timeout", "0.01", "--broker", server.url, code=1)
        assert json.loads(run(box, "stats", "--json", "--broker", server.url))[0]["ready"] == 3
        server.command("LPUSH", "mail", "4")
        assert run(box, "empty", "mail", "--yes", "--broker", server.url) == "deleted 4 task(s) of mail\n"


def test_no_password_is_shown(box: Box) -> None:
    for url in ("rediz://:sec@ret@h", "redis://:sec@ret@h/0?socket_timeout=abc", "sentinel://:secret@h:1"):
        assert "sec" not in run(box, "stats", "--broker", url, code=2).replace("is one", "")
    assert "sec" not in run(box, "stats", "--broker", "unix:///nowhere.sock?password=secret", code=1)


def test_the_doctor_names_the_file_and_what_would_be_lost(box: Box, url: str) -> None:
    run(box, "put", "mail", "x", "--broker", url)
    said = run(box, "doctor", url)
    assert f"{url.partition(':')[2]}, on " in said
    assert "a power cut loses nothing that was accepted (synchronous=FULL)" in said
    assert "loses the last puts" in run(box, "doctor", f"{url}?synchronous=NORMAL")
    assert "the file is sound" in said


def test_looking_makes_no_queue_and_a_wrong_broker_is_told(box: Box, tmp_path: Path) -> None:
    said = run(box, "stats", "--broker", f"sqlite:{tmp_path}/none.db", code=1)
    assert said.startswith(f"daemonkit: open {tmp_path}/none.db: no queue is there")
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("no database " * 1000)
    assert "it is no SQLite file, or damaged" in run(box, "stats", "--broker", f"sqlite:{tmp_path}/text.db", code=1)
    assert "did you mean sqlite:?" in run(box, "stats", "--broker", "sqlit:/x", code=2)
    assert "the path must begin with /" in run(box, "stats", "--broker", "sqlite:x", code=2)
    assert "one / begins the path, as in sqlite:/x/y.db" in run(box, "stats", "--broker", "sqlite:///x/y.db", code=2)
    assert "queue 'a b'" in run(box, "put", "a b", "x", code=2)


def test_a_full_disk_is_told_to_the_producer_and_what_was_there_stays(box: Box, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("needs to be allowed to mount")
    try:
        url = f"sqlite:{small}/queue.db"
        run(box, "put", "mail", "kept", "--broker", url)
        done = box.call("queue", "put", "mail", "-", "--broker", url, input="x" * 1_000_000)
        assert done.returncode == 1
        assert "make room on the disk" in done.stderr
        assert "body: kept" in run(box, "peek", "mail", "--broker", url)
        assert "A BOOT LOSES ALL: tmpfs" in run(box, "doctor", url)
        assert run(box, "doctor", "--broker", url) == run(box, "doctor", url)
        box.start("@task\ndef say(): pass\n", "--broker", url)
        assert box.log.read_text().count(f"WARNING daemonkit.queue: the tasks at {url}: A BOOT LOSES ALL: tmpfs") == 1
        assert box.call("kill", "beat").returncode == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)
