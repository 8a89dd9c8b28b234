"""Arithmetic with a free answer (GSM8K, SVAMP): the model writes, the number it comes to counts.

    acc = mean [number of the greedy answer = reference number]
    stderr = sqrt(acc (1 - acc) / (n - 1))

The prompt is the one that training builds for the same row. Rows have `question` or `prompt` (or
any other training format) and the reference number: in `final`, else as what the row's own answer
comes to. Torch models and exports answer through one path, in batches of like length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from transformers import PreTrainedTokenizerBase

from deploy.errors import ConfigError
from deploy.language_model import AnsweringModel
from deploy.number_answers import answer_number
from deploy.token_scores import batches_by_length
from reslora.batches import encode_prompt
from reslora.row_formats import Example, parse_row
from reslora.rows import decoded_rows

MAX_NEW_TOKENS = 256
"""Enough for a worked solution."""
BATCH_ROWS = 16
BATCH_TOKENS = 2048
"""Positions of the prompts of a batch: an export computes the logits of them all."""


@dataclass(frozen=True)
class NumberExample:
    """A question with the number that answers it."""

    example: Example
    expected: Decimal


@dataclass(frozen=True)
class NumberAnswer:
    """What a model wrote."""

    text: str
    found: Decimal | None
    """The number it comes to."""
    expected: Decimal

    @property
    def is_right(self) -> bool:
        """The numbers are equal: 5, 5.0 and 5.00 are one number."""
        return self.found == self.expected


@dataclass(frozen=True)
class ExactMatch:
    """All answers, in the order of the examples."""

    answers: tuple[NumberAnswer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return `acc`, `stderr` (None for a single answer) and `n`."""
        count = len(self.answers)
        acc = sum(answer.is_right for answer in self.answers) / count
        stderr = math.sqrt(acc * (1.0 - acc) / (count - 1)) if count > 1 else None
        return {"acc": acc, "stderr": stderr, "n": count}


def read_number_examples(source: str, limit: int | None = None) -> list[NumberExample]:
    """Read questions and the numbers that answer them.

    Args:
        source: A JSONL(.gz) file or a hub id.
        limit: Read no more than these; None reads all.

    Raises:
        ConfigError: The source or a row cannot be read, or a row has no number.
    """
    examples: list[NumberExample] = []
    try:
        for origin, row in decoded_rows(source):
            if limit is not None and len(examples) == limit:
                break
            examples.append(_number_example(origin, row))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not examples:
        raise ConfigError(f"{source}: holds no rows; give at least one question")
    return examples


def exact_match(
    model: AnsweringModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[NumberExample],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int], None] = lambda done: None,
) -> ExactMatch:
    """Let a model answer questions greedily.

    Args:
        model: `TorchLanguageModel(name, model)` for a model in memory; or from
            `open_language_model`.
        tokenizer: Its tokenizer.
        examples: At least one.
        max_new_tokens: Most tokens of an answer; what was not finished is read as it stands.
        progress: Called with the number of answered questions.

    Raises:
        ConfigError: The answer leaves no room for a prompt, or the chat template refuses one.
    """
    room = model.context_length - max_new_tokens
    if max_new_tokens < 1 or room < 1:
        raise ConfigError(
            f"--max-new-tokens {max_new_tokens}: expected at least 1 and fewer than the "
            f"{model.context_length} tokens of the model's context"
        )
    ends = model.end_ids
    if tokenizer.eos_token_id is not None:
        ends |= {int(tokenizer.eos_token_id)}
    asking: dict[tuple[int, ...], list[int]] = {}
    try:
        for index, item in enumerate(examples):
            prompt = encode_prompt(item.example, tokenizer, room)
            asking.setdefault(prompt, []).append(index)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    texts: dict[int, str] = {}
    for batch in batches_by_length(asking, BATCH_TOKENS, BATCH_ROWS):
        for prompt, ids in zip(batch, model.generate(batch, max_new_tokens, ends), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True))
            texts |= dict.fromkeys(asking[prompt], text)
        progress(len(texts))
    return ExactMatch(
        tuple(
            NumberAnswer(texts[index], answer_number(texts[index]), item.expected)
            for index, item in enumerate(examples)
        )
    )


def _number_example(origin: str, row: object) -> NumberExample:
    final = row.get("final") if isinstance(row, Mapping) else None
    if isinstance(row, Mapping) and final is not None and row.get("answer") is None:
        row = {**row, "answer": str(final)}
    example = parse_row(row, origin)
    if example is None or not example.messages:
        raise ValueError(f"{origin}: plain text asks nothing; give question and answer")
    stated = example.messages[-1].content if final is None else str(final)
    expected = answer_number(stated)
    if expected is None:
        raise ValueError(
            f"{origin}: {'final' if final is not None else 'the answer'} is {stated[-40:]!r}, "
            "expected a number in it"
        )
    return NumberExample(example, expected)
