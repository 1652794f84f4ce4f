"""The daemon's one thread: what each signal, hook and due job leads to, from ready to gone."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from daemonkit import config
from daemonkit.api import Daemon
from daemonkit.config.options import OPTIONS, stop_schedule_as_text
from daemonkit.core import timerfd
from daemonkit.core.job import Job, Policy
from daemonkit.core.schedule import Cron, Every
from daemonkit.core.signals import TERMINATION, WAKING
from daemonkit.core.stop import HOOK_GRACE, StopNow
from daemonkit.errors import DaemonkitError, told
from daemonkit.master.parts import Parts
from daemonkit.master.status import describe
from daemonkit.master.upgrade import Upgrade
from daemonkit.report import as_text
from daemonkit.script import Script

if TYPE_CHECKING:
    from daemonkit.cluster.leadership import Page
    from daemonkit.cluster.watching import Value
    from daemonkit.master.crew import Crew, Done
    from daemonkit.master.leading import Leading
    from daemonkit.master.place import Place

log = logging.getLogger("daemonkit")

DEFAULT_SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGCHLD,
    signal.SIGIO,  # a script's own main loop is served by it, and it may outlive a re-exec on inherited descriptors
)


class Master:
    """Runs one script's declarations."""

    def __init__(self, parts: Parts, script: Script, default: Daemon) -> None:
        """Put the parts together; nothing of the script is called yet."""
        self.parts = parts
        self.script = script
        self.configuration = parts.configuration
        self.upgrade = Upgrade(self)
        self.crew: Crew | None = None  # made, and loaded, only for a script that needs children
        self.leading: Leading | None = None  # the same for one that is in a cluster
        self.ready_at: float | None = None  # seconds since the epoch; None: still starting
        self.exit_code = 0
        self._default = default
        self._is_stopping = False

    def start(self) -> str | None:
        """Run the `start` hooks; the first error is returned, as text, and ends the start."""
        for number in self.script.handlers:
            # A TERM that the script handles itself is no request to stop: it must not start the clock of one.
            if isinstance(number, int) and (number not in DEFAULT_SIGNALS or number in TERMINATION):
                self.parts.signals.catch(number)
        for number in self.parts.signals.drop_unclaimed():
            name = signal.Signals(number).name
            log.warning("%s came while the code was replaced, and the new code does not handle it: ignored", name)
        self.parts.signals.unblock_all()
        self._publish()
        for hook in self.script.handlers.get("fork", ()):
            os.register_at_fork(after_in_child=hook)
        for hook in self.script.handlers.get("start", ()):
            if error := self.call("start hook", hook):
                return error
        return "stopped before it was ready" if self.parts.signals.stop.signal else None

    def serve(self) -> int:
        """Be the daemon until it is stopped; return its exit code."""
        parts = self.parts
        self.ready_at = self.ready_at or time.time()
        self._watch_clock()
        self._watchdog()
        parts.timer.on_fallback = lambda fd: parts.loop.watch(fd, lambda _: timerfd.acknowledge(fd))
        if self.crew:
            self.crew.begin(self.configuration.options)
        parts.timer.begin(self.script.jobs.values())
        if self.script.main_loop is None:
            while not self._is_stopping:
                self._turn()
        else:
            from daemonkit.master.ownloop import OwnLoop

            OwnLoop(self).run(self.script.main_loop)
        return self._finish()

    def _turn(self) -> None:
        more = self.parts.timer.run_due()
        self.parts.loop.turn(wait=not more)
        self.act_on_signals()

    @property
    def is_stopping(self) -> bool:
        """Whether the daemon is on its way out."""
        return self._is_stopping

    def act_on_signals(self) -> None:
        """Do what the signals that came since the last call are for."""
        for number in self.parts.signals.take():
            if number in WAKING and number not in self.script.handlers:
                continue  # they only wake; what is due is read off the clock, who ended is told by pidfds
            self.act_on(number)

    def act_on(self, number: int, done: Done | None = None) -> str | None:
        """Do what signal ``number`` is for; return the first error, as text.

        Without an error ``done`` is told when all is done: workers are replaced one after the other.
        """
        if number in (signal.SIGHUP, signal.SIGUSR1):
            self.reopen_log()
        if hooks := self.script.handlers.get(number):
            errors = [self._call_handler(signal.Signals(number).name, hook) for hook in hooks]
            error = next(filter(None, errors), None)
        else:
            default = self._defaults.get(number)
            error = default(self) if default else None
        if error is None and number == signal.SIGHUP and self.crew:
            self.crew.reload(lambda error: self._tell_reloaded(error, done))
        elif error is None and done:
            done(None)
        return error

    def stop(self) -> None:
        """Leave the loop after the code in hand."""
        self._is_stopping = True

    def reload(self) -> str | None:
        """Read the configuration again and run the `reload` hooks; return the error, the old one staying."""
        parts, handover = self.parts, self.parts.handover
        parts.notifier.reloading()
        try:
            fresh = config.load(
                handover.name,
                command_line=handover.command_line,
                environ=handover.environ,
                script=self.script.options,
                config_path=handover.config_path,
                cwd=handover.cwd,
                uid=handover.uid,
                overlay=handover.overlay,
            )
        except DaemonkitError as error:
            log.error("reload: %s; the old configuration stays", error)
            self._tell_reloaded(str(error))
            return str(error)
        old, self.configuration = self.configuration, fresh
        self._publish()
        self._say_what_must_wait(old, fresh)
        failure = next(
            (e for hook in self.script.handlers.get("reload", ()) if (e := self.call("reload hook", hook))), None
        )
        if failure:
            self.configuration = old
            self._publish()
        log.info("reload failed; the old configuration stays" if failure else "reloaded")
        if failure or not self.crew:
            self._tell_reloaded(failure)
        return failure

    def _tell_reloaded(self, error: str | None, done: Done | None = None) -> None:
        if not self._is_stopping:
            self.parts.notifier.ready(f"reload failed: {error}" if error else "reloaded")
        if done:
            done(error)

    def _say_what_must_wait(self, old: config.Configuration, fresh: config.Configuration) -> None:
        """An option that was settled before the script was loaded is not changed by a reload."""
        for option in OPTIONS:
            if not option.late and getattr(old.options, option.key) != getattr(fresh.options, option.key):
                log.warning("reload: %s has changed, and takes effect at the next start", option.key)

    def reopen_log(self) -> None:
        """Open the log file anew, after a rotation."""
        try:
            self.parts.sink.reopen()
        except OSError as error:
            log.error("reopen the log: %s; the old one stays open", error)

    def write_report(self) -> None:
        """Write the status into the log."""
        log.info("status\n%s", as_text(describe(self), self.configuration.options.name or ""))

    def call(self, what: str, function: Callable[[], Any]) -> str | None:
        """Call the script's ``function``; log what it raises, and return that as text."""
        parts, name = self.parts, f"{what} {getattr(function, '__name__', function)}"
        try:
            parts.board.enter(name, time.monotonic_ns())
            with parts.signals.interruptible():
                function()
        except StopNow:
            log.error("%s: interrupted, the time to finish was up", name)
            return f"{name}: interrupted by a stop"
        except BaseException as error:  # the script's failure is told and counted, it does not end the daemon
            log.exception("%s failed", name)
            return f"{name}: {told(error)}"
        finally:
            parts.board.leave()
        return None

    def wind_up(self) -> None:
        """Run the `stop` hooks, with a time of their own if what was in hand has used up the one to stop."""
        signals = self.parts.signals
        if not signals.stop.at_once:
            signals.stop.grant(HOOK_GRACE)
            self.run_stop_hooks()

    def end_children(self) -> None:
        """Let workers and forked jobs finish what they have in hand, within graceful_timeout."""
        parts, stop = self.parts, self.parts.signals.stop
        if self.leading:
            self.leading.stop()
        if self.crew is None:
            return
        parts.timer.retire(self.script.jobs.values())
        if stop.deadline is None:
            stop.set_deadline(stop.graceful_timeout)
        assert stop.deadline is not None
        self.crew.stop(stop.deadline, lambda: stop.at_once, self._turn)

    def resume(self) -> None:
        """Go on after all: jobs back on their grids, children anew."""
        self.parts.timer.begin(job for job in self.script.jobs.values() if job.planned is not None)
        if self.crew:
            self.crew.resume()

    def _call_handler(self, name: str, handler: Callable[[], Any]) -> str | None:
        """Call the script's handler for a signal; sys.exit() in it means what it says: stop, with that code."""

        def called() -> None:
            try:
                handler()
            except SystemExit as error:
                self.exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
                self.stop()

        called.__name__ = getattr(handler, "__name__", repr(handler))
        return self.call(f"{name} handler", called)

    def run_stop_hooks(self) -> None:
        """Run the `stop` hooks, each once, within what is left of the time to stop."""
        for hook in self.script.handlers.pop("stop", ()):
            if self.call("stop hook", hook):
                self.exit_code = self.exit_code or 1

    def _finish(self) -> int:
        """Stop hooks, then nothing of the daemon is left but its PID file, which the image removes."""
        parts = self.parts
        parts.board.state("stopping")
        parts.notifier.stopping()
        parts.notifier.extend_timeout(self.configuration.options.graceful_timeout + HOOK_GRACE)
        self._is_stopping = True
        self.upgrade.give_up()
        log.info("stopping%s", f" on {signal.Signals(n).name}" if (n := parts.signals.stop.signal) else "")
        self.end_children()
        parts.timer.disarm()
        self.wind_up()
        if parts.signals.stop.interrupted:
            self.exit_code = self.exit_code or 1
        log.info("stopped")
        return self.exit_code

    def _publish(self) -> None:
        """Let the rest of the process see the configuration in force."""
        options = self.configuration.options
        if self.crew:
            self.crew.configure(options)
        self.parts.signals.stop.graceful_timeout = options.graceful_timeout
        self.parts.board.tell(stop_schedule=stop_schedule_as_text(options.stop_schedule))
        logging.getLogger().setLevel(options.log_level)
        self._default.settings = self.configuration.settings
        if isinstance(self.script, Daemon):
            self.script.settings = self.configuration.settings

    def _watch_clock(self) -> None:
        if any(isinstance(job.schedule, Cron) for job in self.script.jobs.values()):
            fd = timerfd.on_clock_step()

            def stepped(_: int) -> None:
                timerfd.acknowledge(fd)
                timerfd.watch_clock(fd)
                self.parts.timer.clock_stepped()

            self.parts.loop.watch(fd, stepped)

    def _watchdog(self) -> None:
        """The loop itself tells the service manager that it turns: a job that hangs is seen."""
        notifier = self.parts.notifier
        if notifier.watchdog_interval is None:
            return
        beat = Job("watchdog", notifier.watchdog, Every(int(notifier.watchdog_interval * 1e9), 0), Policy())
        self.parts.timer.begin([beat])

    def _on_upgrade(self) -> None:
        self.upgrade.begin()

    def hire(self, close: Callable[[], None]) -> None:
        """Fork the fork server, before anything of the user's has run but the import; ``close``: see ``Crew.fork``."""
        from daemonkit.master.crew import Crew

        self.crew = Crew(self.parts, self.script, self._lost_essential)
        self.crew.fork(close)

    def join_cluster(self, page: Page) -> None:
        """Let jobs and workers depend on whether the daemon leads, which ``page`` tells."""
        from daemonkit.master import leading

        assert self.crew is not None
        self.leading = leading.begin(self, page)

    def take_value(self, number: int, value: Value) -> None:
        """A value in the cluster has changed: of the script's ``watches``, or behind them of the configuration."""
        if number < len(self.script.watches):
            _, func = self.script.watches[number]
            self.call(f"watch of {value.path}:", partial(func, value))
            return
        overlay, known = (
            [] if value.data is None else [value.data.decode(errors="replace")],
            self.parts.handover.overlay,
        )
        if overlay == known:
            return
        log.info("the configuration at %s in the cluster has changed", value.path)
        before, known[:] = list(known), overlay  # the fork servers' images are handed it, too
        if self.act_on(signal.SIGHUP):
            known[:] = before

    def need_crew(self) -> Crew:
        """The crew; a script that has declared no children gets one whose fork server is a fresh image."""
        if self.crew is None:
            from daemonkit.master.crew import Crew

            self.crew = Crew(self.parts, self.script, self._lost_essential)
            self.crew.begin(self.configuration.options)
        return self.crew

    def _lost_essential(self, place: Place) -> None:
        log.critical("worker %s is essential: the daemon ends", place.name)
        self.exit_code = 1
        self.stop()

    def _more(self) -> None:
        self._scale_by(1)

    def _fewer(self) -> None:
        self._scale_by(-1)

    def _scale_by(self, step: int) -> None:
        if self.crew:
            self.crew.scale_by(step)
        else:
            log.info("there are no workers to add or remove")

    _defaults: Final[dict[int, Callable[[Master], str | None]]] = {
        int(signal.SIGTERM): stop,
        int(signal.SIGINT): stop,
        int(signal.SIGQUIT): stop,
        int(signal.SIGHUP): reload,
        int(signal.SIGUSR1): write_report,
        int(signal.SIGUSR2): _on_upgrade,
        int(signal.SIGTTIN): _more,
        int(signal.SIGTTOU): _fewer,
    }
