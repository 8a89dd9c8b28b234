"""What every attention layer of a graph shares: lengths, and the table of the rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import onnx_ir as ir
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deploy.conventions import context_length, conventions, rope_parameters, rotary_size
from deploy.graph_builder import GraphBuilder

WHOLE_SCORES_BYTES = 96 << 20
"""Up to here a layer's scores are computed whole, if that depends on their size.

That is a fifth faster for a prompt of 512 tokens of SmolLM2-135M (2 threads, AVX-512), and as fast
for one of 8,000, whose scores are 74 MB in the end.
"""
NO_SINK = np.finfo(np.float32).min
"""A sink whose share of the softmax is 0: so low that exp gives that beside any score."""


class Scores(Enum):
    """How the attention of ONNX Runtime's CPU kernels computes scores."""

    TILED = auto()
    """By blocks of keys, as the kernel does by itself; no more than a block is held."""
    WHOLE = auto()
    """All of a layer at once, float32 [B, heads, S, columns of the present cache]."""
    WHOLE_IF_FEW = auto()
    """Whole where they take no more than `WHOLE_SCORES_BYTES`, else by blocks."""


@dataclass(frozen=True)
class WholeScores:
    """What has attention compute whole scores."""

    no_sink: ir.Value
    """float32 [heads], all `NO_SINK`: given sinks, the operator does not go by blocks."""
    few: ir.Value | None
    """bool scalar: whether the scores are few enough. None: they always are."""


@dataclass(frozen=True)
class NewTokens:
    """Where the new tokens of each sequence stand."""

    first: ir.Value
    """int64 [B]: position of the first one."""
    positions: ir.Value
    """int64 [B, S]: those of all."""
    held: ir.Value
    """int64 [1]: how many columns of the cache the longest sequence had filled before."""


@dataclass(frozen=True)
class AttentionInputs:
    """Values that every attention layer shares."""

    last_position: ir.Value
    """int64 [B]: index of the last valid position of each sequence, counted from its start."""
    total: ir.Value
    """int64 scalar: length of the longest sequence, past and present."""
    seqlens_k: ir.Value
    """`last_position` as int32."""
    total_length: ir.Value
    """`total` as int32."""
    rotary: Mapping[str | None, tuple[ir.Value, ir.Value]]
    """cos and sin of each rotary embedding, by `LayerAttention.rope`."""
    new_tokens: NewTokens | None
    """Where the rotary embedding is a node of its own."""
    whole_scores: WholeScores | None
    """None where scores are always computed by blocks."""


def attention_inputs(
    graph: GraphBuilder,
    mask: ir.Value,
    config: PretrainedConfig,
    input_ids: ir.Value,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    past: ir.Value | None = None,
    positions: bool = False,
    scores: Scores = Scores.TILED,
) -> AttentionInputs:
    """Derive lengths from the attention mask, and add the tables of the rotary embeddings.

    Args:
        graph: Receives the nodes.
        mask: int64 [B, past + S].
        config: Of the model.
        input_ids: int64 [B, S].
        dtype: Of the tables.
        past: Keys of a layer, [B, kv_heads, columns, head_dim], if attention gets the cache as it
            is: a buffer may have more columns than there are tokens, and scores have as many.
        positions: Whether `new_tokens` is needed.
        scores: How scores are computed.
    """
    lengths = graph.value(
        "ReduceSum",
        [mask, graph.constant(np.array([1], np.int64))],
        "mask/ReduceSum",
        keepdims=0,
    )
    last = graph.value("Sub", [lengths, graph.constant(np.int64(1))], "mask/Sub")
    seqlens_k = graph.value("Cast", [last], "mask/seqlens_k/Cast", to=ir.DataType.INT32)
    shape = graph.value("Shape", [mask], "mask/Shape")
    total = graph.value("Gather", [shape, graph.constant(np.int64(1))], "mask/Gather", axis=0)
    total_length = graph.value("Cast", [total], "mask/total/Cast", to=ir.DataType.INT32)
    rotary = {}
    for kind in dict.fromkeys(layer.rope for layer in conventions(config).layers):
        rotary[kind] = _tables_at_load(graph, config, kind, dtype)
    return AttentionInputs(
        last,
        total,
        seqlens_k,
        total_length,
        rotary,
        _new_tokens(graph, input_ids, last, total) if positions else None,
        _whole_scores(graph, input_ids, total, past, config.num_attention_heads, scores),
    )


def _whole_scores(
    graph: GraphBuilder,
    input_ids: ir.Value,
    total: ir.Value,
    past: ir.Value | None,
    heads: int,
    scores: Scores,
) -> WholeScores | None:
    """Add what attention needs for whole scores, and whether they are few."""
    if scores is Scores.TILED:
        return None
    no_sink = graph.constant(np.full(heads, NO_SINK))
    if scores is Scores.WHOLE:
        return WholeScores(no_sink, None)
    shape = graph.value("Shape", [input_ids], "scores/Shape")
    rows = graph.value("ReduceProd", [shape], "scores/ReduceProd", keepdims=0)
    columns = total
    if past is not None:
        shape = graph.value("Shape", [past], "scores/past/Shape")
        held = graph.value("Gather", [shape, graph.constant(np.int64(2))], "scores/Gather", axis=0)
        columns = graph.value("Max", [total, held], "scores/Max")
    count = graph.value("Mul", [rows, columns], "scores/Mul")  # of one head
    most = WHOLE_SCORES_BYTES // (heads * np.dtype(np.float32).itemsize)
    few = graph.value("LessOrEqual", [count, graph.constant(np.int64(most))], "scores/LessOrEqual")
    return WholeScores(no_sink, few)


