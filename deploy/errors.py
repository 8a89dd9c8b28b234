"""The faults a user can meet, each with the exit code that tells a script which kind it was.

Every message says where (file, key or dotted module name), what was expected, what was found, and
what to do. Any other exception that reaches the command line is a bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class RoloraError(Exception):
    """A fault outside the program: the user, the input or the machine can mend it."""

    exit_code: ClassVar[int] = 1


class ConfigError(RoloraError):
    """An option, a recipe field or a data row that cannot be used as given."""

    exit_code: ClassVar[int] = 2

    @classmethod
    def from_faults(cls, where: str, faults: Sequence[str]) -> ConfigError:
        """Return one error that lists all faults, so that a user mends them in one go.

        Args:
            where: file or command that holds the faults.
            faults: one sentence a fault; at least one.
        """
        if len(faults) == 1:
            return cls(f"{where}: {faults[0]}")
        lines = "".join(f"\n  - {fault}" for fault in faults)
        return cls(f"{where}: {len(faults)} faults:{lines}")


class StageOrderError(RoloraError):
    """A stage was given an artifact that another stage must take first."""

    exit_code: ClassVar[int] = 3


class ArtifactError(RoloraError):
    """A file that is missing, damaged, unreadable or could not be written."""

    exit_code: ClassVar[int] = 4


class UnsupportedModelError(RoloraError):
    """A model of a family, or with a feature, that the package does not handle."""

    exit_code: ClassVar[int] = 5


class ParityError(RoloraError):
    """A result that lies outside its stated bound."""

    exit_code: ClassVar[int] = 6
