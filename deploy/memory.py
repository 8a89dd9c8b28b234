"""Peak memory of this process, for reports."""

from __future__ import annotations

import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident set that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
