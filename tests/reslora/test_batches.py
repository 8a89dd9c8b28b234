from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from reslora.batches import (
    IGNORED,
    TokenSequence,
    collate_rows,
    encode_examples,
    pack_sequences,
    schedule_rows,
)
from reslora.row_formats import Example, Message

CHAT = Example(
    "f:1",
    (
        Message("system", "be short"),
        Message("user", "one"),
        Message("assistant", "uno"),
        Message("user", "two"),
        Message("assistant", "dos"),
    ),
)


def learned(sequence: TokenSequence, tokenizer: Any) -> str:
    kept = [label for label in sequence.labels if label != IGNORED]
    return "".join(tokenizer.convert_ids_to_tokens(kept))


def whole(sequence: TokenSequence, tokenizer: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(sequence.input_ids)))


def test_only_assistant_turns_are_learned(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = encode_examples([CHAT], chat_tokenizer, 100)
    assert learned(sequence, chat_tokenizer) == "uno<|end|>dos<|end|>"
    rendered = chat_tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in CHAT.messages], tokenize=False
    )
    assert whole(sequence, chat_tokenizer) == rendered
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        assert label in (token, IGNORED)


def test_plain_template_without_a_chat_template(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    (sequence,) = encode_examples([CHAT], plain_tokenizer, 200)
    assert whole(sequence, plain_tokenizer) == (
        "System: be short\n\nUser: one\n\nAssistant: uno<eos>\n\nUser: two\n\nAssistant: dos<eos>"
    )
    assert learned(sequence, plain_tokenizer) == " uno<eos> dos<eos>"


def test_a_template_that_rewrites_history_teaches_the_last_turn(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (sequence,) = encode_examples([CHAT], chat_tokenizer, 100)
    assert learned(sequence, chat_tokenizer) == "dos<|end|>"


def test_a_template_that_refuses_names_the_row(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"f:1: .* refuses this conversation: no system role"):
        encode_examples([CHAT], chat_tokenizer, 100)


def test_truncation_keeps_the_completion(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example("f:1", (Message("user", "q" * 50), Message("assistant", "answer")))
    (sequence,) = encode_examples([example], chat_tokenizer, 16)
    assert len(sequence) == 16
    assert learned(sequence, chat_tokenizer) == "answer<|end|>"
    (sequence,) = encode_examples([example], chat_tokenizer, 8)
    assert whole(sequence, chat_tokenizer) == "<|end|><|assistant|>answer"


def test_a_long_text_becomes_several_sequences(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    sequences = encode_examples([Example("f:1", text="abcdefghijklmno")], plain_tokenizer, 8)
    assert [whole(s, plain_tokenizer) for s in sequences] == ["abcdefgh", "ijklmno<eos>"]


def test_nothing_to_learn_and_too_small_a_window(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no example has a token to learn"):
        encode_examples([], plain_tokenizer, 8)
    with pytest.raises(ValueError, match="max_tokens must be at least 8, got 4"):
        encode_examples([CHAT], plain_tokenizer, 4)


def sequence_of(length: int, start: int = 5) -> TokenSequence:
    ids = tuple(range(start, start + length))
    return TokenSequence(ids, ids)


@settings(deadline=None)
@given(st.lists(st.integers(2, 32), min_size=1, max_size=40))
def test_packing_keeps_every_sequence_whole(lengths: list[int]) -> None:
    sequences = [sequence_of(length) for length in lengths]
    rows = pack_sequences(sequences, 32)
    assert sorted(len(s) for row in rows for s in row) == sorted(lengths)
    assert all(sum(map(len, row)) <= 32 for row in rows)
    assert all(rows)
    # best fit leaves no two rows that would go into one
    fill = sorted(sum(map(len, row)) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > 32


def test_collated_rows() -> None:
    padded = collate_rows([(sequence_of(4),), (sequence_of(2),)], pad_id=9)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 9, 9]]
    assert padded["labels"].tolist() == [[-100, 6, 7, 8], [-100, 6, -100, -100]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert "position_ids" not in padded
    packed = collate_rows([(sequence_of(3), sequence_of(2)), (sequence_of(3),)], pad_id=9)
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert packed["labels"].tolist() == [[-100, 6, 7, -100, 6], [-100, 6, 7, -100, -100]]
    assert "attention_mask" not in packed
    assert packed["use_cache"] is False


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(llama: LlamaForCausalLM, attention: str) -> None:
    llama.set_attn_implementation(attention)
    first, second = sequence_of(5), sequence_of(7, start=40)
    alone = llama(torch.tensor([second.input_ids]), use_cache=False).logits[0]
    batch = collate_rows([(first, second), (second,)], pad_id=0)
    packed = llama(**batch)
    torch.testing.assert_close(packed.logits[0, 5:], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.logits[1, :7], alone, rtol=1e-5, atol=1e-5)
    # negative control: with a cache transformers builds no block mask, and the sequences mix
    leaking = llama(**{**batch, "use_cache": True}).logits[0, 5:]
    assert float((leaking - alone).detach().abs().max()) > 1e-2


def test_packed_loss_is_the_mean_over_the_sequences(llama: LlamaForCausalLM) -> None:
    sequences = [sequence_of(5), sequence_of(7, start=40)]
    apart = llama(**collate_rows([(s,) for s in sequences], pad_id=0)).loss
    together = llama(**collate_rows([tuple(sequences)], pad_id=0)).loss
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=50), st.integers(1, 150), st.integers(1, 6)
)
def test_schedule_uses_every_row_once_a_pass(lengths: list[int], count: int, group: int) -> None:
    order = schedule_rows(lengths, count, group, seed=1)
    assert len(order) == count
    assert order == schedule_rows(lengths, count, group, seed=1)
    rows = len(lengths)
    for start in range(0, count - rows + 1, rows):
        assert sorted(order[start : start + rows]) == list(range(rows))


def test_schedule_groups_rows_of_like_length_and_depends_on_the_seed() -> None:
    lengths = [1 + (index * 37) % 64 for index in range(256)]
    order = schedule_rows(lengths, 256, 8, seed=0)
    groups = [order[i : i + 8] for i in range(0, 256, 8)]
    waste = sum(max(lengths[i] for i in g) * 8 - sum(lengths[i] for i in g) for g in groups)
    assert waste < 0.1 * sum(lengths)
    assert order != schedule_rows(lengths, 256, 8, seed=1)
