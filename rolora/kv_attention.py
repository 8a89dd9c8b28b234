"""Where the codec of the key-value cache acts in torch: in attention, behind the rotary embedding.

transformers lets a model name its attention function. Ours passes queries, keys and values through
the codec that stands on the attention module, then calls scaled-dot-product attention, or computes
scores with a cap by itself, which that knows nothing of. The cache
object of transformers keeps float keys as they came; they are rotated and rounded whenever they are
read, which gives the same numbers with a cache as without, and saves no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rolora.block_stream import BlockStream, KnownRows, tokens_in
from rolora.decoder import BlockNames, DecoderNames
from rolora.kv_cache import CacheCodec, CacheRecorder
from rolora.naming import naming

ATTENTION_NAME = "rolora_cache"
"""Under which transformers knows our attention function; one with "sdpa" in it would be refused
for models that cap their scores."""
CODEC_NAME = "kv_cache"
"""Attribute of an attention module that holds its codec."""
_STATES = "cache"
"""Name of the hidden states that walk through the model."""


def install_codecs(
    model: PreTrainedModel, names: DecoderNames, codecs: Iterable[CacheCodec]
) -> None:
    """Give every attention module its codec, and let the model attend through them.

    Args:
        model: A decoder that attends by `sdpa` or `eager`.
        names: Its parts.
        codecs: One per block, in order.

    Raises:
        ValueError: The model attends otherwise, or there are more or fewer codecs than blocks.
    """
    use_codecs(model)
    for block, codec in zip(names.blocks, codecs, strict=True):
        model.get_submodule(block.attention).add_module(CODEC_NAME, codec)


def use_codecs(model: PreTrainedModel) -> None:
    """Make a model attend through the codecs of its attention modules; those without pass on.

    Raises:
        ValueError: The model attends by something else than `sdpa` or `eager`.
    """
    current = model.config._attn_implementation
    if current not in ("sdpa", "eager", ATTENTION_NAME):
        raise ValueError(
            f"attention: expected a model with attn_implementation 'sdpa' or 'eager', got "
            f"{current!r}; load it with one of these"
        )
    model.set_attn_implementation(ATTENTION_NAME)


class CacheWalk:
    """Calibrates the cache block by block, and installs the codecs.

    Keys and values of one block at a time are kept, and only its weights need be in memory. The
    blocks behind see those in front as they are, with quantized linears but a float cache.

    Args:
        model: A float or quantized decoder that attends by `sdpa` or `eager`, online rotations
            installed.
        names: Its parts.
        bits: 4 or 8.
        rotation: R3, float32 [head_dim, head_dim], or None.
        batches: Forward-pass batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: DecoderNames,
        bits: int,
        rotation: Tensor | None,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self._model = model
        self._names = names
        self._bits = bits
        self._rotation = rotation
        self._batches = batches
        self._stream: BlockStream | None = None

    def begin(self, embedding: nn.Module | None = None) -> None:
        """Put the hidden states in front of the first block.

        Args:
            embedding: What takes the embedding's place; None is the model's own, now in memory.

        Raises:
            ValueError: The model attends by something else.
        """
        use_codecs(self._model)
        self._stream = BlockStream(self._model, self._names, self._batches, embedding)

    def calibrate(self, block: BlockNames) -> None:
        """Install the codec of the next block, whose linears are as they will stay.

        Raises:
            ValueError: The calibration is empty, or a key or value is not finite; the message names
                the module.
        """
        assert self._stream is not None, "begin or restore comes first"
        fqn = block.attention
        attention, recorder = self._model.get_submodule(fqn), CacheRecorder(self._rotation)
        attention.add_module(CODEC_NAME, recorder)
        try:
            with naming(fqn):
                self._stream.advance(block)
                codec = recorder.codec(self._bits)
        finally:
            delattr(attention, CODEC_NAME)
        attention.add_module(CODEC_NAME, codec)

    def state(self) -> dict[str, Tensor]:
        """Return the hidden states in front of the next block."""
        states = [] if self._stream is None else self._stream.states
        return {f"{_STATES}.{i}": state for i, state in enumerate(states)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, with the same model, bits and batches.

        Args:
            state: It, among other tensors by other names.

        Raises:
            ValueError: The states are those of another calibration.
        """
        tokens = tokens_in(self._batches)
        self.begin(KnownRows(tokens, torch.zeros(len(tokens), self._names.hidden_size)))
        expected = {key: tuple(value.shape) for key, value in self.state().items()}
        own = {key: value for key, value in state.items() if key.startswith(f"{_STATES}.")}
        if {key: tuple(value.shape) for key, value in own.items()} != expected:
            raise ValueError(
                f"hidden states: expected those of {len(self._batches)} calibration batches, got "
                f"others"
            )
        assert self._stream is not None
        self._stream.states = [own[key] for key in expected]


def quantize_kv_cache(
    model: PreTrainedModel,
    names: DecoderNames,
    bits: int,
    rotation: Tensor | None,
    calibration: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str], None] = lambda fqn: None,
) -> None:
    """Calibrate the cache of a model in memory, and install the codecs.

    Args:
        model: See `CacheWalk`.
        names: Its parts.
        bits: 4 or 8.
        rotation: R3, float32 [head_dim, head_dim], or None.
        calibration: Forward-pass batches.
        progress: Called with the FQN of each finished attention module.

    Raises:
        ValueError: The calibration is empty, or a key or value is not finite; the message names the
            module.
    """
    walk = CacheWalk(model, names, bits, rotation, list(calibration))
    walk.begin()
    for block in names.blocks:
        walk.calibrate(block)
        progress(block.attention)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend through the codec of the module, if it has one."""
    codec = getattr(module, CODEC_NAME, None)
    if codec is not None:
        query, key, value = codec(query, key, value)
    cap, scale = options.pop("softcap", None), options.get("scaling")
    if cap is not None:
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        return _attend_capped(query, key, value, attention_mask, scale, float(cap)), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return attended


def _attend_capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float
) -> Tensor:
    """Attend with scores s that are c tanh(s / c) in front of the mask, which sdpa cannot.

    Args:
        query: float [B, heads, S, n].
        key: float [B, kv_heads, T, n].
        value: As key.
        mask: [B, 1, S, T]: bool, True where a token is attended to, or floating, added to the
            scores, as a model of eager attention makes it; None is causal.
        scale: Factor of the products.
        cap: c.

    Returns:
        float [B, S, heads, n].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = cap * torch.tanh(query @ key.mT * scale / cap)
    if mask is None:
        new, total = scores.shape[-2:]
        mask = torch.ones(new, total, dtype=torch.bool, device=scores.device).tril(total - new)
    if mask.is_floating_point():
        scores = scores + mask
    else:  # not -inf: a padding token that sees nothing must not become NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, _attend)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
