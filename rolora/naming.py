"""Errors that say which module they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(fqn: str) -> Iterator[None]:
    """Put the name of a module in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{fqn}: {error}") from error
