"""From examples to token batches: chat template, loss mask, truncation, packing, padding.

**Template.** Where the tokenizer has a chat template it renders conversations, and training sees
what generation will see. Otherwise the plain template

    <bos>System: ...[2 newlines]User: ...[2 newlines]Assistant: ...<eos>[2 newlines]

**Loss mask.** Only assistant turns carry labels (their end marker included); everything else is
-100. A rendered conversation is cut at the turn borders and the pieces are tokenized one by one, as
at generation, where the prompt is tokenized before the answer exists.

**Truncation** keeps the completion: what is too long loses the head of its prompt. Only a
completion that fills the window by itself is cut, at its end, and a quarter of the window stays
prompt.

**Packing** sets several sequences in one row. Position ids restart at each, and without a 2D
attention mask transformers turns the restarts into a block-diagonal mask, so no token sees another
sequence. That holds only while no KV cache is built: the collator says `use_cache=False`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from reslora.row_formats import Example, Message

IGNORED = -100
"""Label of a token that takes no part in the loss (torch's and transformers' convention)."""

PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True)
class TokenSequence:
    """Token ids and, position by position, the labels: the id itself where it is learned."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)


Row = tuple[TokenSequence, ...]
"""What one row of a batch holds: one sequence, or several when packed."""


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[TokenSequence]:
    """Tokenize examples.

    Args:
        examples: Conversations or plain texts. A text longer than the window becomes several
            sequences, so that none of it is lost.
        tokenizer: The model's tokenizer.
        max_tokens: Longest sequence, at least 8.

    Returns:
        Sequences of 2 to `max_tokens` tokens with at least one learned token each.

    Raises:
        ValueError: The window is too small, the chat template refuses a conversation, or nothing is
            left to learn.
    """
    if max_tokens < 8:
        raise ValueError(f"max_tokens must be at least 8, got {max_tokens}")
    sequences = [
        sequence
        for example in examples
        for sequence in _encode(example, tokenizer, max_tokens)
        if any(label != IGNORED for label in sequence.labels)
    ]
    if not sequences:
        raise ValueError("data: no example has a token to learn after tokenization")
    return sequences


def encode_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[int, ...]:
    """Tokenize what stands before the last answer of a conversation, as training does.

    Args:
        example: A conversation that ends with an assistant turn.
        tokenizer: The model's tokenizer.
        max_tokens: What is longer loses its head, at least 1.

    Returns:
        The token ids that an encoded example has before the tokens of its last answer.

    Raises:
        ValueError: The example is plain text, which has no prompt, or the chat template refuses it.
    """
    if not example.messages:
        raise ValueError(f"{example.origin}: plain text has no prompt; give prompt and completion")
    pieces = _render(example, tokenizer)[:-1]
    ids = [token for text, _ in pieces for token in _ids(tokenizer, text)]
    return tuple(ids[-max_tokens:])


