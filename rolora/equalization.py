"""Give every channel of a linear's input the share of the rounding noise that it can bear.

Rounding a rotated input with one step a token adds about the same noise to each of its K channels.
With C = E[x x^T] of the input, M = W^T W of all linears that read it, and channels scaled by s
before the rotation (and back in the weights), the noise of the outputs is proportional to

    tr(S C S) tr(S^-1 M S^-1) / K,    S = diag(s),

which is least, by the inequality of Cauchy and Schwarz, for

    s_i = (M_ii / C_ii)^(1/4).

Rounding weights to nearest adds noise of the same form. GPTQ shapes it: with the factors L D L^T of
the rotated moments it leaves tr(D) tr(S^-1 M S^-1) / K (arXiv:2307.13304, theorem 1). The product
of D is det(S)^2 det(C) in every basis; where its entries are equal, as they are at best, the noise
is least for

    s_i = M_ii^(1/2),

all columns of the weights then having one norm. Measured on SmolLM2-135M at W4A8, the divergence
from the float model is 0.109 by the first rule, 0.105 half way between, 0.099 by the second.

The scales sit where they cost nothing, in a norm's gain or in the rows of a linear, and a rotation
behind them spreads what is left over::

    attention   gain of the attention norm    undone by q, k, v
    value       rows of v                     undone by o, in all query heads that share a v head
    mlp         gain of the MLP norm          undone by gate, up
    down        rows of up                    undone by down
    head        gain of the final norm        undone by the head, or, where the head shares the
                                              embedding's table, the gain that stays in the norm

The scales of `value` and `down` sit between two linears of a block and cost nothing at all: alone
they take the divergence of SmolLM2-135M at W8A8 from 0.0043 to 0.0038. Those behind the norms
differ from norm to norm, and R1 cannot be in the residual stream, where one basis serves all
layers: it acts at run time behind each norm (`rolora.rotation`), as two small products. In W16A4
all five take the perplexity from 1.65 to 1.22 times the float model's.

Sources: scaling between neighbours is that of data-free quantization (arXiv:1906.04721) and
SmoothQuant (2211.10438), with ranges; invertible transforms learned for 4 bits are FlatQuant's
(2410.09426). The closed forms above are derived here.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rolora.decoder import BlockNames, DecoderNames
from rolora.fold import norms_and_readers, row_chunks
from rolora.scheme import QuantizationRecipe, WeightMethod

FIELDS = ("attention", "value", "mlp", "down", "head")
"""Of `Equalization`, in the order in which data meets them."""
INNER_FIELDS = ("value", "down")
"""Those between two linears of a block, which R1 has no part in."""
KEYS = tuple(f"equalization.{name}" for name in FIELDS)
"""Their names among other tensors."""


class Equalized(StrEnum):
    """Which inputs have scales."""

    NONE = "none"
    INNER = "inner"
    """Those of o and down."""
    ALL = "all"
    """Those behind the norms too; R1 then acts at run time."""


class Noise(Enum):
    """What is to be least; the powers of M_ii and of 1 / C_ii in the scales."""

    OF_INPUTS = (1 / 4, 1 / 4)
    """Rounded inputs, and weights rounded to nearest."""
    OF_WEIGHTS = (1 / 2, 0.0)
    """Weights rounded by GPTQ."""


def louder_noise(recipe: QuantizationRecipe | None) -> Noise:
    """Return what costs a model more: by GPTQ, weights of fewer bits than their inputs."""
    if recipe is None or recipe.weights is not WeightMethod.GPTQ:
        return Noise.OF_INPUTS
    scheme = recipe.scheme
    return Noise.OF_WEIGHTS if scheme.weight_bits < scheme.activation_bits else Noise.OF_INPUTS


@dataclass(frozen=True, eq=False)
class Equalization:
    """The scales s of a decoder's inputs, float64, finite and above 0 (the head's: not 0).

    Those behind the norms are there together, or None.
    """

    value: Tensor
    """[layers, key-value heads * head_dim]"""
    down: Tensor
    """[layers, intermediate_size]"""
    attention: Tensor | None = None
    """[layers, hidden_size]"""
    mlp: Tensor | None = None
    """[layers, hidden_size]"""
    head: Tensor | None = None
    """[hidden_size]; the gain of the final norm, where the head shares the embedding's table."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: A tensor is not of float64, has other dimensions, or values that are not
                finite and above 0 (the head's: not 0); or only some norms have scales.
        """
        behind_norms = [self.attention is None, self.mlp is None, self.head is None]
        if any(behind_norms) and not all(behind_norms):
            raise ValueError("equalization: expected scales behind all norms, or none; got some")
        for key, tensor in self.to_tensors().items():
            dims = 1 if tensor is self.head else 2
            if tensor.dtype != torch.float64 or tensor.dim() != dims or not tensor.numel():
                raise ValueError(
                    f"{key}: expected float64 of {dims} dimensions, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                )
            allowed = tensor != 0 if tensor is self.head else tensor > 0
            if not bool((torch.isfinite(tensor) & allowed).all()):
                expected = "other than" if tensor is self.head else "above"
                raise ValueError(f"{key}: expected finite scales {expected} 0")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Equalization | None:
        """Read what `to_tensors` returned, among other tensors; None if nothing of it is there.

        Raises:
            ValueError: A part of it is missing, or its numbers are not scales.
        """
        found = {
            name: tensors[key] for key, name in zip(KEYS, FIELDS, strict=True) if key in tensors
        }
        if not found:
            return None
        wanted = INNER_FIELDS if found.keys() <= set(INNER_FIELDS) else FIELDS
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"equalization: expected all scales, got no {', '.join(missing)}")
        return cls(**found)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the scales that there are, by `KEYS`."""
        named = ((key, getattr(self, name)) for key, name in zip(KEYS, FIELDS, strict=True))
        return {key: tensor for key, tensor in named if tensor is not None}

    @property
    def inputs(self) -> Equalized:
        """Which inputs have scales; never `NONE`."""
        return Equalized.INNER if self.attention is None else Equalized.ALL

    def require_sizes(self, names: DecoderNames) -> None:
        """Refuse a decoder of other sizes.

        Raises:
            ValueError: With the first size that differs.
        """
        layers, hidden = len(names.blocks), names.hidden_size
        shapes = (
            (layers, hidden),
            (layers, names.num_key_value_heads * names.head_dim),
            (layers, hidden),
            (layers, names.intermediate_size),
            (hidden,),
        )
        expected = dict(zip(KEYS, shapes, strict=True))
        for key, tensor in self.to_tensors().items():
            shape = expected[key]
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{key}: expected {shape} as in the model, got {tuple(tensor.shape)}, measured "
                    f"on another model; use the artifact that belongs to this model"
                )

    def of_linear(self, fqn: str, names: DecoderNames) -> tuple[Tensor | None, Tensor | None]:
        """Return the scales of a linear's input and output; None where there are none."""
        if fqn == names.head:
            return self.head, None
        for layer, block in enumerate(names.blocks):
            if fqn in block.linears():
                return self._in_block(fqn, layer, block, names)
        raise ValueError(f"{fqn}: expected a linear of the decoder, got a name that is none")

    def _in_block(
        self, fqn: str, layer: int, block: BlockNames, names: DecoderNames
    ) -> tuple[Tensor | None, Tensor | None]:
        attention = None if self.attention is None else self.attention[layer]
        mlp = None if self.mlp is None else self.mlp[layer]
        value, down = self.value[layer], self.down[layer]
        return {
            block.query: (attention, None),
            block.key: (attention, None),
            block.value: (attention, value),
            block.output: (_per_query_head(value, names), None),
            block.gate: (mlp, None),
            block.up: (mlp, down),
            block.down: (down, None),
        }[fqn]


