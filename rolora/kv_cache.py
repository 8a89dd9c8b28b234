"""The quantized key-value cache: its numbers, and what calibration has to find for them.

Keys are quantized behind the rotary embedding and R3, values as the model has them (R2 has rotated
them); queries stay float. Every token is rounded by itself, and attention reads the rounded keys
and values of the prompt as of later tokens: it makes no difference in which order tokens come.

8 bits (CHANNEL): one scale a channel of each key-value head, fixed by calibration. It is what the
CPU kernel of ONNX Runtime's GroupQueryAttention stores, so what is evaluated can be exported.

    q = clamp(round_half_even(x / s), -128, 127)                              x' = s q

Scales of values have the least squared error on the calibration tokens. Those of keys leave room
for keys that calibration has not seen: a clipped one is a wrong score for all later queries, and
attention sinks are keys of that kind. On SmolLM2-135M and C4 the divergence from a float cache is
0.0033 with the least squared error for both, 0.0028 with the greatest key, and 0.0011 with 1.3
times that, or 1.5 times.

4 bits (TOKEN): one scale and zero point a token and head, taken from the least and greatest of its
head_dim numbers (QuaRot, arXiv:2404.00456).

    s = (max x - min x) / 15,   z = round(-min x / s),   q = clamp(round(x / s) + z, 0, 15),
    x' = s (q - z)

Three departures. The range is not clipped: on SmolLM2-135M QuaRot's clip ratio of 0.95 costs 8 %
more divergence. Before R3 a gain g for each channel multiplies keys and divides queries, which
leaves q k^T as it is. Rounding adds noise of equal size to all channels of a key behind R3, and
what that does to the scores is least for

    g = (E[q^2] / Var[k])^(1/4),         up to a factor; here their geometric mean is 1

(minimize E|q / g|^2 E|g (k - m)|^2). Of the keys it then takes the calibrated mean m of each
channel, which is never put back: q (k - m)^T is q k^T less one number for all keys of a query, and
softmax ignores that.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rolora.affine import SMALLEST_SCALE, activation_range
from rolora.fake_quant import fake_quantize
from rolora.rtn import quantize_weight
from rolora.scheme import Granularity, WeightSpec

KV_BITS = (8, 4)
KEY_ROOM = 1.3
"""Range of a channel's keys over the greatest that calibration saw."""
FLOAT_KV_BITS = 16
"""The bit width that means "leave the cache in float"."""


def kv_granularity(bits: int) -> Granularity:
    """Return which numbers of a cache share a scale: those of a channel (8 bits), or of a token."""
    return Granularity.CHANNEL if bits == 8 else Granularity.TOKEN


def stored_parts(bits: int) -> tuple[str, ...]:
    """Name what calibration finds for a cache: arguments of `CacheCodec`, and its saved tensors."""
    if bits == FLOAT_KV_BITS:
        return ()
    static = kv_granularity(bits) is Granularity.CHANNEL
    return ("key_scale", "value_scale") if static else ("key_gain", "key_mean")


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round each token of each head by its own scale and zero point.

    Args:
        x: float [..., head_dim].
        bits: 4 or 8.

    Returns:
        What the integers stand for, float [..., head_dim].
    """
    most = 2**bits - 1
    greatest = x.amax(dim=-1, keepdim=True).clamp(min=0)
    least = x.amin(dim=-1, keepdim=True).clamp(max=0)
    scale = ((greatest - least) / most).clamp(min=SMALLEST_SCALE)
    zero = torch.round(-least / scale)
    rounded: Tensor = (torch.clamp(torch.round(x / scale) + zero, 0, most) - zero) * scale
    return rounded


class CacheCodec(nn.Module):
    """What happens to queries, keys and values between the rotary embedding and attention.

    Args:
        rotation: R3, float [head_dim, head_dim], or None.
        bits: 4 or 8; `FLOAT_KV_BITS` leaves the cache in float.
        parts: Of each name in `stored_parts(bits)` the float32 tensor [kv_heads, 1, head_dim].

    Raises:
        ValueError: The bits are not supported; or a part is missing or unknown, of another shape
            than the others, or not finite, or a scale is not positive.
    """

    rotation: Tensor | None
    key_scale: Tensor
    value_scale: Tensor
    key_gain: Tensor
    key_mean: Tensor

    def __init__(self, rotation: Tensor | None, bits: int = FLOAT_KV_BITS, **parts: Tensor) -> None:
        super().__init__()
        check_kv_bits(bits)
        _check_parts(bits, parts)
        self.bits = bits
        self.register_buffer("rotation", rotation, persistent=False)
        for name, part in parts.items():
            self.register_buffer(name, part)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys, round keys and values.

        Args:
            query: float [B, heads, S, head_dim], after the rotary embedding.
            key: float [B, kv_heads, T, head_dim], after the rotary embedding, of all tokens.
            value: float [B, kv_heads, T, head_dim].

        Returns:
            The same three as attention reads them; keys and values are still float, but with values
            that the integers of the cache stand for.
        """
        if self.bits == 4:
            key = key * self.key_gain.to(key)
            query = query / _for_queries(self.key_gain, query.shape[1]).to(query)
        if self.rotation is not None:
            query, key = query @ self.rotation.to(query), key @ self.rotation.to(key)
        if self.bits == FLOAT_KV_BITS:
            return query, key, value
        if kv_granularity(self.bits) is Granularity.TOKEN:
            key = round_tokens(key - self.key_mean.to(key), self.bits)
            return query, key, round_tokens(value, self.bits)
        limits = activation_range(self.bits)
        key = fake_quantize(key, self.key_scale.to(key), *limits)
        return query, key, fake_quantize(value, self.value_scale.to(value), *limits)


