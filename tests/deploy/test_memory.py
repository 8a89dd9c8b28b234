"""Memory that was freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.memory import peak_memory_bytes, release_free_memory

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
import numpy as np
from deploy.memory import release_free_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

# Many blocks with a living one between each two: freed, they stay in the heap.
blocks = [np.ones(3000) for _ in range(8000)]
living = blocks[::2]
del blocks
before = resident()
if sys.argv[1] == "release":
    release_free_memory()
print(before - resident())
"""


def freed_bytes(choice: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, choice],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_releasing_returns_pages_that_would_otherwise_stay() -> None:
    assert freed_bytes("release") > 40_000_000
    assert freed_bytes("keep") < 10_000_000


def test_releasing_twice_does_no_harm_and_the_peak_never_falls() -> None:
    before = peak_memory_bytes()
    release_free_memory()
    release_free_memory()
    assert peak_memory_bytes() >= before > 10_000_000


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_the_peak_is_a_program_s_own_and_not_that_of_the_process_that_started_it() -> None:
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    program = "from deploy.memory import peak_memory_bytes as peak; a = peak(); b = b'x' * 10**8; "
    result = subprocess.run(
        [sys.executable, "-c", program + "print(a, peak())"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, result.stdout.split())
    assert peak_memory_bytes() > 300_000_000
    assert before < 100_000_000 < after
