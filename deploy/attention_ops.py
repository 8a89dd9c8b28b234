"""GroupQueryAttention over a float or an 8-bit key-value cache, with or without R3 in front of it.

float cache            the operator applies the rotary embedding itself; R3 would change nothing
                       there and is left out
8 bits without R3      the same, with the calibrated scales; past and present are int8
8 bits with R3         queries and keys get the rotary embedding and R3 as nodes in front of it
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploy.attention_inputs import AttentionInputs
from deploy.checkpoint import Checkpoint
from deploy.conventions import LayerAttention, conventions, rotary_size
from deploy.errors import UnsupportedModelError
from deploy.graph_builder import MICROSOFT, GraphBuilder
from rolora.decoder import BlockNames
from rolora.kv_cache import FLOAT_KV_BITS

INTEGER_CACHE_BITS = 8


def cache_dtype(checkpoint: Checkpoint, float_type: ir.DataType) -> ir.DataType:
    """Return the element type of past and present.

    Args:
        checkpoint: What is exported.
        float_type: Of the graph's activations, which a cache in float has too.

    Raises:
        UnsupportedModelError: The cache has a scale a token, which the operator cannot store.
    """
    if checkpoint.kv_bits == FLOAT_KV_BITS:
        return float_type
    if checkpoint.kv_bits != INTEGER_CACHE_BITS:
        raise UnsupportedModelError(
            f"{checkpoint.directory}: its KV cache of {checkpoint.kv_bits} bits has a scale a "
            f"token, and ONNX Runtime's attention stores only calibrated scales a channel; to "
            f"export, quantize with --kv-bits {INTEGER_CACHE_BITS} or {FLOAT_KV_BITS}; rolora "
            f"evaluate runs this checkpoint as it is"
        )
    return ir.DataType.INT8


def has_rotation_nodes(checkpoint: Checkpoint) -> bool:
    """Return whether R3 stands in the graph, so that the rotary embedding has to, too."""
    return checkpoint.kv_bits != FLOAT_KV_BITS and checkpoint.r3 is not None


def attention_node(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    block: BlockNames,
    heads: list[ir.Value | None],
    past: list[ir.Value],
    shared: AttentionInputs,
    layer: LayerAttention,
) -> tuple[ir.Value, ...]:
    """Add attention of one block.

    Args:
        graph: Receives the nodes.
        checkpoint: What is exported.
        block: The block's names.
        heads: Query, key and value, float32 [B, S, heads * head_dim] each; or all three packed, and
            None twice.
        past: Key and value of the cache, [B, kv_heads, T, head_dim].
        shared: What all layers share.
        layer: What is this layer's alone.

    Returns:
        The result, float32 [B, S, heads * head_dim], and present key and value.
    """
    names, prefix = checkpoint.names, block.output.rpartition(".")[0]
    computed = conventions(checkpoint.config)
    cos_sin = shared.rotary[layer.rope]
    tables: list[ir.Value | None] = [*cos_sin]
    if has_rotation_nodes(checkpoint):
        heads, tables = (
            _rotate_heads(graph, checkpoint, prefix, heads, shared, cos_sin),
            [None, None],
        )
    inputs = [*heads, *past, shared.seqlens_k, shared.total_length, *tables]
    attributes: dict[str, str | int | float] = {}
    if computed.attention_cap is not None:
        attributes["softcap"] = float(computed.attention_cap)
    if checkpoint.kv_bits != FLOAT_KV_BITS:
        scales = [
            graph.weight(f"{prefix}.kv_cache.{name}", ir.tensor(part[None]))
            for name, part in checkpoint.cache_parts(block).items()
        ]
        inputs += [None, None, None, *scales]
        attributes |= {
            "kv_cache_bit_width": checkpoint.kv_bits,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
        }
    return graph.node(
        "GroupQueryAttention",
        inputs,
        f"{prefix}/GroupQueryAttention",
        domain=MICROSOFT,
        outputs=("", "_present_key", "_present_value"),
        num_heads=names.num_heads,
        kv_num_heads=names.num_key_value_heads,
        scale=computed.attention_scale,
        do_rotary=int(tables[0] is not None),
        rotary_interleaved=0,
        local_window_size=-1 if layer.window is None else layer.window,
        **attributes,
    )


def _rotate_heads(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    prefix: str,
    heads: list[ir.Value | None],
    shared: AttentionInputs,
    cos_sin: tuple[ir.Value, ir.Value],
) -> list[ir.Value | None]:
    """Apply the rotary embedding and R3 to queries and keys, as heads of one tensor."""
    names, rotation = checkpoint.names, checkpoint.r3
    assert rotation is not None
    queries, keys = (
        count * names.head_dim for count in (names.num_heads, names.num_key_value_heads)
    )
    query, key, value = heads
    if key is None:
        sizes = graph.constant(np.array([queries + keys, keys], np.int64))
        both, value = graph.node(
            "Split", [query, sizes], f"{prefix}/qkv/Split", outputs=("_qk", "_v"), axis=-1
        )
    else:
        both = graph.value("Concat", [query, key], f"{prefix}/qk/Concat", axis=-1)
    attributes = {}
    if (rotated := rotary_size(checkpoint.config)) < names.head_dim:
        heads_of_both = names.num_heads + names.num_key_value_heads
        attributes = {"rotary_embedding_dim": rotated, "num_heads": heads_of_both}
    both = graph.value(
        "RotaryEmbedding",
        [both, shared.positions, *cos_sin],
        f"{prefix}/RotaryEmbedding",
        domain=MICROSOFT,
        interleaved=0,
        **attributes,
    )
    split = graph.constant(np.array([0, 0, -1, names.head_dim], np.int64))
    joined = graph.constant(np.array([0, 0, queries + keys], np.int64))
    by_head = graph.value("Reshape", [both, split], f"{prefix}/R3/split/Reshape")
    matrix = graph.constant(rotation)
    by_head = graph.value("MatMul", [by_head, matrix], f"{prefix}/R3/MatMul")
    both = graph.value("Reshape", [by_head, joined], f"{prefix}/R3/join/Reshape")
    sizes = graph.constant(np.array([queries, keys], np.int64))
    query, key = graph.node(
        "Split", [both, sizes], f"{prefix}/qk/Split", outputs=("_q", "_k"), axis=-1
    )
    return [query, key, value]
