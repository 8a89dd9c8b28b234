"""This process's memory: its peak, and giving back to the system what was freed."""

from __future__ import annotations

import ctypes
import functools
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def peak_memory_bytes() -> int:
    """Return the largest resident set that this process has had so far.

    Linux hands what `getrusage` gives on to a program that a large process starts; VmHWM is the
    program's own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Ask the C library to return freed pages to the system; does nothing where it cannot.

    Quantizing frees and allocates blocks of every size by turns. glibc keeps what lies between two
    living blocks, which had grown to four times the model after 30 layers.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return function