class CacheRecorder(nn.Module):
    """Takes the place of a codec during calibration: passes all through and keeps what it saw.

    Args:
        rotation: R3, float [head_dim, head_dim], or None.
    """

    def __init__(self, rotation: Tensor | None) -> None:
        super().__init__()
        self._rotation = rotation
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._query_squares = torch.zeros(())
        self._queries = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep keys and values [B, kv_heads, T, head_dim], and sums of queries; change nothing."""
        self._keys.append(key)
        self._values.append(value)
        kv_heads, head_dim = key.shape[1], key.shape[3]
        by_head = query.transpose(0, 1).reshape(kv_heads, -1, head_dim)
        self._query_squares = self._query_squares + by_head.double().square().sum(dim=1)
        self._queries += by_head.shape[1]
        return query, key, value

    def codec(self, bits: int) -> CacheCodec:
        """Return the codec that fits what was seen.

        Args:
            bits: 4 or 8.

        Raises:
            ValueError: Nothing was seen, or a key or value is NaN or infinite.
        """
        if kv_granularity(bits) is Granularity.TOKEN:
            keys = _by_channel(self._keys)
            gain = equalizing_gain(self._query_squares / max(self._queries, 1), keys)
            mean = self._rotated(keys * gain[:, :, None]).mean(dim=2)
            parts = {"key_gain": gain, "key_mean": mean}
        else:
            parts = {
                "key_scale": key_scales(self._rotated(_by_channel(self._keys)), bits),
                "value_scale": channel_scales(_by_channel(self._values), bits),
            }
        stored = {name: part.unsqueeze(1) for name, part in parts.items()}
        return CacheCodec(self._rotation, bits, **stored)

    def _rotated(self, channels: Tensor) -> Tensor:
        """Apply R3 to [kv_heads, head_dim, N]."""
        if self._rotation is None:
            return channels
        return self._rotation.to(channels).mT @ channels


def equalizing_gain(query_squares: Tensor, keys: Tensor) -> Tensor:
    """Return what keys are multiplied by, and queries divided, before both are rotated.

    Args:
        query_squares: Mean squares of the queries of each key-value head, [kv_heads, head_dim].
        keys: float32 [kv_heads, head_dim, tokens].

    Returns:
        float32 [kv_heads, head_dim], positive; 1 for a channel without queries or without variance.
    """
    variance = keys.double().var(dim=2, correction=0)
    ratio = query_squares.double() / variance
    known = (query_squares > 0) & (variance > 0)
    logarithm = torch.where(known, ratio.log() / 4, 0.0)
    number = known.sum(dim=1, keepdim=True).clamp(min=1)
    mean = logarithm.sum(dim=1, keepdim=True) / number
    return torch.where(known, (logarithm - mean).exp(), 1.0).float()


def _for_queries(part: Tensor, heads: int) -> Tensor:
    """Repeat [kv_heads, 1, head_dim] for the query heads that share each: [heads, 1, head_dim]."""
    return part.repeat_interleave(heads // part.shape[0], dim=0)


def key_scales(channels: Tensor, bits: int) -> Tensor:
    """Return the scale of each channel of keys, with room for greater ones than were seen.

    Args:
        channels: Finite float [kv_heads, head_dim, tokens].
        bits: 8.

    Returns:
        float32 [kv_heads, head_dim], positive.
    """
    greatest = channels.abs().amax(dim=2) * KEY_ROOM
    return (greatest / activation_range(bits)[1]).clamp(min=SMALLEST_SCALE).float()


def channel_scales(channels: Tensor, bits: int) -> Tensor:
    """Return the scale of each channel with the least squared rounding error.

    Args:
        channels: Values, finite float [kv_heads, head_dim, tokens].
        bits: 8.

    Returns:
        float32 [kv_heads, head_dim].
    """
    _, scale = quantize_weight(channels.flatten(0, 1), WeightSpec(bits), clip_search=True)
    return scale.reshape(channels.shape[:2])


def _by_channel(seen: list[Tensor]) -> Tensor:
    """Return all keys or values [B, kv_heads, T, head_dim] as float32 [kv_heads, head_dim, N]."""
    if not sum(x.numel() for x in seen):
        raise ValueError(
            "calibration of the key-value cache: no token was seen; give text of at least one token"
        )
    channels = torch.cat([x.permute(1, 3, 0, 2).flatten(2) for x in seen], dim=2).float()
    if not bool(torch.isfinite(channels).all()):
        raise ValueError(
            "calibration of the key-value cache: a key or value is NaN or infinite; check the "
            "model's weights"
        )
    return channels


def check_kv_bits(bits: int) -> None:
    """Refuse a bit width that no cache has.

    Raises:
        ValueError: With what was expected and what was found.
    """
    if bits not in (*KV_BITS, FLOAT_KV_BITS):
        raise ValueError(f"KV cache bits: expected 8, 4, or 16 (float), got {bits}")


def _check_parts(bits: int, parts: Mapping[str, Tensor]) -> None:
    expected = stored_parts(bits)
    if parts.keys() != set(expected):
        raise ValueError(
            f"KV cache of {bits} bits: expected tensors {sorted(expected)}, got {sorted(parts)}"
        )
    for name, part in parts.items():
        shape, first = tuple(part.shape), parts[expected[0]].shape
        if len(shape) != 3 or shape != first:
            raise ValueError(
                f"KV cache, {name}: expected shape [kv_heads, 1, head_dim], the same for keys and "
                f"values, got {shape}"
            )
        valid = torch.isfinite(part) & ((part > 0) | (name == "key_mean"))
        if not bool(valid.all()):
            raise ValueError(f"KV cache, {name}: expected finite numbers, of a scale positive ones")
