"""Where the codec of the key-value cache acts in torch: in attention, behind the rotary embedding.

transformers lets a model name its attention function. Ours passes queries, keys and values through
the codec that stands on the attention module, then calls scaled-dot-product attention. The cache
object of transformers keeps float keys as they came; they are rotated and rounded whenever they are
read, which gives the same numbers with a cache as without, and saves no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rolora.block_stream import BlockStream
from rolora.decoder import BlockNames, DecoderNames
from rolora.kv_cache import CacheCodec, CacheRecorder

ATTENTION_NAME = "rolora_sdpa"
"""Under which transformers knows our attention function."""
CODEC_NAME = "kv_cache"
"""Attribute of an attention module that holds its codec."""


def attention_fqn(block: BlockNames) -> str:
    """Return the FQN of the module that holds a block's query, key, value and output."""
    return block.query.rpartition(".")[0]


def install_codecs(
    model: PreTrainedModel, names: DecoderNames, codecs: Iterable[CacheCodec]
) -> None:
    """Give every attention module its codec, and let the model attend through them.

    Args:
        model: A decoder that attends by `sdpa`.
        names: Its parts.
        codecs: One per block, in order.

    Raises:
        ValueError: The model attends otherwise, or there are more or fewer codecs than blocks.
    """
    use_codecs(model)
    for block, codec in zip(names.blocks, codecs, strict=True):
        model.get_submodule(attention_fqn(block)).add_module(CODEC_NAME, codec)


def use_codecs(model: PreTrainedModel) -> None:
    """Make a model attend through the codecs of its attention modules; those without pass on.

    Raises:
        ValueError: The model attends by something else than `sdpa`.
    """
    current = model.config._attn_implementation
    if current not in ("sdpa", ATTENTION_NAME):
        raise ValueError(
            f"attention: expected a model with attn_implementation 'sdpa', got {current!r}; load "
            f"it with that one"
        )
    model.set_attn_implementation(ATTENTION_NAME)


def quantize_kv_cache(
    model: PreTrainedModel,
    names: DecoderNames,
    bits: int,
    rotation: Tensor | None,
    calibration: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str], None] = lambda fqn: None,
) -> None:
    """Calibrate the cache block by block, and install the codecs.

    Keys and values of one block at a time are kept. The blocks behind are quantized as the model
    is, but their caches are not.

    Args:
        model: A float or quantized decoder that attends by `sdpa`, online rotations installed.
        names: Its parts.
        bits: 4 or 8.
        rotation: R3, float32 [head_dim, head_dim], or None.
        calibration: Forward-pass batches.
        progress: Called with the FQN of each finished attention module.

    Raises:
        ValueError: The calibration is empty, or a key or value is not finite; the message names the
            module.
    """
    use_codecs(model)
    stream = BlockStream(model, names, calibration)
    codecs = []
    for block in names.blocks:
        fqn = attention_fqn(block)
        attention, recorder = model.get_submodule(fqn), CacheRecorder(rotation)
        attention.add_module(CODEC_NAME, recorder)
        try:
            stream.advance(block)
            codecs.append(recorder.codec(bits))
        except ValueError as error:
            raise ValueError(f"{fqn}: {error}") from error
        finally:
            delattr(attention, CODEC_NAME)
        progress(fqn)
    install_codecs(model, names, codecs)


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
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return attended


AttentionInterface.register(ATTENTION_NAME, _attend)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
