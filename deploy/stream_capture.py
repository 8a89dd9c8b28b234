"""What each block of the torch reference adds to the residual stream, and how firm that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deploy.checkpoint import Checkpoint
from deploy.parity import DRAWS, perturbed_logits
from deploy.probed_decoder import ATTENTION, EMBEDDING, MLP
from rolora.linear import QuantizedLinear

STREAM = "stream"

Values = dict[str, np.ndarray]


@contextmanager
def capture(
    model: PreTrainedModel, checkpoint: Checkpoint, *, integers: bool = False
) -> Iterator[Values]:
    """Collect what a torch run adds to the residual stream, [T, H]; complete when it ends.

    Args:
        model: The torch reference.
        checkpoint: Of which it was made.
        integers: Collect the integers of the linears' inputs too, by FQN.
    """
    found: Values = {}

    def keep(key: str, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        found[key] = tensor.detach()[0].float().numpy()

    def keep_integers(fqn: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, QuantizedLinear) and not module.activation.is_float:
            found[fqn] = module.quantize_input(x.reshape(-1, x.shape[-1]).float()).q.numpy()

    places = {}
    for layer, block in enumerate(checkpoint.names.blocks):
        attention, mlp = (fqn.rpartition(".")[0] for fqn in (block.output, block.down))
        places[f"{layer}.{ATTENTION}"] = block.attention_post_norm or attention
        places[f"{layer}.{MLP}"] = block.mlp_post_norm or mlp
    first_norm = model.get_submodule(checkpoint.names.blocks[0].attention_norm)
    with ExitStack() as hooks:
        hook = first_norm.register_forward_pre_hook(
            lambda _module, inputs: keep(EMBEDDING, inputs[0])
        )
        hooks.callback(hook.remove)
        for key, fqn in places.items():
            hook = model.get_submodule(fqn).register_forward_hook(
                lambda _module, _inputs, output, key=key: keep(key, output)
            )
            hooks.callback(hook.remove)
        for fqn in checkpoint.names.linears() if integers else ():
            hook = model.get_submodule(fqn).register_forward_hook(
                lambda module, inputs, _output, fqn=fqn: keep_integers(fqn, module, inputs[0])
            )
            hooks.callback(hook.remove)
        yield found
    found |= with_streams(found)


def with_streams(parts: Mapping[str, np.ndarray]) -> Values:
    """Add the residual stream after each block."""
    whole, stream = dict(parts), parts[EMBEDDING]
    layer = 0
    while f"{layer}.{ATTENTION}" in parts:
        stream = stream + parts[f"{layer}.{ATTENTION}"] + parts[f"{layer}.{MLP}"]
        whole[f"{layer}.{STREAM}"] = stream
        layer += 1
    return whole


def noise_floors(
    model: PreTrainedModel, checkpoint: Checkpoint, ids: np.ndarray, expected: Values
) -> dict[str, float]:
    """Return the most that a perturbation of the embeddings does to each part, or to one before."""
    generator = torch.Generator().manual_seed(0)
    floors: dict[str, float] = {}
    for _ in range(DRAWS):
        with capture(model, checkpoint) as found:
            perturbed_logits(model, checkpoint.names.embedding, ids, generator)
        for key, value in found.items():
            floors[key] = max(floors.get(key, 0.0), relative_size(value, expected[key]))
    for layer in range(1, len(checkpoint.names.blocks)):
        for part in (ATTENTION, MLP, STREAM):
            before = floors[f"{layer - 1}.{part}"]
            floors[f"{layer}.{part}"] = max(floors[f"{layer}.{part}"], before)
    return floors


def relative_size(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ||found - expected|| / ||expected||, in float64."""
    size = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected) / max(size, 1e-30))
