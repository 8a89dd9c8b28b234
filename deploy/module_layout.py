"""One layout of modules for every family, and the way back to a family's own.

Rotation, quantization, adapters and export work on linears of one role each. A family that stores
several of them as one matrix (`deploy.architecture.joined_projections`) is brought into that layout
when it is loaded, and out of it when it leaves as a model or adapter for other programs:

    own layout                      ours
    <fqn>.weight  [q + k + v, in]   <fqn>.q_proj.weight [q, in], <fqn>.k_proj.weight [k, in] ...

The parts stand under the joined module's name, in the order of their rows, and a `JoinedLinear` in
its place lays their outputs side by side. An embedding that multiplies what it looks up becomes a
plain one, <fqn>.table, inside a `ScaledEmbedding`. So the model's own code runs unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deploy.architecture import JoinedProjection, decoder_names, joined_projections
from deploy.conventions import conventions
from reslora.adapter import Adapter


class JoinedLinear(nn.Module):
    """Several linears that read one input, in the place of the one whose rows they are.

    Args:
        linears: By their names, in the order of their outputs.

    Equivalent to:
        The linear whose weight and bias are theirs, concatenated.
    """

    def __init__(self, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., sum of outputs] for x [..., in]."""
        return torch.cat([self.get_submodule(name)(x) for name in self._names], dim=-1)


