"""Training rows: read a data set in any of the usual formats, as one kind of example.

Sources are a JSONL file (`.jsonl`, `.jsonl.gz`), a text file (`.txt`, `.txt.gz`) or a data set id
on the Hugging Face hub. A row is one of

    messages                       [{"role": ..., "content": ...}, ...]
    prompt / completion            strings, or lists of messages
    instruction / input / output   `input` may be missing or empty
    question / answer              with `choices`, `answer` is an index into them; `context` may
    precede text                           plain text, every token is learned

recognized per row, in this order. `text` with `label` is classification data, which a causal model
cannot learn from without wording, and is refused. A bad row raises with file and line: silently
dropping rows would train on something else than the user gave.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
TEXT_PIECE_CHARACTERS = 4096
"""A text file becomes pieces of about this size, broken at line ends."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What a row teaches: a conversation (assistant turns are learned) or plain text (all of
    it)."""

    origin: str
    """Where it was read, `file:line`; errors found later name it."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    """Plain text; used when `messages` is empty."""


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
    name = path.name.lower()
    if path.is_dir():
        raise ValueError(f"{source}: is a directory; expected a file or a hub data set id")
    if path.is_file():
        if name.endswith(TEXT_SUFFIXES):
            examples = list(_text_pieces(path))
        elif name.endswith(JSON_SUFFIXES):
            examples = _parse_rows(source, _json_rows(path))
        else:
            known = ", ".join(JSON_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"{source}: unknown file type; expected one of {known}")
    elif name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES) or path.is_absolute() or source[:1] == ".":
        raise ValueError(f"{source}: no such file")
    else:
        examples = _parse_rows(source, _hub_rows(source, split))
    if not examples:
        raise ValueError(f"{source}: holds no rows; give at least one example")
    return examples


def parse_row(row: object, origin: str) -> Example | None:
    """Turn one decoded row into an example.

    Args:
        row: The decoded JSON value.
        origin: `file:line`, put before every error.

    Returns:
        The example, or None for an empty `text` row.

    Raises:
        ValueError: The row fits no format, or breaks its own.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{origin}: expected a JSON object, got {type(row).__name__}")
    for keys, parse in _FORMATS:
        if all(row.get(key) is not None for key in keys):
            return parse(row, origin)
    found = ", ".join(sorted(map(str, row))) or "no keys"
    known = "; ".join("+".join(keys) for keys, _ in _FORMATS)
    raise ValueError(f"{origin}: unknown row format with {found}; expected one of {known}")


def split_validation(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
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
        data = datasets.load_dataset(source, split=split)
    except Exception as error:
        # the hub client raises many unrelated types; whichever it is, the user named the source
        raise ValueError(
            f"{source}: neither a file here nor a hub data set with split {split!r} that could be "
            f"loaded ({type(error).__name__}: {error})"
        ) from error
    for number, row in enumerate(data, start=1):
        yield f"{source}[{split}] row {number}", row


def _text_field(row: Mapping[Any, Any], key: str, origin: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if optional and value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{origin}: {key} must be a string, got {type(value).__name__}")
    if not optional and not value.strip():
        raise ValueError(f"{origin}: {key} is empty; fill it or delete the row")
    return value


def _message_list(value: object, key: str, origin: str) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{origin}: {key} must be a non-empty list of messages")
    messages = []
    for index, item in enumerate(value):
        where = f"{origin}: {key}[{index}]"
        if not isinstance(item, Mapping):
            raise ValueError(f"{where} must be an object, got {type(item).__name__}")
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise ValueError(f"{where}.role is {role!r}, expected one of {', '.join(ROLES)}")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise ValueError(f"{where}.content has a part that is not text")
            content = "".join(map(str, parts))
        if not isinstance(content, str):
            raise ValueError(f"{where}.content must be a string, got {type(content).__name__}")
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where}.content is empty: an assistant turn is what is learned")
        messages.append(Message(role, content))
    return messages


def _conversation(messages: Sequence[Message], origin: str) -> Example:
    if messages[-1].role != "assistant":
        raise ValueError(
            f"{origin}: last message is from {messages[-1].role!r}, expected 'assistant': "
            "there would be nothing to learn after it"
        )
    if len(messages) < 2:
        raise ValueError(f"{origin}: a conversation needs a message before the assistant's")
    return Example(origin, messages=tuple(messages))


def _from_messages(row: Mapping[Any, Any], origin: str) -> Example:
    return _conversation(_message_list(row["messages"], "messages", origin), origin)


def _from_prompt(row: Mapping[Any, Any], origin: str) -> Example:
    sides = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            sides += _message_list(row[key], key, origin)
        else:
            sides.append(Message(role, _text_field(row, key, origin)))
    return _conversation(sides, origin)


def _from_instruction(row: Mapping[Any, Any], origin: str) -> Example:
    instruction = _text_field(row, "instruction", origin)
    context = _text_field(row, "input", origin, optional=True)
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    answer = Message("assistant", _text_field(row, "output", origin))
    return _conversation([Message("user", prompt), answer], origin)


def _from_question(row: Mapping[Any, Any], origin: str) -> Example:
    question = _text_field(row, "question", origin)
    context = _text_field(row, "context", origin, optional=True)
    prompt = f"{context}\n\n{question}" if context.strip() else question
    choices = row.get("choices")
    if choices is None:
        answer = _text_field(row, "answer", origin)
    else:
        if not isinstance(choices, list) or not all(isinstance(item, str) for item in choices):
            raise ValueError(f"{origin}: choices must be a list of strings")
        index = row["answer"]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
            raise ValueError(
                f"{origin}: answer is {index!r}, expected an index into {len(choices)} choices"
            )
        prompt = "\n".join([prompt, *(f"- {choice}" for choice in choices)])
        answer = choices[index]
        if not answer.strip():
            raise ValueError(f"{origin}: choices[{index}], the answer, is empty")
    return _conversation([Message("user", prompt), Message("assistant", answer)], origin)


def _from_text(row: Mapping[Any, Any], origin: str) -> Example | None:
    if row.get("label") is not None:
        raise ValueError(
            f"{origin}: text with label is classification data, which causal training cannot use; "
            "give prompt and completion, with the label written out as the completion"
        )
    if not isinstance(row["text"], str):
        raise ValueError(f"{origin}: text must be a string, got {type(row['text']).__name__}")
    return Example(origin, text=row["text"]) if row["text"].strip() else None


_FORMATS: tuple[tuple[tuple[str, ...], Callable[[Mapping[Any, Any], str], Example | None]], ...] = (
    (("messages",), _from_messages),
    (("prompt", "completion"), _from_prompt),
    (("instruction", "output"), _from_instruction),
    (("question", "answer"), _from_question),
    (("text",), _from_text),
)
