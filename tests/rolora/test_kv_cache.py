from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rolora.affine import activation_range, dequantize, quantize
from rolora.kv_cache import (
    FLOAT_KV_BITS,
    KEY_ROOM,
    KV_BITS,
    CacheCodec,
    CacheRecorder,
    channel_scales,
    equalizing_gain,
    key_scales,
    kv_granularity,
    round_tokens,
    stored_parts,
)
from rolora.scheme import Granularity

HEADS, KV_HEADS, TOKENS, HEAD_DIM = 4, 2, 7, 8
PART = (KV_HEADS, 1, HEAD_DIM)


def draw(heads: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, TOKENS, HEAD_DIM, dtype=torch.float64, generator=generator)


def rotation() -> Tensor:
    matrix = draw(1, 9).flatten()[: HEAD_DIM**2].reshape(HEAD_DIM, HEAD_DIM)
    return torch.linalg.qr(matrix).Q


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return draw(HEADS, 1), draw(KV_HEADS, 2), 3 * draw(KV_HEADS, 3)


def codec_for(bits: int, key: Tensor, value: Tensor, r3: Tensor | None = None) -> CacheCodec:
    recorder = CacheRecorder(r3)
    recorder(key, key, value)
    return recorder.codec(bits)


def test_eight_bits_are_static_and_four_bits_have_a_scale_a_token() -> None:
    assert [kv_granularity(bits) for bits in KV_BITS] == [Granularity.CHANNEL, Granularity.TOKEN]
    assert stored_parts(8) == ("key_scale", "value_scale")
    assert stored_parts(4) == ("key_gain", "key_mean")
    assert stored_parts(FLOAT_KV_BITS) == ()