def equalize_model(
    model: PreTrainedModel,
    names: DecoderNames,
    equalization: Equalization,
    only: Container[str] | None = None,
) -> None:
    """Scale the channels of a model whose norm gains are folded, in place.

    Args:
        model: Its head is untied.
        names: Its parts.
        equalization: The scales.
        only: FQNs of the linears to rewrite, all readers of a norm together; None is all.

    Raises:
        ValueError: The scales are those of another model; or a weight would not be finite, and the
            model is partly rewritten.

    Invariant:
        Logits are unchanged up to the rounding of each new weight to its dtype.
    """
    equalization.require_sizes(names)
    with torch.no_grad():
        for fqn in (*names.linears(), names.head):
            if only is not None and fqn not in only:
                continue
            before, behind = equalization.of_linear(fqn, names)
            if before is None and behind is None:
                continue
            linear = model.get_submodule(fqn)
            weight = model.get_parameter(f"{fqn}.weight")
            for rows in row_chunks(weight):
                scaled = scale_delta(weight[rows], before, None if behind is None else behind[rows])
                if not bool(scaled.to(weight.dtype).isfinite().all()):
                    raise ValueError(f"{fqn}: equalizing it gives values that are not finite")
                weight[rows] = scaled.to(weight.dtype)
            bias = getattr(linear, "bias", None)
            if behind is not None and isinstance(bias, Tensor):
                bias.copy_(bias.double() * behind)
        for norm, reader in dict(norms_and_readers(names, only)).items():
            scales, _ = equalization.of_linear(reader, names)
            if scales is not None:
                model.get_parameter(f"{norm}.weight").copy_(scales - names.norm_offset)


def scale_delta(delta: Tensor, before: Tensor | None, behind: Tensor | None) -> Tensor:
    """Return a weight, or a change of it, between scaled channels: diag(behind) W diag(1 / before).

    Args:
        delta: Floating [out, in].
        before: Scales of its input, float64 [in].
        behind: Of its output, float64 [out].
    """
    delta = delta.double()
    delta = delta if before is None else delta / before
    return delta if behind is None else delta * behind[:, None]


def _per_query_head(channels: Tensor, names: DecoderNames) -> Tensor:
    """Repeat what a value head has for its query heads: [kv_heads * d] -> [heads * d]."""
    heads = channels.reshape(names.num_key_value_heads, 1, names.head_dim)
    return heads.expand(-1, names.num_heads // names.num_key_value_heads, -1).flatten()
