"""A URL of a broker or coordinator as it may be shown: without its passwords."""

from __future__ import annotations

import re
from typing import Final

# To the last @: a password may hold others, and the rest of what means something in a URL, too.
_USER: Final = re.compile(r"\A([A-Za-z][A-Za-z0-9+.-]*:)?(/*).*@", re.DOTALL)
_OPTION: Final = re.compile(r"([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)


def shown(url: str) -> str:
    """``url`` for logs and people."""
    return _OPTION.sub(r"\1***", _USER.sub(r"\1\2***@", url))
