"""GroupQueryAttention over a float or an 8-bit key-value cache, with or without R3 in front of it.

float cache            the operator applies the rotary embedding itself; R3 would change nothing
                       there and is left out
8 bits without R3      the same, with the calibrated scales; past and present are int8
8 bits with R3         queries and keys get the rotary embedding and R3 as nodes in front of it
8 bits, prompts        the operator multiplies float32 some three times as fast as int8. It gets the
                       integers of keys and values as float32, so that past ones need no more than a
                       Cast, and the scales stand where the tokens are few:

                           scores = (q s_k) k_int^T,    out = (softmax(scores) v_int) s_v

                       TensorScatter puts the new integers into the cache, in place where past and
                       present are one buffer

On a CPU the operator computes scores by blocks, unless it is given sinks. It is faster without
blocks in prompts and batches, and as fast elsewhere, so single tokens get sinks that change nothing
(`WholeScores`). Prompts have both forms under an If, since their scores can take much memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
PRESENT = ("_present_key", "_present_value")
"""Suffixes of the operator's outputs behind the first."""


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


def has_rotary_nodes(checkpoint: Checkpoint, *, in_float: bool) -> bool:
    """Return whether the rotary embedding stands in the graph, since something is done behind it.

    Args:
        checkpoint: What is exported.
        in_float: See `attention_node`.
    """
    return in_float or (checkpoint.kv_bits != FLOAT_KV_BITS and checkpoint.r3 is not None)


def attention_node(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    block: BlockNames,
    heads: list[ir.Value | None],
    past: list[ir.Value],
    shared: AttentionInputs,
    layer: LayerAttention,
    *,
    in_float: bool = False,
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
        in_float: Multiply float32 over a cache of 8 bits.

    Returns:
        The result, float32 [B, S, heads * head_dim], and present key and value.
    """
    prefix = block.output.rpartition(".")[0]
    cos_sin = shared.rotary[layer.rope]
    tables: list[ir.Value | None] = [*cos_sin]
    if has_rotary_nodes(checkpoint, in_float=in_float):
        heads = _rotate_heads(graph, checkpoint, prefix, heads, shared, cos_sin)
        tables = [None, None]
    scales = checkpoint.cache_parts(block)  # none of a float cache
    if in_float:
        return _attend_in_float(graph, checkpoint, prefix, heads, past, scales, shared, layer)
    values = [
        graph.weight(f"{prefix}.kv_cache.{name}", ir.tensor(scale[None]))
        for name, scale in scales.items()
    ]
    return _group_query_attention(
        graph, checkpoint, prefix, [*heads, *past], tables, shared, layer, values
    )


def _group_query_attention(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    prefix: str,
    heads_and_past: list[ir.Value | None],
    tables: list[ir.Value | None],
    shared: AttentionInputs,
    layer: LayerAttention,
    cache_scales: Sequence[ir.Value] = (),
) -> tuple[ir.Value, ...]:
    """Add the operator; returns result, present key and present value."""
    names, computed = checkpoint.names, conventions(checkpoint.config)
    first = [*heads_and_past, shared.seqlens_k, shared.total_length, *tables]
    attributes: dict[str, str | int | float] = {
        "num_heads": names.num_heads,
        "kv_num_heads": names.num_key_value_heads,
        "scale": computed.attention_scale,
        "do_rotary": int(tables[0] is not None),
        "rotary_interleaved": 0,
        "local_window_size": -1 if layer.window is None else layer.window,
    }
    if computed.attention_cap is not None:
        attributes["softcap"] = float(computed.attention_cap)
    if cache_scales:
        attributes |= {
            "kv_cache_bit_width": checkpoint.kv_bits,
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
        }

    def inputs(sink: ir.Value | None) -> list[ir.Value | None]:
        last = [sink, *cache_scales]
        return first if last == [None] else [*first, None, None, *last]

    whole, name = shared.whole_scores, f"{prefix}/GroupQueryAttention"
    if whole is None or whole.few is None:
        return graph.node(
            "GroupQueryAttention",
            inputs(None if whole is None else whole.no_sink),
            name,
            domain=MICROSOFT,
            outputs=("", *PRESENT),
            **attributes,
        )
    cache = ir.DataType.INT8 if cache_scales else ir.DataType.FLOAT
    return graph.choice(
        whole.few,
        "GroupQueryAttention",
        (inputs(whole.no_sink), inputs(None)),
        name,
        forms=("whole", "tiled"),
        domain=MICROSOFT,
        outputs={"": ir.DataType.FLOAT} | dict.fromkeys(PRESENT, cache),
        **attributes,
    )


def _attend_in_float(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    prefix: str,
    heads: list[ir.Value | None],
    past: list[ir.Value],
    scales: Mapping[str, np.ndarray],
    shared: AttentionInputs,
    layer: LayerAttention,
) -> tuple[ir.Value, ...]:
    """Round new keys and values, append them to the cache, and attend over all of them as float."""
    names, span = checkpoint.names, shared.new_tokens
    assert span is not None
    shape = graph.constant(np.array([0, 0, names.num_key_value_heads, names.head_dim], np.int64))
    one, zero = graph.constant(np.float32(1)), graph.constant(np.int8(0))
    zeros, axes = (graph.constant(np.array([number], np.int64)) for number in (0, 2))
    query, *new = heads
    seen, earlier, presents = [], [], []
    for part, x, cache in zip(("key", "value"), new, past, strict=True):
        scale = graph.constant(scales[f"{part}_scale"].reshape(-1))
        name = f"{prefix}/{part}"
        scaled = graph.value("Div", [x, scale], f"{name}/Div")
        q = graph.value("QuantizeLinear", [scaled, one, zero], f"{name}/QuantizeLinear")
        seen.append(graph.value("Cast", [q], f"{name}/Cast", to=ir.DataType.FLOAT))
        q = graph.value("Reshape", [q, shape], f"{name}/Reshape")
        q = graph.value("Transpose", [q], f"{name}/Transpose", perm=[0, 2, 1, 3])
        presents.append(
            graph.value("TensorScatter", [cache, q, span.first], f"{name}/TensorScatter", axis=-2)
        )
        held = graph.value("Slice", [cache, zeros, span.held, axes], f"{name}/past/Slice")
        earlier.append(graph.value("Cast", [held], f"{name}/past/Cast", to=ir.DataType.FLOAT))
    query_scale, value_scale = (
        graph.constant(np.repeat(scales[part], names.num_heads // len(scales[part]), 0).reshape(-1))
        for part in ("key_scale", "value_scale")
    )
    query = graph.value("Mul", [query, query_scale], f"{prefix}/query/Mul")
    attended, *_ = _group_query_attention(
        graph, checkpoint, prefix, [query, *seen, *earlier], [None, None], shared, layer
    )
    return graph.value("Mul", [attended, value_scale], f"{prefix}/Mul"), *presents


def _rotate_heads(
    graph: GraphBuilder,
    checkpoint: Checkpoint,
    prefix: str,
    heads: list[ir.Value | None],
    shared: AttentionInputs,
    cos_sin: tuple[ir.Value, ir.Value],
) -> list[ir.Value | None]:
    """Apply the rotary embedding, and R3 if there is one, to queries and keys in one tensor."""
    names, rotation, span = checkpoint.names, checkpoint.r3, shared.new_tokens
    assert span is not None
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
        [both, span.positions, *cos_sin],
        f"{prefix}/RotaryEmbedding",
        domain=MICROSOFT,
        interleaved=0,
        **attributes,
    )
    if rotation is not None:
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
