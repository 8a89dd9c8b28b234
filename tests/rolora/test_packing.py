from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.packing import pack_int4, unpack_int4

EVERY_PAIR = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(0, 33), st.integers(0, 2**32 - 1))
def test_unpacking_gives_back_what_was_packed(rows: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (rows, 2 * half), dtype=torch.int8, generator=generator)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, half)
    restored = unpack_int4(packed)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, q)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_every_byte_is_some_pair(rows: int, half: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, half), dtype=torch.uint8, generator=generator)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_the_even_column_is_the_low_nibble_with_an_offset_of_8() -> None:
    expected = [(even + 8) + 16 * (odd + 8) for even, odd in EVERY_PAIR.tolist()]
    packed = pack_int4(EVERY_PAIR.reshape(1, -1))
    assert packed.flatten().tolist() == expected
    assert sorted(expected) == list(range(256))
    swapped = pack_int4(EVERY_PAIR.flip(1).reshape(1, -1))
    assert not torch.equal(swapped, packed)


def test_a_view_with_strides_packs_like_its_copy() -> None:
    q = torch.randint(-8, 8, (6, 4), dtype=torch.int8)
    assert torch.equal(pack_int4(q.t()), pack_int4(q.t().contiguous()))
    packed = pack_int4(q)
    assert torch.equal(unpack_int4(packed.t()), unpack_int4(packed.t().contiguous()))


@settings(max_examples=50, deadline=None)
@given(st.integers(-128, 127).filter(lambda value: not -8 <= value <= 7), st.integers(0, 11))
def test_one_value_out_of_range_is_refused(value: int, position: int) -> None:
    q = torch.zeros(3, 4, dtype=torch.int8)
    q.view(-1)[position] = value
    with pytest.raises(ValueError, match=rf"-8\.\.7, got .*{value}"):
        pack_int4(q)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), "even number of columns, got 3"),
        (torch.zeros(2, 4), r"int8 \[out, in\], got torch.float32"),
        (torch.zeros(2, 4, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(4, dtype=torch.int8), r"got torch.int8 \(4,\)"),
    ],
)
def test_what_does_not_pack_is_refused(q: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_int4(q)


@pytest.mark.parametrize(
    "packed", [torch.zeros(2, 4, dtype=torch.int8), torch.zeros(4, dtype=torch.uint8)]
)
def test_what_was_not_packed_is_refused(packed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[out, in / 2\]"):
        unpack_int4(packed)
