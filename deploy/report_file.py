"""Reports that a user asked for as a file of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.errors import ArtifactError, ConfigError


def require_place(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work that it is to report.

    Args:
        option: That named it.
        path: The file; None is none.

    Raises:
        ConfigError: Its directory is not there, or it is a directory itself.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        found = "it is a directory" if path.is_dir() else f"{path.parent} is no directory"
        raise ConfigError(f"{option} {path}: expected the path of a file to write, but {found}")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, over an older one.

    Raises:
        ArtifactError: The system refuses.
    """
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror})") from error