def pack_sequences(sequences: Sequence[TokenSequence], max_tokens: int) -> list[Row]:
    """Fill rows of `max_tokens` with whole sequences, best fit first.

    Longest first, each into the fullest row that still has room: deterministic, and within a few
    percent of full for usual length mixes.
    """
    rooms: dict[int, list[int]] = {}
    rows: list[list[TokenSequence]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        size = len(sequence)
        room = min((r for r in rooms if r >= size), default=None)
        if room is None:
            index = len(rows)
            rows.append([])
            room = max(max_tokens, size)
        else:
            index = rooms[room].pop()
            if not rooms[room]:
                del rooms[room]
        rows[index].append(sequence)
        rooms.setdefault(room - size, []).append(index)
    return [tuple(row) for row in rows]


def collate_rows(rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Build one batch.

    Rows of one sequence are padded on the right and get an attention mask. As soon as a row is
    packed, the batch has position ids instead, and padding is a sequence of its own that nothing
    learns from.

    Args:
        rows: The batch's rows.
        pad_id: Id to pad with; never learned.

    Returns:
        `input_ids`, `labels` (int64 [rows, longest]), `use_cache` False, and `attention_mask` or
        `position_ids` of the same shape.
    """
    longest = max(sum(map(len, row)) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
    position_ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        start = 0
        for sequence in row:
            stop = start + len(sequence)
            input_ids[index, start:stop] = torch.tensor(sequence.input_ids)
            labels[index, start:stop] = torch.tensor(sequence.labels)
            labels[index, start] = IGNORED  # it would be predicted from the sequence before
            position_ids[index, start:stop] = torch.arange(stop - start)
            attention_mask[index, start:stop] = 1
            start = stop
        position_ids[index, start:] = torch.arange(longest - start)
    batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "use_cache": False}
    if any(len(row) > 1 for row in rows):
        batch["position_ids"] = position_ids
    else:
        batch["attention_mask"] = attention_mask
    return batch


def schedule_rows(lengths: Sequence[int], count: int, group: int, seed: int) -> list[int]:
    """Draw the order in which rows are trained, with rows of like length side by side.

    Each pass over the data is shuffled, cut into spans of many batches, sorted by length inside a
    span, and the batches of the span are shuffled: little padding, and still a random order.

    Args:
        lengths: Tokens of each row.
        count: Rows to draw; more than there are means several passes.
        group: Rows that are processed together.
        seed: Equal arguments give equal orders.
    """
    generator = torch.Generator().manual_seed(seed)
    span = group * 32
    order: list[int] = []
    while len(order) < count:
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(shuffled), span):
            by_length = sorted(shuffled[start : start + span], key=lambda i: -lengths[i])
            groups = [by_length[i : i + group] for i in range(0, len(by_length), group)]
            for pick in torch.randperm(len(groups), generator=generator).tolist():
                order += groups[pick]
    return order[:count]


def _encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Iterator[TokenSequence]:
    if example.messages:
        pieces = _render(example, tokenizer)
        encoded = [(_ids(tokenizer, text), learned) for text, learned in pieces]
        yield _truncated(encoded, max_tokens)
        return
    ids = _leading_ids(tokenizer) + _ids(tokenizer, example.text)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    for start in range(0, len(ids), max_tokens):
        window = tuple(ids[start : start + max_tokens])
        yield TokenSequence(window, (IGNORED, *window[1:]))


def _truncated(pieces: Sequence[tuple[list[int], bool]], max_tokens: int) -> TokenSequence:
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in pieces[:-1]:
        ids += piece
        labels += piece if learned else [IGNORED] * len(piece)
    completion = pieces[-1][0]
    kept = min(len(ids), max(max_tokens - len(completion), max_tokens // 4))
    completion = completion[: max_tokens - kept]
    ids = ids[len(ids) - kept :] + completion
    labels = labels[len(labels) - kept :] + completion
    return TokenSequence(tuple(ids), (IGNORED, *labels[1:]))


def _render(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Render a conversation as (text, is it learned) pieces; the last piece is always learned."""
    if not tokenizer.chat_template:
        return _render_plain(example.messages, tokenizer)
    try:
        turns = [i for i, message in enumerate(example.messages) if message.role == "assistant"]
        pieces = _render_turns(example.messages, turns, tokenizer)
        if pieces is None:
            # templates that rewrite earlier turns (dropped reasoning): learn the last one only
            pieces = _render_turns(example.messages, turns[-1:], tokenizer)
    except TemplateError as error:
        raise ValueError(
            f"{example.origin}: the tokenizer's chat template refuses this conversation: {error}"
        ) from None
    if pieces is None:
        raise ValueError(
            f"{example.origin}: the tokenizer's chat template does not continue its own generation "
            "prompt, so the answer cannot be told from the prompt; use text rows"
        )
    return pieces


def _render_turns(
    messages: Sequence[Message], turns: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]] | None:
    pieces: list[tuple[str, bool]] = []
    done = ""
    for turn in turns:
        prompt = _templated(messages[:turn], tokenizer, add_generation_prompt=True)
        full = _templated(messages[: turn + 1], tokenizer, add_generation_prompt=False)
        if not (prompt.startswith(done) and full.startswith(prompt) and len(full) > len(prompt)):
            return None
        pieces += [(prompt[len(done) :], False), (full[len(prompt) :], True)]
        done = full
    return pieces


def _templated(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(text)


def _render_plain(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    bos = tokenizer.bos_token if _leading_ids(tokenizer) else ""
    pieces: list[tuple[str, bool]] = [(str(bos), False)] if bos else []
    for message in messages:
        label = PLAIN_ROLES[message.role]
        if message.role == "assistant":
            pieces += [
                (f"{label}:", False),
                (f" {message.content}{tokenizer.eos_token or ''}", True),
                ("\n\n", False),
            ]
        else:
            pieces.append((f"{label}: {message.content}\n\n", False))
    return pieces[:-1]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [bos] where the tokenizer itself puts one before a text."""
    ids = list(tokenizer("a")["input_ids"])
    return (
        ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []
    )
