"""Does the exported graph compute what the torch model with the same integers computes?

Two checks. Exactness: every quantized weight in the ONNX file is, integer by integer and scale by
scale, the checkpoint's. Parity: the same tokens through both, first as one prompt, then token by
token over the cache.

Both sides multiply exactly; they differ in float32 rounding between the products. Such a difference
(about 1e-6) moves a value across a rounding boundary now and then, and that one integer step
spreads through the layers above it until most of the roundings there fall differently. How far that
carries depends on the model and on how coarse a step is, so it is measured: the torch reference is
run again with its embeddings perturbed by 1e-5, a few times, and the most that this does to its
logits is the noise floor. The export must stay within twice the floor, in

    relative error = ||ort - torch||_2 / ||torch||_2        (logits centred per position, since
    softmax ignores a shift).

MatMulNBits quantizes activations per block of columns, more finely than the scheme. A graph of that
kernel therefore has another reference: the torch model with the same integer weights and float
activations. It must be at least as near to it as the scheme itself, by the same measure (or within
the bound above, where that is larger); the tests hold it to fail with a wrong scale or zero point.

A graph of float16 rounds far more coarsely than float32, so its floor is that of a perturbation by
half a unit in the last place of float16. Such a bound would miss small faults; so the same graph is
first written with float32 in place of float16, and held to the bound above.

A wrong epsilon, scale or rotation lies far outside for float checkpoints, whose floor is near 1e-5;
the same graph code builds them, and the tests hold every family to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deploy.attention_forms import check_attention_forms
from deploy.calibration_text import sample_text
from deploy.checkpoint import Checkpoint
from deploy.conventions import context_length
from deploy.errors import ParityError
from deploy.exact_weights import check_exact_weights
from deploy.kept_adapters import KeptAdapter, active_adapter
from deploy.kernels import ONE_INTEGER_GRAPH, GraphForm, Kernel
from deploy.language_model import load_tokenizer
from deploy.session import OnnxDecoder
from rolora.linear import QuantizedLinear

DECODE_STEPS = 64
PROMPT_TOKENS = 64

PERTURBATION = 1e-5
"""Relative size of the noise on the embeddings that shows the noise floor."""
HALF_PERTURBATION = 2.0**-11
"""The same of a graph whose activations are rounded to float16."""
DRAWS = 3
"""Perturbations tried; the floor is the worst of them."""
MORE_DRAWS = 9
"""As many again before an export is refused: one step of an integer more or less is chance."""
CHANCE = 1.25
"""What two roundings of the same inputs to 8 bits may differ by in their error."""

FLOOR_FACTOR = 2.0
LEAST_BOUND = 1e-4
"""Bound of a model whose floor is below float32 rounding over many layers."""
EXPORT_FAULT = (
    "nothing was written. This is a fault of the export: please report it with the model's "
    "config.json"
)
"""How the message of an export that failed its check ends."""


@dataclass(frozen=True)
class ParityReport:
    """Measured differences between ONNX Runtime and torch."""

    exact_weights: int
    """Quantized linears whose integers were found equal."""
    prefill_error: float
    decode_error: float
    noise_floor: float
    """The most that a perturbation (of 1e-5) did to the torch reference itself."""
    bound: float
    float_activation_error: float | None
    """Of the steps of a MatMulNBits graph, to the model with float activations; else None."""
    float_activation_bound: float | None
    """The most that may be: what the scheme's own activations do to that model's logits."""
    top1_agreement: float
    """Share of all positions where both predict the same token."""
    adapter_effect: float | None = None
    """What an active adapter does to the reference's logits; None without one."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def check_parity(
    checkpoint: Checkpoint,
    directory: Path,
    ids: np.ndarray,
    forms: Sequence[GraphForm] = (ONE_INTEGER_GRAPH,),
    *,
    provider: str | None = None,
    perturbation: float = PERTURBATION,
    adapter: KeptAdapter | None = None,
) -> ParityReport:
    """Compare an exported directory with its checkpoint.

    Args:
        checkpoint: What was exported.
        directory: The export.
        ids: int64 [PROMPT_TOKENS + DECODE_STEPS] tokens to run, or fewer for models with a short
            context.
        forms: The graphs of the export.
        provider: Execution provider; None is the one that the export addresses.
        perturbation: Relative size of the noise that shows the noise floor.
        adapter: Active on both sides; in torch as float branches beside the quantized linears.

    Raises:
        ParityError: An integer differs, or an error exceeds its bound.
    """
    exact = check_exact_weights(checkpoint, directory, forms)
    check_attention_forms(directory, forms)
    prompt = prompt_length(len(ids))
    name = None if adapter is None else adapter.name
    found = _graph_logits(directory, ids, prompt, provider, name)
    model = checkpoint.load_model(on_call=True)
    by_nbits = [form.kernel is Kernel.NBITS for form in forms if not form.head_only]
    without = None if adapter is None else torch_logits(model, ids)
    with nullcontext() if adapter is None else active_adapter(model, adapter):
        expected = torch_logits(model, ids)
        float_logits = float_activation_logits(model, ids) if any(by_nbits) else None
        prefill_error = relative_error(found[:prompt], expected[:prompt])
        decode_error = 0.0
        if prompt < len(ids):
            decode_error = relative_error(found[prompt:], expected[prompt:])
        errors = [prefill_error] * (not all(by_nbits)) + [decode_error] * (not any(by_nbits))
        embedding, generator = checkpoint.names.embedding, torch.Generator().manual_seed(0)
        floor = noise_floor(model, embedding, ids, expected, generator, DRAWS, perturbation)
        if not _are_within(errors, _bound(floor)):
            more = noise_floor(model, embedding, ids, expected, generator, MORE_DRAWS, perturbation)
            floor = max(floor, more)
    bound = _bound(floor)
    float_error = float_bound = None
    if float_logits is not None:
        part = slice(0 if all(by_nbits) else prompt, len(ids))
        if len(found[part]):
            float_error = relative_error(found[part], float_logits[part])
            own_error = relative_error(expected[part], float_logits[part])
            float_bound = max(CHANCE * own_error, bound)
    report = ParityReport(
        exact_weights=exact,
        prefill_error=prefill_error,
        decode_error=decode_error,
        noise_floor=floor,
        bound=bound,
        float_activation_error=float_error,
        float_activation_bound=float_bound,
        top1_agreement=float((found.argmax(axis=1) == expected.argmax(axis=1)).mean()),
        adapter_effect=None if without is None else relative_error(expected, without),
    )
    _hold_to_bounds(report, errors)
    return report


