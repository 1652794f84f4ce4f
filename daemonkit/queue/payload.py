"""A task's body: JSON, and nothing but JSON (RFC 8259), of ours or as other languages' producers push it.

Ours is ``{"task": "send_mail", "args": ["a@b.c"], "kwargs": {}}``.  Others may also send
``{"worker": "mail", "class": "send_mail", "params": ...}``: the task is ``mail.send_mail``, ``send_mail`` or ``mail``,
whichever is declared; ``params`` are its arguments: an array, an object by their names, or else the only one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from daemonkit.errors import PayloadError, UsageError

MOST: Final = 2**24  # bytes of a result, or of a progress: a server that refuses larger ones would be told for ever


class Call(NamedTuple):
    """What a body asks for."""

    names: tuple[str, ...]  # of the task; the first one that is declared is meant
    args: list[Any]
    kwargs: dict[str, Any]

    def name_among(self, declared: Collection[str]) -> str:
        """The declared task that is meant.

        Raises:
            PayloadError: there is none.
        """
        for name in self.names:
            if name in declared:
                return name
        raise PayloadError(f"no task named {self.names[0]!r} is declared")


def encode(name: str, args: Collection[Any], kwargs: dict[str, Any]) -> bytes:
    """The body of a call.

    Raises:
        UsageError: an argument is nothing that JSON has.
    """
    try:
        text = json.dumps({"task": name, "args": args, "kwargs": kwargs}, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"put {name}: {error}; arguments are sent as JSON: text, numbers, True, False, None, lists and dicts"
        ) from None


def canonical(name: str, arguments: Mapping[str, Any]) -> bytes:
    """What is the same for all calls with these arguments, in whatever order they are given."""
    sent = json.loads(json.dumps([name, arguments]))  # all keys are texts there, and so can be sorted
    return json.dumps(sent, sort_keys=True).encode()


def can_be_sent(value: object) -> bool:
    """Whether JSON has such a thing."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def encode_result(value: object) -> bytes:
    """What a task has returned, as JSON.

    Raises:
        PayloadError: JSON has no such thing, or it is too large.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(f"the result cannot be kept: {error}; results are kept as JSON") from None
    if len(text) > MOST:
        raise PayloadError(f"the result cannot be kept: {len(text)} bytes of JSON; {MOST} are the most")
    return text


def decode(body: bytes) -> Call:
    """What ``body`` asks for; nothing of it is looked up or executed.

    Raises:
        PayloadError: it is no JSON, or none of the forms.
    """
    try:
        message = _parse(body.decode())
    except UnicodeDecodeError as error:
        raise PayloadError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"not JSON: {error}") from None
    if not isinstance(message, dict):
        raise PayloadError(f"a JSON object is wanted, not {_kind(message)}")
    if "task" in message:
        return _ours(message)
    if "class" in message or "worker" in message:
        return _foreign(message)
    raise PayloadError('the object has neither "task" nor "class"')


def _ours(message: dict[str, Any]) -> Call:
    name, args, kwargs = message["task"], message.get("args", []), message.get("kwargs", {})
    if not isinstance(name, str):
        raise PayloadError(f'"task" must be a text, not {_kind(name)}')
    if not isinstance(args, list):
        raise PayloadError(f'"args" must be an array, not {_kind(args)}')
    if not isinstance(kwargs, dict):
        raise PayloadError(f'"kwargs" must be an object, not {_kind(kwargs)}')
    return Call((name,), args, kwargs)


def _foreign(message: dict[str, Any]) -> Call:
    names = [message[key] for key in ("worker", "class") if message.get(key) is not None]
    if not names or not all(isinstance(name, str) for name in names):
        raise PayloadError('"worker" and "class" must be texts')
    candidates = (".".join(names), *reversed(names))
    params = message.get("params", [])
    if isinstance(params, dict):
        return Call(candidates, [], params)
    return Call(candidates, params if isinstance(params, list) else [params], {})


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON's")


_parse: Final = json.JSONDecoder(parse_constant=_refuse_constant).decode  # json.loads would make one each time


def _kind(value: object) -> str:
    return {
        dict: "an object",
        list: "an array",
        str: "a text",
        int: "a number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }[type(value)]