def _new_tokens(
    graph: GraphBuilder, input_ids: ir.Value, last: ir.Value, total: ir.Value
) -> NewTokens:
    """Count from the first new token of each sequence; a prompt starts at 0, padded or not."""
    zero, one = graph.constant(np.int64(0)), graph.constant(np.int64(1))
    shape = graph.value("Shape", [input_ids], "positions/Shape")
    count = graph.value("Gather", [shape, one], "positions/Gather", axis=0)
    offsets = graph.value("Range", [zero, count, one], "positions/Range")
    end = graph.value("Add", [last, one], "positions/end/Add")
    first = graph.value("Sub", [end, count], "positions/Sub")
    first = graph.value("Max", [first, zero], "positions/Max")
    column = graph.constant(np.array([1], np.int64))
    by_sequence = graph.value("Unsqueeze", [first, column], "positions/Unsqueeze")
    positions = graph.value("Add", [by_sequence, offsets], "positions/Add")
    held = graph.value("Sub", [total, count], "positions/held/Sub")
    axis = graph.constant(np.array([0], np.int64))
    held = graph.value("Unsqueeze", [held, axis], "positions/held/Unsqueeze")
    return NewTokens(first, positions, held)


def last_hidden(
    graph: GraphBuilder, hidden: ir.Value, input_ids: ir.Value, shared: AttentionInputs
) -> ir.Value:
    """Select the hidden state of each sequence's last token, before any padding on the right.

    Args:
        graph: Receives the nodes.
        hidden: float32 [B, S, H].
        input_ids: int64 [B, S].
        shared: Of the same graph.

    Returns:
        float32 [B, 1, H].
    """
    shape = graph.value("Shape", [input_ids], "last/Shape")
    length = graph.value("Gather", [shape, graph.constant(np.int64(1))], "last/Gather", axis=0)
    end = graph.value("Sub", [length, graph.constant(np.int64(1))], "last/end/Sub")
    # A prompt's last token is where its padding begins, a later one's in the last column.
    index = graph.value("Min", [shared.last_position, end], "last/index/Min")
    axes = graph.constant(np.array([1, 2], np.int64))
    index = graph.value("Unsqueeze", [index, axes], "last/Unsqueeze")
    return graph.value("GatherND", [hidden, index], "last/GatherND", batch_dims=1)


def _tables_at_load(
    graph: GraphBuilder, config: PretrainedConfig, kind: str | None, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Add cos and sin of a rotary embedding, which ONNX Runtime computes when it loads the graph.

    Stored, they take 34 MB of a model with a context of 131,072 and heads of 64. What it computes
    is within the last bit of `rotary_tables`.
    """
    inverse_frequency, scaling = _frequencies(config, kind)
    name = "rotary" if kind is None else f"{kind}/rotary"
    zero, one, end = (
        graph.constant(np.float32(number)) for number in (0, 1, context_length(config))
    )
    positions = graph.value("Range", [zero, end, one], f"{name}/Range")
    column = graph.constant(np.array([1], np.int64))
    positions = graph.value("Unsqueeze", [positions, column], f"{name}/Unsqueeze")
    frequencies = graph.constant(inverse_frequency)
    angles = graph.value("Mul", [positions, frequencies], f"{name}/Mul")
    cos, sin = (graph.value(part, [angles], f"{name}/{part}") for part in ("Cos", "Sin"))
    if scaling != 1.0:
        factor = graph.constant(np.float32(scaling))
        cos = graph.value("Mul", [cos, factor], f"{name}/cos/Mul")
        sin = graph.value("Mul", [sin, factor], f"{name}/sin/Mul")
    if dtype != ir.DataType.FLOAT:
        cos = graph.value("Cast", [cos], f"{name}/cos/Cast", to=dtype)
        sin = graph.value("Cast", [sin], f"{name}/sin/Cast", to=dtype)
    return cos, sin


def rotary_tables(
    config: PretrainedConfig, kind: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate cos and sin of the rotary embedding for every position of the context.

    Args:
        config: With `rope_parameters` (default, linear, llama3, yarn ...) and
            `max_position_embeddings`.
        kind: Which one, as `LayerAttention.rope` names it.

    Returns:
        Two float32 arrays [context, rotary size / 2].
    """
    inverse_frequency, scaling = _frequencies(config, kind)
    positions = torch.arange(context_length(config)).float()
    angles = positions[:, None] * torch.from_numpy(inverse_frequency)[None, :]
    return (angles.cos() * scaling).numpy(), (angles.sin() * scaling).numpy()


def _frequencies(config: PretrainedConfig, kind: str | None) -> tuple[np.ndarray, float]:
    """Return the angles a position adds, float32 [rotary size / 2], and a factor of cos and sin."""
    rope, size = rope_parameters(config)[kind], rotary_size(config)
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        inverse_frequency, scaling = 1.0 / (rope["rope_theta"] ** exponents), 1.0
    else:
        inverse_frequency, scaling = ROPE_INIT_FUNCTIONS[rope_type](
            config, torch.device("cpu"), **({} if kind is None else {"layer_type": kind})
        )
    return inverse_frequency.float().numpy(), float(scaling)