def _graph_logits(
    directory: Path, ids: np.ndarray, prompt: int, provider: str | None, adapter: str | None
) -> np.ndarray:
    """Return the logits of a prompt and of the tokens behind it, one by one, float32 [T, V]."""
    with OnnxDecoder(directory, provider=provider, adapter=adapter) as decoder:
        decoder.start(capacity=len(ids))
        parts = [decoder.append(ids[None, :prompt])[0]]
        parts += [decoder.append(ids[None, i : i + 1])[0] for i in range(prompt, len(ids))]
    return np.concatenate(parts)


def prompt_length(tokens: int) -> int:
    """Return how many of the tokens go in as a prompt; the rest follow one by one.

    At least two, since a graph for single tokens takes one.
    """
    return max(min(2, tokens), tokens // 2, tokens - DECODE_STEPS)


def _bound(floor: float) -> float:
    return max(FLOOR_FACTOR * floor, LEAST_BOUND)


def _are_within(errors: Sequence[float], bound: float) -> bool:
    """Compare one by one: max() may pass over NaN."""
    return all(error <= bound for error in errors)


def _hold_to_bounds(report: ParityReport, errors: Sequence[float]) -> None:
    """Refuse a report whose errors exceed their bounds, and NaN.

    Args:
        report: Of one export.
        errors: Those of integer products; MatMulNBits has a bound of its own.
    """
    if not _are_within(errors, report.bound):
        raise ParityError(
            f"the exported graph departs from the torch reference: relative error of the logits "
            f"{max(errors):.3g} "
            f"(prefill {report.prefill_error:.3g}, decode {report.decode_error:.3g}), expected at "
            f"most {report.bound:g}; {EXPORT_FAULT}"
        )
    error, bound = report.float_activation_error, report.float_activation_bound
    if error is not None and bound is not None and not error <= bound:
        raise ParityError(
            f"the exported graph departs from the torch reference: MatMulNBits is farther from the "
            f"model with float activations than the scheme is, relative error of the logits "
            f"{error:.3g}, expected at most {bound:.3g}; {EXPORT_FAULT}"
        )


def float_activation_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Return the logits of a quantized model whose linears read unquantized inputs.

    Args:
        model: The torch reference.
        ids: int64 [T].

    Returns:
        float32 [T, V].
    """
    with float_activations(model):
        return torch_logits(model, ids)


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Let the quantized linears of a model read unquantized inputs inside the block."""

    def product(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        assert isinstance(module, QuantizedLinear)
        return nn.functional.linear(inputs[0], module.dequantized_weight(), module.bias)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                # In front of an adapter's hook, which adds to this output.
                handle = module.register_forward_hook(product, prepend=True)
                hooks.callback(handle.remove)
        yield


def parity_tokens(checkpoint: Checkpoint) -> np.ndarray:
    """Return the tokens that parity is measured on: the start of our evaluation sample, int64."""
    tokenizer = load_tokenizer(checkpoint.directory)
    ids = tokenizer(sample_text("evaluation.txt"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    count = min(PROMPT_TOKENS + DECODE_STEPS, context_length(checkpoint.config))
    vocabulary: int = checkpoint.config.vocab_size
    return np.asarray(ids[:count], dtype=np.int64) % vocabulary


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return ||found - expected|| / ||expected|| of centred logits [T, V], in float64."""
    a = found.astype(np.float64) - found.mean(axis=1, keepdims=True, dtype=np.float64)
    b = expected.astype(np.float64) - expected.mean(axis=1, keepdims=True, dtype=np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def torch_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Return the logits of a torch model, float32 [T, V], for int64 [T]."""
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return logits


def noise_floor(
    model: PreTrainedModel,
    embedding: str,
    ids: np.ndarray,
    expected: np.ndarray,
    generator: torch.Generator,
    draws: int = DRAWS,
    perturbation: float = PERTURBATION,
) -> float:
    """Return the most that a perturbation of the embeddings does to a model's own logits.

    Args:
        model: The torch reference.
        embedding: FQN of its embedding.
        ids: int64 [T].
        expected: Its logits without perturbation, float32 [T, V].
        generator: Of the noise.
        draws: Perturbations tried.
        perturbation: Relative size of the noise.
    """
    moved = (perturbed_logits(model, embedding, ids, generator, perturbation) for _ in range(draws))
    return max(relative_error(logits, expected) for logits in moved)


def perturbed_logits(
    model: PreTrainedModel,
    embedding: str,
    ids: np.ndarray,
    generator: torch.Generator,
    perturbation: float = PERTURBATION,
) -> np.ndarray:
    """Return the logits with relative noise on the embeddings."""
    with perturbed_embedding(model, embedding, generator, perturbation):
        return torch_logits(model, ids)


@contextmanager
def perturbed_embedding(
    model: nn.Module,
    embedding: str,
    generator: torch.Generator,
    perturbation: float = PERTURBATION,
) -> Iterator[None]:
    """Put relative noise on the embeddings of all forward passes inside the block."""

    def perturb(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * (1.0 + perturbation * torch.randn(output.shape, generator=generator))

    handle = model.get_submodule(embedding).register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()
