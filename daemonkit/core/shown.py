"""A broker's URL as it may be shown: without its passwords."""

from __future__ import annotations

import re
from typing import Final

_USER: Final = re.compile(r"//.*@")  # to the last one: a password may hold others
_OPTION: Final = re.compile(r"([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def shown(url: str) -> str:
    """``url`` for logs and people."""
    return _OPTION.sub(r"\1***", _USER.sub("//***@", url))