class ScaledEmbedding(nn.Module):
    """A plain embedding table, whose rows are multiplied by a number when they are looked up.

    Args:
        table: Looks up float [..., D]; may be replaced by another that does.
        scale: The number; it is rounded to float32, then to the dtype of the rows.
    """

    def __init__(self, table: nn.Module, scale: float) -> None:
        super().__init__()
        self.table = table
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The rows as they are stored, for those who ask a model for its input embeddings."""
        return self.table.get_parameter("weight")

    def forward(self, ids: Tensor) -> Tensor:
        """Return float [..., D] for token ids int64 [...]."""
        rows: Tensor = self.table(ids)
        return rows * torch.tensor(self.scale, dtype=torch.float32).to(rows.dtype)


def empty_decoder(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a decoder without memory (device "meta"), in its own layout.

    Args:
        config: Of a supported model.
        dtype: Of its parameters; None is the config's.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=conventions(config).torch_attention, dtype=dtype
        )
    return model


def to_our_layout(model: PreTrainedModel) -> None:
    """Split the joined projections of a decoder and take the scale out of its embedding, in place.

    The new weights are copies: memory on top of the model is one joined projection.

    Invariant:
        Logits are unchanged, up to the order in which float products are summed.
    """
    scale, names = conventions(model.config).embedding_scale, decoder_names(model.config)
    if scale is not None:
        fqn, _, _ = names.embedding.rpartition(".")
        scaled = model.get_submodule(fqn)
        assert isinstance(scaled, nn.Embedding)
        with torch.device("meta"):
            table = nn.Embedding(scaled.num_embeddings, scaled.embedding_dim, scaled.padding_idx)
        weight = model.get_parameter(f"{fqn}.weight")
        table.register_parameter("weight", weight)  # the same one, which the head may share
        model.set_submodule(fqn, ScaledEmbedding(table, scale).train(scaled.training))
    for joined in joined_projections(model.config):
        own = model.get_submodule(joined.fqn)
        assert isinstance(own, nn.Linear)
        parts: dict[str, nn.Module] = {}
        for name, rows in _parts(joined):
            with torch.device("meta"):
                part = nn.Linear(own.in_features, rows.stop - rows.start, own.bias is not None)
            for leaf, parameter in own.named_parameters():
                piece = nn.Parameter(parameter.detach()[rows].clone(), parameter.requires_grad)
                part.register_parameter(leaf, piece)
            parts[name] = part
        model.set_submodule(joined.fqn, JoinedLinear(parts).train(own.training))


def own_places(config: PreTrainedConfig) -> dict[str, tuple[str, slice]]:
    """Return where the modules lie in the model's own files that are elsewhere in our layout.

    Returns:
        By the FQN of the module: the FQN of the one whose rows hold its, and which they are.
    """
    places = {
        f"{joined.fqn}.{name}": (joined.fqn, rows)
        for joined in joined_projections(config)
        for name, rows in _parts(joined)
    }
    if conventions(config).embedding_scale is not None:
        table = decoder_names(config).embedding
        places[table] = (table.rpartition(".")[0], slice(0, config.vocab_size))
    return places


def save_in_own_layout(model: PreTrainedModel, directory: Path) -> None:
    """Write a float decoder as a Hugging Face directory that transformers reads.

    Args:
        model: In our layout.
        directory: Receives config.json and safetensors.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    moved: dict[str, list[Tensor]] = {}
    for fqn, (own, _) in own_places(model.config).items():
        for leaf in ("weight", "bias"):
            if (tensor := state.pop(f"{fqn}.{leaf}", None)) is not None:
                moved.setdefault(f"{own}.{leaf}", []).append(tensor)
    for key, parts in moved.items():
        state[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    model.save_pretrained(directory, state_dict=state)


def adapter_in_own_layout(adapter: Adapter, config: PreTrainedConfig) -> Adapter:
    """Return a plain LoRA adapter for the linears of the model's own layout.

    Joined weights take the sum of the ranks (`factors_side_by_side`). Adapters have one rank, so
    the others are filled up with zeros, and alpha grows with it.

    Args:
        adapter: Without a shortcut, for a decoder in our layout.
        config: Of the decoder.

    Invariant:
        The weight changes are the same, up to the order in which float products are summed.
    """
    if not joined_projections(config):
        return adapter
    factors = dict(adapter.factors)
    for joined in joined_projections(config):
        pairs = [factors.pop(f"{joined.fqn}.{name}", None) for name, _ in joined.parts]
        if not any(pairs):
            continue
        factors[joined.fqn] = factors_side_by_side(pairs, [rows for _, rows in joined.parts])
    rank = max(a.shape[0] for a, _ in factors.values())
    filled = {
        fqn: (
            nn.functional.pad(a, (0, 0, 0, rank - a.shape[0])),
            nn.functional.pad(b, (0, rank - b.shape[1])),
        )
        for fqn, (a, b) in factors.items()
    }
    return Adapter(adapter.config.with_rank(rank), filled, adapter.head)


def adapter_in_our_layout(adapter: Adapter, config: PreTrainedConfig) -> Adapter:
    """Return an adapter of which no part is for a linear that our layout splits.

    Args:
        adapter: Without a shortcut, for the model's own layout or for ours.
        config: Of the decoder.

    Invariant:
        The weight changes are the same: each part reads the joined A, and has its rows of B.
    """
    factors = dict(adapter.factors)
    for fqn, (own, rows) in own_places(config).items():
        if own in adapter.factors:
            a, b = adapter.factors[own]
            factors[fqn] = (a, b[rows])
            factors.pop(own, None)
    return Adapter(adapter.config, factors, adapter.head)


def factors_side_by_side(
    pairs: Sequence[tuple[Tensor, Tensor] | None], rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the factors of linears that read one input as those of their joined weight.

    The change of that weight is [B_q A_q; B_k A_k; ...] = diag(B_q, B_k, ...) [A_q; A_k; ...]; a
    linear that is left alone adds rows of zeros.

    Args:
        pairs: A [rank, in] and B [out, rank] of each, at least one; None for one left alone.
        rows: Outputs of each.

    Returns:
        A [sum of ranks, in] and B [sum of outputs, sum of ranks].
    """
    present = [pair for pair in pairs if pair is not None]
    blocks = [
        present[0][1].new_zeros(count, 0) if pair is None else pair[1]
        for pair, count in zip(pairs, rows, strict=True)
    ]
    return torch.cat([a for a, _ in present]), torch.block_diag(*blocks)


def _parts(joined: JoinedProjection) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, rows in joined.parts:
        yield name, slice(start, start + rows)
        start += rows
