"""daemonkit unit"""

from __future__ import annotations
