"""What a handle refuses before it asks a broker."""

from __future__ import annotations

import math
from typing import Any

import pytest

from daemonkit.errors import UsageError
from daemonkit.queue.handle import Handle
from daemonkit.queue.outlet import Outlet


@pytest.mark.parametrize("timeout", ["1", -1, math.nan, [1]])
def test_a_time_out_of_result_that_cannot_be_meant_is_refused_in_a_sentence(timeout: Any) -> None:
    handle = Handle(Outlet(lambda: "sqlite:/nowhere/queue.db"), "mail", "1")
    with pytest.raises(UsageError, match="must be 0 or more seconds, or None"):
        handle.result(timeout)
