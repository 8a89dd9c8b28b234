from __future__ import annotations

import pytest

from deploy.errors import (
    ArtifactError,
    ConfigError,
    ParityError,
    RoloraError,
    StageOrderError,
    UnsupportedModelError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (StageOrderError, 3),
        (ArtifactError, 4),
        (UnsupportedModelError, 5),
        (ParityError, 6),
    ],
)
def test_exit_code_tells_the_kind_of_fault(error: type[RoloraError], code: int) -> None:
    assert issubclass(error, RoloraError)
    assert error("any").exit_code == code


def test_every_error_has_its_own_exit_code() -> None:
    kinds = [RoloraError, *RoloraError.__subclasses__()]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


def test_one_fault_is_one_line() -> None:
    assert str(ConfigError.from_faults("recipe.toml", ["rank is 0"])) == "recipe.toml: rank is 0"


def test_several_faults_are_listed_together() -> None:
    error = ConfigError.from_faults("recipe.toml", ["rank is 0", "scheme is W3A3"])
    assert str(error) == "recipe.toml: 2 faults:\n  - rank is 0\n  - scheme is W3A3"
