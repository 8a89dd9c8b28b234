"""What flows between the blocks of the torch reference, and how firm that is.

Of a decoder what attention and MLP add to the residual stream, and the stream; of an encoder what
the norms behind them give, for there is no such stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deploy.graph_probes import ATTENTION, EMBEDDING, MLP
from deploy.parity import DRAWS, perturbed_embedding
from rolora.decoder import DecoderNames
from rolora.encoder import EncoderNames
from rolora.linear import QuantizedLinear

STREAM = "stream"

Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Places:
    """Where a torch model has the values that a graph is compared by."""

    embedding: str
    """The table of tokens, whose rows are perturbed."""
    first_reader: str
    """Module whose input is what the first block reads."""
    outputs: Mapping[str, str]
    """`N.attention` and `N.mlp`, to the modules whose outputs they are."""
    linears: tuple[str, ...]
    adds_up: bool
    """Whether the outputs are added to a residual stream."""


def decoder_places(names: DecoderNames) -> Places:
    """Return the places of a decoder."""
    outputs = {}
    for layer, block in enumerate(names.blocks):
        attention, mlp = (fqn.rpartition(".")[0] for fqn in (block.output, block.down))
        outputs[f"{layer}.{ATTENTION}"] = block.attention_post_norm or attention
        outputs[f"{layer}.{MLP}"] = block.mlp_post_norm or mlp
    first = names.blocks[0].attention_norm
    return Places(names.embedding, first, outputs, tuple(names.linears()), adds_up=True)


def encoder_places(names: EncoderNames) -> Places:
    """Return the places of an encoder."""
    outputs = {}
    for layer, block in enumerate(names.blocks):
        outputs[f"{layer}.{ATTENTION}"] = block.attention_norm
        outputs[f"{layer}.{MLP}"] = block.mlp_norm
    first = names.blocks[0].query
    return Places(names.embedding, first, outputs, tuple(names.linears()), adds_up=False)


@contextmanager
def capture(
    model: PreTrainedModel,
    places: Places,
    rows: np.ndarray | None = None,
    *,
    integers: bool = False,
) -> Iterator[Values]:
    """Collect what flows between the blocks in a torch run, [T, H]; complete when it ends.

    Args:
        model: The torch reference.
        places: Of its parts.
        rows: bool [B, S], the positions to collect; None is all of them, of all sequences.
        integers: Collect the integers of the linears' inputs too, by FQN.
    """
    found: Values = {}
    chosen = slice(None) if rows is None else torch.from_numpy(rows.reshape(-1))

    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, tensor.shape[-1]).float()[chosen]

    def keep(key: str, output: Any) -> None:
        found[key] = flat(output[0] if isinstance(output, tuple) else output).numpy()

    def keep_integers(fqn: str, module: Any, x: Tensor) -> None:
        if isinstance(module, QuantizedLinear) and not module.activation.is_float:
            found[fqn] = module.quantize_input(flat(x)).q.numpy()

    with ExitStack() as hooks:
        hook = model.get_submodule(places.first_reader).register_forward_pre_hook(
            lambda _module, inputs: keep(EMBEDDING, inputs[0])
        )
        hooks.callback(hook.remove)
        for key, fqn in places.outputs.items():
            hook = model.get_submodule(fqn).register_forward_hook(
                lambda _module, _inputs, output, key=key: keep(key, output)
            )
            hooks.callback(hook.remove)
        for fqn in places.linears if integers else ():
            hook = model.get_submodule(fqn).register_forward_hook(
                lambda module, inputs, _output, fqn=fqn: keep_integers(fqn, module, inputs[0])
            )
            hooks.callback(hook.remove)
        yield found
    if places.adds_up:
        found |= with_streams(found)


def with_streams(parts: Mapping[str, np.ndarray]) -> Values:
    """Return the parts in the order of the data, each block's with the residual stream after it."""
    stream = parts[EMBEDDING]
    whole = {EMBEDDING: stream}
    layer = 0
    while f"{layer}.{ATTENTION}" in parts:
        for part in (ATTENTION, MLP):
            whole[f"{layer}.{part}"] = parts[f"{layer}.{part}"]
            stream = stream + parts[f"{layer}.{part}"]
        whole[f"{layer}.{STREAM}"] = stream
        layer += 1
    return whole


def noise_floors(
    model: PreTrainedModel,
    places: Places,
    run: Callable[[], object],
    expected: Values,
    rows: np.ndarray | None = None,
) -> dict[str, float]:
    """Return the most that a perturbation of the embeddings does to each part, or to one before.

    Args:
        model: The torch reference.
        places: Of its parts.
        run: Runs it on the tokens.
        expected: What `capture` found in such a run.
        rows: As of `capture`.
    """
    generator = torch.Generator().manual_seed(0)
    floors: dict[str, float] = {}
    for _ in range(DRAWS):
        with (
            capture(model, places, rows) as found,
            perturbed_embedding(model, places.embedding, generator),
        ):
            run()
        for key, value in found.items():
            floors[key] = max(floors.get(key, 0.0), relative_size(value, expected[key]))
    for layer in range(1, len(places.outputs) // 2):
        for part in (ATTENTION, MLP, STREAM) if places.adds_up else (ATTENTION, MLP):
            before = floors[f"{layer - 1}.{part}"]
            floors[f"{layer}.{part}"] = max(floors[f"{layer}.{part}"], before)
    return floors


def relative_size(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ||found - expected|| / ||expected||, in float64."""
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected) / max(size, 1e-30))
