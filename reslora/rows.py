"""Read a data set as training examples, and split off a validation set.

Sources are a JSONL file (`.jsonl`, `.jsonl.gz`), a text file (`.txt`, `.txt.gz`) or a data set id
on the Hugging Face hub. What a row may look like is `row_formats`. A bad row raises with file and
line: silently dropping rows would train on something else than the user gave.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reslora.row_formats import Example, parse_row

__all__ = ["Example", "decoded_rows", "parse_row", "read_rows", "split_validation"]

logger = logging.getLogger(__name__)

JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
TEXT_PIECE_CHARACTERS = 4096
"""A text file becomes pieces of about this size, broken at line ends."""


def read_rows(source: str, *, split: str = "train") -> list[Example]:
    """Read all examples of a data source.

    Args:
        source: Path of a JSONL or text file (gzip or not), or a hub data set id.
        split: Split of a hub data set; ignored for files.

    Returns:
        At least one example, in file order. Empty `text` rows, which text corpora use as spacing,
        are left out and counted in the log.

    Raises:
        ValueError: The source is missing, empty, damaged or of unknown type, or a row is malformed.
    """
    path = Path(source)
    if path.is_file() and path.name.lower().endswith(TEXT_SUFFIXES):
        examples = list(_text_pieces(path))
    else:
        known = JSON_SUFFIXES + TEXT_SUFFIXES
        examples = _parse_rows(source, decoded_rows(source, split=split, known=known))
    if not examples:
        raise ValueError(f"{source}: holds no rows; give at least one example")
    return examples


def decoded_rows(
    source: str, *, split: str = "train", known: Sequence[str] = JSON_SUFFIXES
) -> Iterator[tuple[str, object]]:
    """Return (origin, decoded row) of a JSONL file or a hub data set, read as they are asked for.

    Args:
        source: Path of a JSONL file (gzip or not), or a hub data set id.
        split: Split of a hub data set; ignored for files.
        known: File types that the message about an unknown one names.

    Raises:
        ValueError: The source is missing or of unknown type; while rows are taken, that it is
            damaged.
    """
    path = Path(source)
    name = path.name.lower()
    if path.is_dir():
        raise ValueError(f"{source}: is a directory; expected a file or a hub data set id")
    if path.is_file():
        if not name.endswith(JSON_SUFFIXES):
            raise ValueError(f"{source}: unknown file type; expected one of {', '.join(known)}")
        return _json_rows(path)
    if name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES) or path.is_absolute() or source[:1] == ".":
        raise ValueError(f"{source}: no such file")
    return _hub_rows(source, split)


def split_validation(
    examples: Sequence[Any], fraction: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """Split off a validation set by a seeded shuffle.

    Args:
        examples: All examples.
        fraction: Share to hold out, in [0, 1); above 0 at least one example is held out, and at
            least one stays for training.
        seed: Equal seeds give equal splits.

    Returns:
        Training and validation examples, each in the given order.

    Raises:
        ValueError: The fraction is out of range.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"validation_fraction must be in [0, 1), got {fraction}")
    held_out = round(len(examples) * fraction)
    if fraction > 0.0:
        held_out = min(max(held_out, 1), len(examples) - 1)
    order = sorted(range(len(examples)), key=lambda index: _shuffle_key(seed, index))
    chosen = set(order[:held_out])
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [examples[index] for index in sorted(chosen)]


def _shuffle_key(seed: int, index: int) -> int:
    return zlib.crc32(f"{seed}:{index}".encode())


def _parse_rows(source: str, rows: Iterator[tuple[str, object]]) -> list[Example]:
    examples: list[Example] = []
    empty = 0
    for origin, row in rows:
        example = parse_row(row, origin)
        if example is None:
            empty += 1
        else:
            examples.append(example)
    if empty:
        logger.info("%s: left out %d rows with empty text", source, empty)
    return examples


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (origin, line) of a UTF-8 file, decompressed, errors named by line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield f"{path}:{number}", raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); re-encode it") from None
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{path}: unreadable after line {number} ({error}); download or copy it again"
        ) from None


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    for origin, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{origin}: not valid JSON ({error}); one object a line") from None
        yield origin, row


def _text_pieces(path: Path) -> Iterator[Example]:
    piece: list[str] = []
    size = 0
    first = ""
    for origin, line in _lines(path):
        first = first or origin
        piece.append(line)
        size += len(line)
        if size >= TEXT_PIECE_CHARACTERS:
            if text := "".join(piece).strip():
                yield Example(first, text=text)
            piece, size, first = [], 0, ""
    if text := "".join(piece).strip():
        yield Example(first, text=text)


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, object]]:
    try:
        import datasets  # here, since it takes 85 MB that only a hub id needs

        data = datasets.load_dataset(source, split=split)
    except Exception as error:
        # the hub client raises many unrelated types; whichever it is, the user named the source
        raise ValueError(
            f"{source}: neither a file here nor a hub data set with split {split!r} that could be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error
    for number, row in enumerate(data, start=1):
        yield f"{source}[{split}] row {number}", row
