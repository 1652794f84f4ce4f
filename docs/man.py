"""Write what the documentation has in common with the program, from the program itself.

    python docs/man.py           print the man page daemonkit(1), for docs/daemonkit.1
    python docs/man.py tables    renew the tables in README.rst and docs/guide.rst

The commands' help texts and ``daemonkit.config.options.OPTIONS`` are the one source of both.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import click

from daemonkit import __version__
from daemonkit.cli import ALIASES, COMMANDS, group
from daemonkit.config.file import CONFIG_VARIABLE, LOCAL_FILE, SYSTEM_FILE
from daemonkit.config.options import BY_KEY, OPTIONS, Option

DOCS: Final = Path(__file__).parent
TABLED: Final = (DOCS.parent / "README.rst", DOCS / "guide.rst")

Rows = list[tuple[str, str]]

# Arguments that may be left out; all others are wanted, unless the script is its own command.
OPTIONAL: Final = {("status", "name"), ("pause", "job"), ("resume", "job")}

# Options that are read and checked, and that nothing in this version acts upon.
WITHOUT_EFFECT: Final[frozenset[str]] = frozenset()

SIGNALS: Final[Rows] = [
    (
        "TERM, INT",
        "Stop: finish the job in hand, within graceful_timeout; run the stop hooks; remove the PID file.",
    ),
    ("QUIT, or a second TERM", "Stop at once: the job in hand is interrupted, no stop hooks are run."),
    ("HUP", "Reload: reopen the log, read the configuration, run the reload hooks."),
    ("USR1", "Reopen the log and write a status report into it."),
    ("USR2", "Execute the new code in place: same PID, lock never released, listening sockets kept."),
    ("TTIN, TTOU", "One worker more, one less, of those that the script declares first."),
    ("ALRM, CHLD, IO", "daemonkit's own."),
]

EXIT_CODES: Final[Rows] = [
    ("0", "Done; also start of a script that runs already, and kill of what does not run."),
    ("1", "Failed; the reason is on stderr."),
    ("2", "Wrong use: an unknown option or wrong value, also in the configuration or in a declaration of the script."),
    ("4", "No permission: the daemon or its files belong to another user."),
    ("7", "The daemon that was to be asked does not run."),
]

STATUS_CODES: Final[Rows] = [
    ("0", "It runs."),
    ("1", "It is dead, and its PID file is left."),
    ("3", "It does not run."),
    ("4", "Unknown: the PID file cannot be read, or somebody else holds its lock."),
]

DAEMON_CODES: Final[Rows] = [
    ("0", "It was stopped, and all went well."),
    ("1", "It was not started, code had to be interrupted to stop it, a stop hook failed, or the main loop raised."),
    ("2", "It was not started: wrong use, as above."),
    ("N", "The script's own main loop, or its handler of a signal, called sys.exit(N)."),
]

FILES: Final[Rows] = [
    (LOCAL_FILE, "The configuration, in the working directory of the start."),
    (SYSTEM_FILE, "The configuration, if there is none in the working directory."),
    ("/run/daemonkit", "The run directory of root's daemons."),
    ("$XDG_RUNTIME_DIR/daemonkit, /tmp/daemonkit-UID", "The run directory of other users' daemons (mode 0700)."),
    (
        "RUN_DIR/NAME.pid",
        "PID and newline, under a lock for the daemon's whole life.  A single newline without a lock is the mark "
        "of a clean end by a daemon that may not unlink here.",
    ),
    ("RUN_DIR/NAME.sock", "The control socket, mode 0600.  Only root and the daemon's user are heard."),
    (
        "RUN_DIR/NAME.ipc, RUN_DIR/_scripts.ipc",
        "System V objects that the daemon, or scripts that are none, have made; there only as long as there are some.",
    ),
    ("/var/log/daemonkit/NAME.log", "The log of root's daemons."),
    ("$XDG_STATE_HOME/daemonkit/NAME.log", "The log of other users' daemons (default ~/.local/state/daemonkit)."),
]

ENVIRONMENT: Final[Rows] = [
    (CONFIG_VARIABLE, "The configuration file, as --config."),
    ("XDG_RUNTIME_DIR, XDG_STATE_HOME, HOME", "Where the files of other users than root are."),
    ("TZ", "The time zone of cron jobs that name none."),
    ("NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS", "Set by systemd: readiness, watchdog, sockets handed over."),
    ("_DAEMONKIT_COMPLETE", "bash_source, zsh_source or fish_source: print the completion for that shell."),
]

EXAMPLES: Final[Rows] = [
    (
        "Start a script, watch it, stop it:",
        "daemonkit start heartbeat.py\ndaemonkit logs -f heartbeat\ndaemonkit kill heartbeat",
    ),
    ("Give it another name, and arguments of its own:", "daemonkit start --name west -- poller.py --region west"),
    (
        "See what would run, without starting anything:",
        "daemonkit check heartbeat.py\ndaemonkit timetable heartbeat.py --for 24h",
    ),
    (
        "Install it as a systemd service:",
        "daemonkit unit --systemd heartbeat.py > /etc/systemd/system/heartbeat.service",
    ),
    ("Complete commands in bash:", 'eval "$(_DAEMONKIT_COMPLETE=bash_source daemonkit)"'),
]

_SPECIAL: Final = {"\\": "\\e", "^": "\\(ha", "~": "\\(ti", "'": "\\(aq", "`": "\\(ga", '"': "\\(dq"}


# --- troff ---


def man() -> str:
    """The whole page."""
    sections: list[tuple[str, Iterable[str]]] = [
        ("NAME", [r"daemonkit \- turn a Python script into a Unix daemon"]),
        ("SYNOPSIS", _synopsis()),
        ("DESCRIPTION", _description()),
        ("COMMANDS", _commands()),
        ("OPTIONS", _options()),
        ("EXIT STATUS", _exit_status()),
        ("SIGNALS", ["What the daemon does on a signal, unless the script handles it:", *_list(SIGNALS)]),
        ("FILES", _list(FILES)),
        ("ENVIRONMENT", _list([("DAEMONKIT_KEY", "Any option: " + ", ".join(o.env for o in OPTIONS)), *ENVIRONMENT])),
        ("EXAMPLES", _examples()),
        ("SEE ALSO", [r".BR daemon (7),", r".BR signal (7),", r".BR cron (8),", r".BR systemd.service (5)"]),
    ]
    lines = [
        r".\" Made by docs/man.py; change the help texts and the options, not this file.",
        f'.TH DAEMONKIT 1 "" "daemonkit {__version__}" "User Commands"',
        ".nh",
        ".ad l",
    ]
    for title, body in sections:
        lines += [f".SH {title}" if " " not in title else f'.SH "{title}"', *body]
    return "\n".join(lines) + "\n"


def verbatim(text: str) -> str:
    """``text`` with every character as it is."""
    plain = "".join(_SPECIAL.get(character, character) for character in text).replace("-", r"\-")
    return rf"\&{plain}" if plain.startswith((".", "'")) else plain


def prose(text: str) -> str:
    """``text`` as a paragraph; in it flags, file names and commands keep their hyphens."""
    words = " ".join(text.split()).split(" ")
    return " ".join(verbatim(w) if w.lstrip("(").startswith("-") or "/" in w else _hyphenated(w) for w in words)


def _hyphenated(word: str) -> str:
    plain = "".join(_SPECIAL.get(character, character) for character in word)
    return rf"\&{plain}" if plain.startswith((".", "'")) else plain


def _list(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [line for term, text in rows for line in (".TP", rf"\fB{verbatim(term)}\fR", prose(text))]


def _synopsis() -> Iterator[str]:
    for name in COMMANDS:
        yield from (rf"\fBdaemonkit {name}\fR [\fIOPTION\fR]... {_arguments(name)}".rstrip(), ".br")
    yield r"\fBpython\fR \fISCRIPT\fR \fICOMMAND\fR [\fIOPTION\fR]..."


def _description() -> Iterator[str]:
    blocks = _blocks(group.help or "")
    next(blocks)  # the first sentence is the NAME section's
    yield prose(
        "daemonkit starts Python scripts that use its decorators as daemons, and looks after them.  A script whose "
        "last line calls main() is a command itself, with the same subcommands; it is not named then."
    )
    for text, is_verbatim in blocks:
        yield from _verbatim_block(text) if is_verbatim else (".PP", prose(text))


def _commands() -> Iterator[str]:
    aliases = {target: name for name, target in ALIASES.items()}
    for name in COMMANDS:
        also = rf" (also \fB{aliases[name]}\fR)" if name in aliases else ""
        title = f"{name} {_arguments(name)}".rstrip()
        yield f'.SS "{title}{also}"'
        command = command_named(name)
        for number, (text, is_verbatim) in enumerate(_blocks(command.help or "")):
            if is_verbatim:
                yield from _verbatim_block(text)
            else:
                yield from ([".PP"] if number else []) + [prose(text)]
        yield from _list(_own_options(command))
        if isinstance(command, click.Group):
            yield from _list(_subcommands(name, command))
        if shared := _shared_options(command):
            yield from (".PP", prose(f"Options below: {shared}."))


def _subcommands(name: str, group: click.Group) -> Iterator[tuple[str, str]]:
    for sub, command in group.commands.items():
        words = [_word(each) for each in command.params if isinstance(each, click.Argument)]
        own = "  ".join(f"{spelling}: {text}" for spelling, text in _own_options(command))
        shared = _shared_options(command)
        text = " ".join(inspect.cleandoc(command.help or "").split("\n\n\b")[0].split())
        yield (
            " ".join([name, sub, *words]),
            "  ".join(filter(None, [text, own, f"Options below: {shared}." if shared else ""])),
        )


def _word(argument: click.Argument) -> str:
    word = argument.metavar or str(argument.name).upper()
    return word if argument.required else f"[{word}]"


def _options() -> Iterator[str]:
    yield prose(
        "An option may be given on the command line, as a variable in the environment, and as a key in the "
        "configuration file, in the table [daemon] for all daemons or [daemon.NAME] for one.  The command line is "
        "stronger than the environment, that than the file, that than what the script asks for."
    )
    yield from _list([("--config FILE", "Read this configuration file.  An unknown key in it is an error.")])
    for option in OPTIONS:
        yield from (".TP", rf"\fB{verbatim(option.flag)}\fR \fI{option.metavar}\fR", prose(describe(option)))


def _exit_status() -> Iterator[str]:
    yield from _list(EXIT_CODES)
    yield from (".PP", r"\fBdaemonkit status\fR:", *_list(STATUS_CODES))
    yield from (".PP", r"\fBdaemonkit run\fR has the exit code of the daemon:", *_list(DAEMON_CODES))


def _examples() -> Iterator[str]:
    for text, commands in EXAMPLES:
        yield from (".PP", prose(text), *_verbatim_block(commands))


def _verbatim_block(text: str) -> list[str]:
    return [".PP", ".nf", ".RS", *map(verbatim, text.splitlines()), ".RE", ".fi"]


def _arguments(name: str) -> str:
    words = ["COMMAND [ARG]..."] if isinstance(command_named(name), click.Group) else []
    for parameter in command_named(name).params:
        if isinstance(parameter, click.Argument):
            word = parameter.metavar or str(parameter.name).upper()
            words.append(f"[{word}]" if (name, parameter.name) in OPTIONAL else word)
    return re.sub(r"[A-Z]+", lambda match: rf"\fI{match[0]}\fR", " ".join(words))


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """The paragraphs of a help text, and whether each is to stay as it is (click's ``\\b``)."""
    for block in inspect.cleandoc(text).split("\n\n"):  # Python 3.13 does that itself
        if block.startswith("\b\n"):
            yield inspect.cleandoc(block.removeprefix("\b\n")), True
        elif block.strip():
            yield block, False


# --- what the program says of itself ---


def command_named(name: str) -> click.Command:
    """The subcommand ``name``."""
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return command


def flags(command: click.Command) -> list[str]:
    """All spellings of a command's options, and of its subcommands'."""
    commands = [command, *(command.commands.values() if isinstance(command, click.Group) else ())]
    options = [each for one in commands for each in one.params if isinstance(each, click.Option)]
    return [spelling for option in options for spelling in option.opts]


def describe(option: Option[object]) -> str:
    """An option's sentence, with unit, default and what it does not do."""
    details = [option.unit] if option.unit else []
    details += [f"default {option.default}"] if option.default is not None else []
    text = option.doc + (f"  ({'; '.join(details)})" if details else "")
    return text + ("  Without effect in this version." if option.key in WITHOUT_EFFECT else "")


def _own_options(command: click.Command) -> Rows:
    rows = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not _is_shared(parameter):
            metavar = f" {parameter.metavar}" if parameter.metavar else ""
            shown = f"  (default {_number(parameter.default)})" if parameter.show_default else ""
            rows.append((", ".join(sorted(parameter.opts, key=len)) + metavar, (parameter.help or "") + shown))
    return rows


def _number(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shared_options(command: click.Command) -> str:
    shared = [p.opts[0] for p in command.params if isinstance(p, click.Option) and _is_shared(p)]
    return "all" if len(shared) > len(OPTIONS) else ", ".join(shared)


def _is_shared(parameter: click.Option) -> bool:
    key = str(parameter.name)
    return key == "config_path" or (key in BY_KEY and parameter.help == BY_KEY[key].doc)


# --- tables in reStructuredText ---


def options_table() -> str:
    """Every option, for the guide."""
    rows = [(f"``{o.key}``", f"``{o.flag} {o.metavar}``", _default(o), _meaning(o)) for o in OPTIONS]
    return _table(("Key", "Flag", "Default", "Meaning"), rows)


def signals_table() -> str:
    """Every signal."""
    return _table(("Signal", "Default"), SIGNALS)


def commands_table() -> str:
    """Every subcommand."""
    rows = [(f"``{name}``", text) for name, text in COMMANDS.items()]
    return _table(("Command", "Does"), rows)


def exit_codes_table() -> str:
    """What the command's exit codes mean."""
    rows = [("all commands", *row) for row in EXIT_CODES] + [("``status``", *row) for row in STATUS_CODES]
    return _table(("Command", "Code", "Meaning"), rows + [("``run``", *row) for row in DAEMON_CODES])


TABLES: Final[dict[str, Callable[[], str]]] = {
    "options": options_table,
    "signals": signals_table,
    "commands": commands_table,
    "exit codes": exit_codes_table,
}


def renewed(text: str) -> str:
    """``text`` with each table between its marks made anew."""
    for name, make in TABLES.items():
        begin, end = f".. begin {name}\n", f".. end {name}\n"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'*' if number == 0 else ' '} - {cell}".rstrip() for number, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def _default(option: Option[object]) -> str:
    return "" if option.default is None else f"``{option.default}``"


def _meaning(option: Option[object]) -> str:
    text = option.doc + (f" Written as {option.unit}." if option.unit else "")
    return text + (" *Without effect in this version.*" if option.key in WITHOUT_EFFECT else "")


def main(arguments: list[str]) -> None:
    """Print the page, or renew the tables."""
    if arguments == ["tables"]:
        for path in TABLED:
            path.write_text(renewed(path.read_text()))
    else:
        sys.stdout.write(man())


if __name__ == "__main__":
    main(sys.argv[1:])
