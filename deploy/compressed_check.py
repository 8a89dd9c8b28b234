"""Does a compressed-tensors export make its readers compute what the checkpoint does?

The directory is loaded as they load it (`deploy.compressed_reader`), and the same tokens run
through it and through the torch model with the same integers. Readers choose run-time scales
themselves (`deploy.compressed_scheme`), so the torch model takes theirs for that comparison; how
far that is from our own scales is measured beside it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deploy.checkpoint import Checkpoint
from deploy.compressed_reader import load_compressed
from deploy.compressed_scheme import reader_divisor
from deploy.errors import ParityError
from deploy.parity import DRAWS, FLOOR_FACTOR, LEAST_BOUND, relative_error
from rolora.affine import SMALLEST_SCALE, activation_range, dequantize, quantize
from rolora.linear import QuantizedLinear

ROUNDING = 1e-6
"""Relative noise on the inputs of the linears that shows what rounding in float may do.

Half the range over the greatest value puts that very value on a rounding boundary (-7.5 becomes -8
or -7), so that this is more than one would think, and a perturbed embedding would not show it.
"""


@dataclass(frozen=True)
class ReaderCheck:
    """What transformers and compressed-tensors make of the directory."""

    error: float
    """Relative error of the logits to the torch model with the readers' run-time scales."""
    bound: float
    """Twice what noise of the size of float32 rounding does to that model."""
    scale_choice_error: float
    """The same error to the checkpoint with its own run-time scales; no fault, but to be known."""
    top1_agreement: float
    """Share of positions where the reader and the checkpoint predict the same token."""


def check_reader(checkpoint: Checkpoint, directory: Path, ids: np.ndarray) -> ReaderCheck:
    """Compare what readers compute with the checkpoint.

    Args:
        checkpoint: What was exported.
        directory: The export.
        ids: int64 [T] tokens to run.

    Raises:
        ParityError: The logits differ by more than rounding noise.
        ArtifactError: transformers misses a tensor or knows no place for one.
    """
    found = _logits(load_compressed(directory), ids)
    model = checkpoint.load_model()
    own = _logits(model, ids)
    expected = _reader_logits(model, ids, None)
    generator = torch.Generator().manual_seed(0)
    draws = [_reader_logits(model, ids, generator) for _ in range(DRAWS)]
    floor = max(relative_error(logits, expected) for logits in draws)
    check = ReaderCheck(
        error=relative_error(found, expected),
        bound=max(FLOOR_FACTOR * floor, LEAST_BOUND),
        scale_choice_error=relative_error(found, own),
        top1_agreement=float((found.argmax(axis=1) == own.argmax(axis=1)).mean()),
    )
    if not check.error <= check.bound:  # written so that NaN is refused
        raise ParityError(
            f"transformers computes something else than the checkpoint: relative error of the "
            f"logits {check.error:.3g}, expected at most {check.bound:g}; nothing was written. "
            f"This is a fault of the export: please report it with the model's config.json"
        )
    return check


def _reader_logits(
    model: PreTrainedModel, ids: np.ndarray, noise: torch.Generator | None
) -> np.ndarray:
    """Return the logits of our integers with the readers' run-time scales, float32 [T, V].

    Args:
        model: From `Checkpoint.load_model`.
        ids: int64 [T].
        noise: Draws relative noise of the size of float32 rounding for the input of each linear.
    """

    def product(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        assert isinstance(module, QuantizedLinear)
        x = inputs[0]  # rotated already where a rotation is online
        if noise is not None:
            x = x * (1.0 + ROUNDING * torch.randn(x.shape, generator=noise))
        return nn.functional.linear(
            _round_as_readers(module, x), module.dequantized_weight(), module.bias
        )

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                hooks.callback(module.register_forward_hook(product).remove)
        return _logits(model, ids)


def _round_as_readers(module: QuantizedLinear, x: Tensor) -> Tensor:
    """Return the input of a linear, rounded with the scales that compressed-tensors takes."""
    spec = module.activation
    quant_min, quant_max = activation_range(spec.bits)
    grouped = x.unflatten(-1, (-1, spec.group_size or x.shape[-1]))
    scale = module.input_scale
    if scale is None:
        scale = grouped.abs().amax(dim=-1, keepdim=True) / reader_divisor(spec.bits)
        scale = scale.clamp(min=SMALLEST_SCALE)  # a token of zeros stays zeros
    return dequantize(quantize(grouped, scale, quant_min, quant_max), scale).reshape(x.shape)


def _logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return logits
