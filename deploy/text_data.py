"""Running text from whatever a user names as `--data` or `--calibration`."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from deploy.errors import ConfigError
from reslora.row_formats import Example
from reslora.rows import TEXT_SUFFIXES, read_rows


def read_text(source: str) -> str:
    """Read a source as one text.

    Args:
        source: A text file (kept to the byte), a JSONL file or a hub id (its rows, joined by blank
            lines); files may be gzipped.

    Raises:
        ConfigError: The source is missing, empty, damaged or of unknown type.
    """
    path = Path(source)
    if path.is_file() and path.name.lower().endswith(TEXT_SUFFIXES):
        return _read_text_file(path)
    try:
        return "\n\n".join(_plain_text(example) for example in read_rows(source))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _read_text_file(path: Path) -> str:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode(
            "utf-8"
        )
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: not a readable UTF-8 text ({error}); copy or re-encode it"
        ) from error
    if not text.strip():
        raise ConfigError(f"{path}: holds no text; give at least a few sentences")
    return text


def _plain_text(example: Example) -> str:
    """Return the words of an example without any chat template."""
    return "\n".join(message.content for message in example.messages) or example.text
