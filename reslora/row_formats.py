"""The shapes a training row may have, and the one kind of example they all become.

    messages                       [{"role": ..., "content": ...}, ...]
    prompt / completion            strings, or lists of messages
    instruction / input / output   `input` may be missing or empty
    question / answer              with `choices`, `answer` is an index; `context` may precede
    text                           plain text, every token is learned

A row is recognized by its keys, in this order. `text` with `label` is classification data, which a
causal model cannot learn from without wording, and is refused; `labelled_rows` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BY_TASK = "with --task classification"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What a row teaches: a conversation, whose assistant turns are learned, or plain text."""

    origin: str
    """Where it was read, `file:line`; errors found later name it."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    """Plain text; used when `messages` is empty."""


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
            example = parse(row, origin)
            if example is not None:
                for text in (example.text, *(message.content for message in example.messages)):
                    refuse_unencodable(text, origin)
            return example
    found = ", ".join(sorted(map(str, row))) or "no keys"
    known = "; ".join("+".join(keys) for keys, _ in _FORMATS)
    hint = "" if row.get("label") is None else "; labels are learned by an encoder " + _BY_TASK
    raise ValueError(f"{origin}: unknown row format with {found}; expected one of {known}{hint}")


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


def refuse_unencodable(text: str, origin: str) -> None:
    """Refuse lone surrogates: valid in JSON strings, but no text, and tokenizers fail on them.

    Args:
        text: Read from a row.
        origin: `file:line`, put before the error.

    Raises:
        ValueError: The text holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin}: not valid Unicode text ({error.reason})") from None


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
            "give prompt and completion, with the label written out as the completion, or train an "
            f"encoder {_BY_TASK}"
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
