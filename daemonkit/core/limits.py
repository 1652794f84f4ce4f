"""How many descriptors this process may have."""

from __future__ import annotations


def raise_descriptors(wanted: int) -> None:
    """Let us have ``wanted`` descriptors, or as many as we may without asking root (getrlimit(2), RLIMIT_NOFILE)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
