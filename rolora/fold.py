"""Fold norm gains into the linears that read them, and untie the head.

A pre-norm decoder computes W (g * x / rms(x)) + b. With W' = W diag(g) and g' = 1 that is
W' (x / rms(x)) + b: the same function, and x / rms(x) commutes with a rotation R because
rms(x R) = rms(x). So folding must come before R1 and is exact in real arithmetic.

A tied head shares its matrix with the embedding, but the final norm's gain belongs to the head
alone; it gets its own copy first.

Sources: QuaRot (arXiv:2404.00456), SpinQuant (2405.16406), RoLoRA (2407.08044). Departure: all
three also subtract the row mean of the embedding. That keeps a LayerNorm model's function and
changes an RMSNorm model's: it is not done here.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rolora.decoder import DecoderNames
from rolora.rtn import rows_at_a_time

_CHUNK_STEPS = 4
"""Steps of 2^20 elements in float64 at a time (32 MiB): what rewriting a weight costs beyond it."""


def untie_head(model: PreTrainedModel, names: DecoderNames) -> bool:
    """Give the head its own copy of a matrix that it shares with the embedding.

    Also sets `tie_word_embeddings` to False, so that saving and loading keep both matrices.

    Returns:
        True if the two were tied.

    Invariant:
        Logits are unchanged, bit by bit.
    """
    head = model.get_submodule(names.head)
    weight = model.get_parameter(f"{names.head}.weight")
    tied = weight is model.get_parameter(f"{names.embedding}.weight")
    if tied:
        own = weight.detach().clone()
        head.register_parameter("weight", nn.Parameter(own, requires_grad=weight.requires_grad))
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    return tied


def fold_norm_gains(
    model: PreTrainedModel, names: DecoderNames, only: Container[str] | None = None
) -> None:
    """Move the gain of every norm that a linear reads into that linear, and set the gain to 1.

    Norms of query and key heads (Qwen3) stay, and norms behind `output` and `down` (Gemma), which
    no linear reads: no rotation passes through them.

    Args:
        model: Changed in place.
        names: Its parts.
        only: FQNs of the linears to fold into, all readers of a norm together; None is all.

    Raises:
        ValueError: The head is tied; a norm has a bias (it is no RMSNorm); shapes disagree; or a
            folded weight is not finite in its dtype. The model is then unchanged.

    Invariant:
        Logits are unchanged up to rounding of W diag(g), from float64 to the weight's dtype.
    """
    pairs = list(norms_and_readers(names, only))
    readers = {reader for _, reader in pairs}
    head, embedding = (model.get_submodule(fqn) for fqn in (names.head, names.embedding))
    if names.head in readers and head.weight is embedding.weight:
        raise ValueError(
            f"{names.head}: expected a matrix of its own, got one tied to {names.embedding}; "
            f"call untie_head first"
        )
    with torch.no_grad():
        for norm_fqn, fqn in pairs:
            gain, weight = norm_gain(model, names, norm_fqn), model.get_parameter(f"{fqn}.weight")
            if weight.shape[1] != gain.shape[0]:
                raise ValueError(
                    f"{fqn}: expected {gain.shape[0]} inputs, the size of {norm_fqn}, "
                    f"got a weight of shape {tuple(weight.shape)}"
                )
            for rows in row_chunks(weight):
                if not (weight[rows].double() * gain).to(weight.dtype).isfinite().all():
                    raise ValueError(
                        f"{fqn}: folding the gain of {norm_fqn} gives values that are not finite "
                        f"in {weight.dtype}; load the model in float32 and check its weights"
                    )
        for norm_fqn, fqn in pairs:
            gain, weight = norm_gain(model, names, norm_fqn), model.get_parameter(f"{fqn}.weight")
            for rows in row_chunks(weight):
                weight[rows] = (weight[rows].double() * gain).to(weight.dtype)
        for norm_fqn in dict(pairs):
            model.get_parameter(f"{norm_fqn}.weight").fill_(1.0 - names.norm_offset)


def norm_gains(model: PreTrainedModel, names: DecoderNames) -> dict[str, tuple[str, Tensor]]:
    """Return for each linear that reads a norm the norm's FQN and gain, float64 [hidden_size]."""
    return {fqn: (norm, norm_gain(model, names, norm)) for norm, fqn in norms_and_readers(names)}


def row_chunks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of rows of a matrix [rows, columns], small enough to compute with in float64."""
    step = chunk_rows(weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def chunk_rows(columns: int) -> int:
    """Return how many rows of so many columns `row_chunks` puts into a slice.

    A multiple of the rows that rounding takes at a time: a matrix that comes in such slices gives
    the same integers and error sums as one that comes whole.
    """
    return _CHUNK_STEPS * rows_at_a_time(columns)


def norms_and_readers(
    names: DecoderNames, only: Container[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield the FQNs of each norm and of a linear that reads it; `only` keeps some linears."""
    for block in names.blocks:
        for fqn in (block.query, block.key, block.value):
            if only is None or fqn in only:
                yield block.attention_norm, fqn
        for fqn in (block.gate, block.up):
            if only is None or fqn in only:
                yield block.mlp_norm, fqn
    if only is None or names.head in only:
        yield names.final_norm, names.head


def norm_gain(model: PreTrainedModel, names: DecoderNames, norm_fqn: str) -> Tensor:
    """Return the gain of a norm, float64 [hidden_size].

    Raises:
        ValueError: It has a bias, so that it is no RMSNorm.
    """
    norm = model.get_submodule(norm_fqn)
    if getattr(norm, "bias", None) is not None:
        raise ValueError(
            f"{norm_fqn}: expected an RMSNorm, got a norm with a bias (LayerNorm); "
            f"its mean and bias do not commute with a rotation"
        )
    return norm.get_parameter("weight").detach().double() + names.norm_offset
