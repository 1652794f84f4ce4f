"""The program of a call that has an interpreter of its own."""

from __future__ import annotations

import pickle
from typing import NoReturn

from daemonkit.processes import call, interpreter
from daemonkit.processes.forkserver import Kind
from daemonkit.processes.wire import Message, Wire


def main() -> NoReturn:
    """Run the call and send its outcome."""
    (answers,) = interpreter.own_sockets(1, more=1)
    with open(interpreter.FIRST + 1, "rb") as file:
        number, settings = pickle.load(file)
        request = file.read()
    interpreter.Settings(*settings).take_over()
    call.Caller(Wire(answers)).enter(Message(Kind.SPAWN, number, request, []))
