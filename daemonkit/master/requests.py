"""What the control socket may be asked, one function a request."""

from __future__ import annotations

import logging
import os
import signal
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daemonkit.control import Client
from daemonkit.core.asking import Message
from daemonkit.core.job import Job
from daemonkit.errors import told
from daemonkit.master.status import describe, describe_jobs

if TYPE_CHECKING:
    from daemonkit.master.master import Master

log = logging.getLogger("daemonkit")

Answer = dict[str, Any] | None


def serve(master: Master, message: Message, client: Client) -> None:
    """Answer ``message``; a request that takes time answers later itself."""
    handler = _REQUESTS.get(message["do"])
    if handler is None:
        answer: Answer = {"ok": False, "error": f"no such request: {message['do']!r}"}
    else:
        try:
            answer = handler(master, message, client)
        except Exception as error:  # whoever asked is told; the daemon goes on
            log.exception("the request %s failed", message["do"])
            answer = {"ok": False, "error": f"{message['do']}: {told(error)}"}
    if answer is not None:
        client.answer(answer)


def _status(master: Master, message: Message, client: Client) -> Answer:
    intact = master.parts.pidfile.is_intact() or master.parts.pidfile.restore()
    note = None if intact else "its PID file was replaced by another that somebody else holds"
    if master.leading is None:
        return {"ok": True, **describe(master), "note": note}
    master.leading.ask(lambda _: client.answer({"ok": True, **describe(master), "note": note}))
    return None


def _jobs(master: Master, message: Message, client: Client) -> Answer:
    return {"ok": True, "jobs": describe_jobs(master.script.jobs.values())}


def _trigger(master: Master, message: Message, client: Client) -> Answer:
    job = _job(master, message)
    if isinstance(job, dict):
        return job
    if job.gate is not None and not job.gate():
        return _outcome(f"job {job.name}: only the leader runs it, and this daemon does not lead; trigger it there")
    if job.launch is not None and master.crew:
        master.crew.jobs.trigger(job, lambda error: client.answer(_outcome(error and f"job {job.name}: {error}")))
        return None
    went_well = master.parts.timer.run(job, time.monotonic_ns())
    return {"ok": True} if went_well else {"ok": False, "error": f"job {job.name}: {job.record.last_error}"}


def _pause(master: Master, message: Message, client: Client) -> Answer:
    return _each(master, message, master.parts.timer.pause)


def _resume(master: Master, message: Message, client: Client) -> Answer:
    return _each(master, message, master.parts.timer.resume)


def _reload(master: Master, message: Message, client: Client) -> Answer:
    if error := master.act_on(signal.SIGHUP, lambda error: client.answer(_outcome(error))):
        return _outcome(error)
    return None


def _reexec(master: Master, message: Message, client: Client) -> Answer:
    master.upgrade.begin(client)
    return None


def _scale(master: Master, message: Message, client: Client) -> Answer:
    name, count = message.get("worker"), message.get("count")
    if master.crew is None:
        return _outcome(f"no worker named {name!r}; the script declares none")
    from daemonkit.processes.worker import MOST

    if not isinstance(name, str) or type(count) is not int or not 0 <= count <= MOST:
        return _outcome(f'"worker" must be a name and "count" a whole number from 0 to {MOST}')
    return _outcome(master.crew.scale(name, count))


def _background(master: Master, message: Message, client: Client) -> Answer:
    """Take in what a process has for after its response; it speaks over the descriptor that came with the request."""
    pid, fd = message.get("pid"), client.take_fd()
    if type(pid) is not int or fd < 0 or not stat.S_ISSOCK(os.fstat(fd).st_mode):
        if fd >= 0:
            os.close(fd)
        return _outcome('"pid" must be the number of who asks, and a socket must come with the request')
    try:
        master.need_crew().backgrounds.begin(pid, fd, lambda error: client.answer(_outcome(error)))
    finally:
        os.close(fd)
    return None


def _launch(master: Master, message: Message, client: Client) -> Answer:
    """How it was started, for `restart`."""
    handover = master.parts.handover
    keys = (
        "detached",
        "target",
        "is_module",
        "args",
        "cwd",
        "command_line",
        "environ",
        "config_path",
        "script_options",
    )
    return {"ok": True, **{key: getattr(handover, key) for key in keys}}


def _outcome(error: str | None) -> dict[str, Any]:
    return {"ok": False, "error": error} if error else {"ok": True}


def _each(master: Master, message: Message, act: Callable[[Job], None]) -> Answer:
    if message.get("job") is None:
        for job in master.script.jobs.values():
            act(job)
        return {"ok": True}
    found = _job(master, message)
    if isinstance(found, dict):
        return found
    act(found)
    return {"ok": True}


def _job(master: Master, message: Message) -> Job | dict[str, Any]:
    name, jobs = message.get("job"), master.script.jobs
    if not isinstance(name, str):
        return {"ok": False, "error": '"job" must be the name of a job'}
    if name in jobs:
        return jobs[name]
    from difflib import get_close_matches

    near = get_close_matches(name, jobs, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(list(jobs)[:20]) or 'none'}"
    return {"ok": False, "error": f"no job named {name!r}; {hint}"}


_REQUESTS: dict[str, Callable[[Any, Message, Client], Answer]] = {
    "status": _status,
    "jobs": _jobs,
    "trigger": _trigger,
    "pause": _pause,
    "resume": _resume,
    "reload": _reload,
    "reexec": _reexec,
    "scale": _scale,
    "launch": _launch,
    "background": _background,
}
