"""The quantized key-value cache: its numbers, and what calibration has to find for them.

Keys are quantized behind the rotary embedding and R3, values as the model has them (R2 has rotated
them); queries stay float. Every token is rounded by itself, and attention reads the rounded keys
and values of the prompt as of later tokens: it makes no difference in which order tokens come.

8 bits (CHANNEL): one scale a channel of each key-value head, fixed by calibration. It is what the
CPU kernel of ONNX Runtime's GroupQueryAttention stores, so what is evaluated can be exported.

    q = clamp(round_half_even(x / s), -128, 127)                              x' = s q

4 bits (TOKEN): one scale and zero point a token and head, taken from the least and greatest of its
head_dim numbers, both times the clip ratio c = 0.95 (QuaRot, arXiv:2404.00456).

    s = c (max x - min x) / 15,   z = round(-c min x / s),   q = clamp(round(x / s) + z, 0, 15),
    x' = s (q - z)

Departure: of the keys it first takes the calibrated mean of each channel, which is never put back:
q (k - m)^T is q k^T less one number for all keys of a query, and softmax ignores that.
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
FLOAT_KV_BITS = 16
"""The bit width that means "leave the cache in float"."""
TOKEN_CLIP = 0.95
"""Part of a token's range that its scale covers."""


def kv_granularity(bits: int) -> Granularity:
    """Return which numbers of a cache share a scale: those of a channel (8 bits), or of a token."""
    return Granularity.CHANNEL if bits == 8 else Granularity.TOKEN


def stored_parts(bits: int) -> tuple[str, ...]:
    """Name what calibration finds for a cache: arguments of `CacheCodec`, and its saved tensors."""
    if bits == FLOAT_KV_BITS:
        return ()
    static = kv_granularity(bits) is Granularity.CHANNEL
    return ("key_scale", "value_scale") if static else ("key_mean",)


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round each token of each head by its own scale and zero point.

    Args:
        x: float [..., head_dim].
        bits: 4 or 8.

    Returns:
        What the integers stand for, float [..., head_dim].
    """
    most = 2**bits - 1
    greatest = x.amax(dim=-1, keepdim=True).clamp(min=0) * TOKEN_CLIP
    least = x.amin(dim=-1, keepdim=True).clamp(max=0) * TOKEN_CLIP
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

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep keys and values [B, kv_heads, T, head_dim], the keys rotated; change nothing."""
        self._keys.append(key if self._rotation is None else key @ self._rotation.to(key))
        self._values.append(value)
        return query, key, value

    def codec(self, bits: int) -> CacheCodec:
        """Return the codec that fits what was seen.

        Args:
            bits: 4 or 8.

        Raises:
            ValueError: Nothing was seen, or a key or value is NaN or infinite.
        """
        parts = {}
        for name in stored_parts(bits):
            seen = _by_channel(self._keys if name.startswith("key") else self._values)
            parts[name] = (
                seen.mean(dim=2) if name == "key_mean" else channel_scales(seen, bits)
            ).unsqueeze(1)
        return CacheCodec(self._rotation, bits, **parts)


def channel_scales(channels: Tensor, bits: int) -> Tensor:
    """Return the scale of each channel with the least squared rounding error.

    Args:
        channels: Keys or values, finite float [kv_heads, head_dim, tokens].
        bits: 4 or 8.

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
