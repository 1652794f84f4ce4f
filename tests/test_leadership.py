"""The page on which all processes of a daemon read whether it leads."""

from __future__ import annotations

import subprocess
import sys

from daemonkit.cluster.leadership import Page, Terms
from daemonkit.cluster.recipe import boot_time

WRITER = """
import sys
from daemonkit.cluster.leadership import Page

page = Page(int(sys.argv[1]))
print("writes", flush=True)
while True:
    for until in map(float, sys.argv[2:]):
        page.grant(1, until)
"""


def test_who_reads_a_leadership_while_it_is_prolonged_never_sees_it_missing() -> None:
    page, moments = Page(), [boot_time() + 3600 + n / 7 for n in range(100)]
    page.grant(1, moments[0])
    program = [sys.executable, "-c", WRITER, str(page.fd), *map(repr, moments)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, pass_fds=[page.fd]) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        seen = {page.read() for _ in range(200_000)}
        writer.kill()
    assert all(terms.is_held and terms.token == 1 for terms in seen)
    assert {moment for _, *both in seen for moment in both} <= set(moments)


def test_a_leadership_that_is_revoked_keeps_its_limit_unless_another_is_given() -> None:
    page, moment = Page(), boot_time() + 3600
    page.grant(7, moment)
    page.revoke()
    assert page.read() == Terms(7, 0.0, moment)
    assert not page.read().is_held
    page.revoke(moment - 1)
    assert page.read() == Terms(7, 0.0, moment - 1)