def test_eight_bit_cache_holds_integers_of_the_calibrated_channel_scales(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value = qkv
    codec = codec_for(8, key, value)
    read_query, read_key, read_value = codec(query, key, value)
    assert torch.equal(read_query, query)
    for read, x, scale in (
        (read_key, key, codec.key_scale),
        (read_value, value, codec.value_scale),
    ):
        assert scale.shape == PART
        expected = dequantize(quantize(x, scale.double(), *activation_range(8)), scale.double())
        assert torch.equal(read, expected)
        assert 0 < float((read - x).abs().max()) < float(x.abs().max()) / 4


def test_keys_leave_room_for_greater_ones_than_calibration_saw() -> None:
    x = torch.randn(2, 5, 300) * torch.tensor([[0.01], [1.0], [30.0], [1.0], [0.1]])
    x[:, 3] = 0  # never used
    scales = key_scales(x, 8)
    assert scales.shape == (2, 5)
    assert bool((scales > 0).all())
    seen = x.abs().amax(dim=2)[:, [0, 1, 2, 4]]
    torch.testing.assert_close(scales[:, [0, 1, 2, 4]] * 127, KEY_ROOM * seen)


def test_channel_scales_follow_each_channel_of_each_head() -> None:
    widths = torch.logspace(-3, 2, KV_HEADS * HEAD_DIM).reshape(KV_HEADS, HEAD_DIM, 1)
    x = widths * torch.linspace(-1, 1, 255)
    torch.testing.assert_close(channel_scales(x, 8), widths[..., 0] / 127, rtol=0.1, atol=0)


def test_four_bits_of_a_token_by_hand() -> None:
    # Range -6 .. 9: scale 1, zero point 6.
    x = torch.tensor([9.0, -6.0, 0.0, 1.2, 1.6])
    expected = torch.tensor([9.0, -6.0, 0.0, 1.0, 2.0])
    torch.testing.assert_close(round_tokens(x, 4), expected)
    assert torch.equal(round_tokens(torch.zeros(3, 5), 4), torch.zeros(3, 5))
    # A token whose numbers have one sign keeps 0 in its range.
    for sign in (1, -1):
        alike = sign * torch.tensor([15.0, 3.0])
        torch.testing.assert_close(round_tokens(alike, 4), alike)


@pytest.mark.parametrize("bits", KV_BITS)
def test_a_token_is_rounded_by_itself(qkv: tuple[Tensor, Tensor, Tensor], bits: int) -> None:
    query, key, value = qkv
    codec = codec_for(bits, key, value, rotation())
    _, all_keys, all_values = codec(query, key, value)
    for token in range(TOKENS):
        part = slice(token, token + 1)
        _, one_key, one_value = codec(query, key[:, :, part], value[:, :, part])
        torch.testing.assert_close(one_key, all_keys[:, :, part], rtol=0, atol=1e-12)
        torch.testing.assert_close(one_value, all_values[:, :, part], rtol=0, atol=1e-12)


def test_the_mean_of_the_keys_shifts_all_scores_of_a_query_alike(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value = qkv
    key = key + 20 * torch.linspace(-1, 1, HEAD_DIM, dtype=torch.float64)
    codec = codec_for(4, key, value)
    gain = codec.key_gain.double()
    torch.testing.assert_close(codec.key_mean[:, 0], (key * gain).mean(dim=(0, 2)).float())
    rows = query[:, ::2]

    def error(read: Tensor) -> float:
        shift = rows @ (read - key).mT
        return float((shift - shift.mean(dim=-1, keepdim=True)).abs().max())

    assert error(key - codec.key_mean.double() / gain) < 1e-12
    assert error(codec(query, key, value)[1] / gain) < error(round_tokens(key, 4)) / 3


@pytest.mark.parametrize("bits", [FLOAT_KV_BITS, *KV_BITS])
def test_the_rotation_is_undone_by_the_product(
    qkv: tuple[Tensor, Tensor, Tensor], bits: int
) -> None:
    query, key, value = qkv
    r3 = rotation()
    codec = CacheCodec(r3) if bits == FLOAT_KV_BITS else codec_for(bits, key, value, r3)
    read_query, read_key, _ = codec(query, key, value)
    gain = codec.key_gain.double() if bits == 4 else torch.ones(PART, dtype=torch.float64)
    torch.testing.assert_close(read_query, (query / gain.repeat_interleave(2, dim=0)) @ r3)
    centre = codec.key_mean.double() if bits == 4 else 0.0
    scores, expected = read_query[:, ::2] @ (read_key + centre).mT, query[:, ::2] @ key.mT
    bound = {FLOAT_KV_BITS: 1e-12, 8: 0.1, 4: 1.5}[bits]
    assert float((scores - expected).abs().max()) < bound
    assert float((query[:, ::2] @ (read_key + centre).mT - expected).abs().max()) > 2 * bound


def test_the_gain_lowers_what_rounding_does_to_the_scores() -> None:
    generator = torch.Generator().manual_seed(4)
    shape = 1, KV_HEADS, 500, HEAD_DIM
    widths = torch.logspace(-1, 1, HEAD_DIM)
    key = widths * torch.randn(shape, generator=generator)
    query = widths.flip(0) * torch.randn(shape, generator=generator).repeat(1, 2, 1, 1)
    r3 = rotation().float()
    codec = codec_of(query, key, r3)
    torch.testing.assert_close(
        codec.key_gain[:, 0].log().mean(dim=1), torch.zeros(KV_HEADS), rtol=0, atol=1e-5
    )
    without = CacheCodec(
        r3, 4, key_gain=torch.ones(PART), key_mean=(key @ r3).mean(dim=(0, 2)).unsqueeze(1)
    )

    def error(used: CacheCodec) -> float:
        read_query, read_key, _ = used(query, key, key)
        change = read_query @ read_key.repeat_interleave(2, dim=1).mT
        change = change - query @ key.repeat_interleave(2, dim=1).mT
        return float((change - change.mean(dim=-1, keepdim=True)).square().mean())

    # By the formula: (sum of sigma_q sigma_k)^2 over sum of sigma_q^2 sum of sigma_k^2.
    expected = HEAD_DIM**2 / float(widths.square().sum()) ** 2
    assert error(codec) / error(without) == pytest.approx(expected, rel=0.5)


def test_queries_count_for_the_key_head_that_they_read_whatever_the_batch(
    qkv: tuple[Tensor, Tensor, Tensor],
) -> None:
    query, key, value = qkv
    query = query * torch.logspace(-2, 2, HEADS)[:, None, None]
    alone, together = CacheRecorder(None), CacheRecorder(None)
    for row in range(2):
        alone(query[row : row + 1], key[row : row + 1], value[row : row + 1])
    together(query, key, value)
    torch.testing.assert_close(together.codec(4).key_gain, alone.codec(4).key_gain)


def codec_of(query: Tensor, key: Tensor, r3: Tensor) -> CacheCodec:
    recorder = CacheRecorder(r3)
    recorder(query, key, key)
    return recorder.codec(4)


def test_a_channel_that_says_nothing_has_a_gain_of_one() -> None:
    keys = draw(KV_HEADS, 5)[0].mT.clone()
    keys[0, 3] = 2.0
    squares = torch.ones(KV_HEADS, HEAD_DIM)
    squares[1, 2] = 0.0
    gain = equalizing_gain(squares, keys)
    assert gain[0, 3] == gain[1, 2] == 1.0
    assert bool(torch.isfinite(gain).all())


def test_calibration_refuses_nothing_and_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="no token was seen"):
        CacheRecorder(None).codec(8)
    for bits in KV_BITS:
        with pytest.raises(ValueError, match="NaN or infinite"):
            codec_for(bits, draw(KV_HEADS) * torch.nan, draw(KV_HEADS))


@pytest.mark.parametrize(
    ("bits", "parts", "message"),
    [
        (6, {}, "expected 8, 4, or 16"),
        (16, {"key_mean": torch.zeros(PART)}, r"16 bits: expected tensors \[\], got"),
        (8, {"key_scale": torch.ones(PART)}, r"expected tensors \['key_scale', 'value_scale'\]"),
        (4, {}, r"expected tensors \['key_gain', 'key_mean'\], got \[\]"),
        (
            4,
            {"key_gain": torch.ones(PART), "key_mean": torch.zeros(HEAD_DIM)},
            "key_mean: expected shape",
        ),
        (
            4,
            {"key_gain": torch.ones(PART), "key_mean": torch.full(PART, torch.inf)},
            "key_mean: expected finite",
        ),
        (
            4,
            {"key_gain": torch.zeros(PART), "key_mean": torch.zeros(PART)},
            "key_gain: .* positive",
        ),
        (
            8,
            {"key_scale": torch.ones(PART), "value_scale": torch.ones(1, 1, HEAD_DIM)},
            "value_scale: expected shape",
        ),
        (
            8,
            {"key_scale": torch.ones(PART), "value_scale": torch.zeros(PART)},
            "value_scale: .* positive",
        ),
    ],
)
def test_a_codec_of_wrong_parts_is_refused(
    bits: int, parts: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CacheCodec(None, bits, **parts)
