"""Does an exported encoder compute what the torch model with the same integers computes?

As for decoders (`parity`): every quantized weight in the file must be the checkpoint's, and outputs
must stay within twice what a perturbation of the embeddings by 1e-5 does to the torch model itself,
whose roundings it moves across their boundaries now and then. Compared are the last hidden states
of texts of different lengths, padded, on all positions that are text; both token types occur.

The logits of a classifier are few numbers, for which such a bound would be left to chance. So the
graph's head is compared by itself: torch's own head reads the hidden states that the graph gave,
and both compute the same float products, to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deploy.calibration_text import sample_text
from deploy.encoder_checkpoint import EncoderCheckpoint
from deploy.encoder_session import LOGITS_NAME, OnnxEncoder
from deploy.errors import ParityError
from deploy.exact_weights import check_exact_weights
from deploy.kernels import GraphForm
from deploy.language_model import load_tokenizer
from deploy.parity import (
    DRAWS,
    EXPORT_FAULT,
    FLOOR_FACTOR,
    LEAST_BOUND,
    perturbed_embedding,
    relative_error,
)
from deploy.session import HIDDEN_NAME

TEXTS = 8
WORDS_STEP = 8
"""Words by which each text is longer than the one before."""
MOST_TOKENS = 128

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class EncoderParityReport:
    """Measured differences between ONNX Runtime and torch."""

    exact_weights: int
    """Quantized linears whose integers were found equal."""
    hidden_error: float
    """Relative error of the last hidden states of all text positions."""
    noise_floor: float
    """The most that a perturbation (of 1e-5) did to the torch reference itself."""
    bound: float
    head_error: float | None
    """Relative error of the logits, given the same hidden states; None without a head."""
    head_bound: float | None

    def errors(self) -> list[tuple[str, str, float, float]]:
        """Return where and what each error is, the error, and its bound."""
        found = [("graph", "last hidden states", self.hidden_error, self.bound)]
        if self.head_error is not None and self.head_bound is not None:
            found.append(("head", "logits", self.head_error, self.head_bound))
        return found

    def faults(self) -> list[str]:
        """Return a sentence for each error that exceeds its bound; NaN does."""
        named = {
            "graph": "the exported graph departs from the torch reference",
            "head": "the exported classification head departs from torch's",
        }
        return [
            f"{named[where]}: relative error of the {what} {error:.3g}, expected at most {bound:g}"
            for where, what, error, bound in self.errors()
            if not error <= bound
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def check_encoder_parity(
    checkpoint: EncoderCheckpoint, directory: Path, batch: Batch, form: GraphForm
) -> EncoderParityReport:
    """Compare an exported directory with its checkpoint.

    Args:
        checkpoint: What was exported.
        directory: The export.
        batch: From `parity_batch`.
        form: The graph of the export.

    Raises:
        ParityError: An integer differs, or an error exceeds its bound.
    """
    exact = check_exact_weights(checkpoint, directory, (form,))
    report = measure_encoder_parity(checkpoint, directory, batch, exact)
    if faults := report.faults():
        raise ParityError(f"{'; '.join(faults)}; {EXPORT_FAULT}")
    return report


def measure_encoder_parity(
    checkpoint: EncoderCheckpoint, directory: Path, batch: Batch, exact_weights: int
) -> EncoderParityReport:
    """Measure how far an exported directory is from its checkpoint, whatever comes out.

    Args:
        checkpoint: What was exported.
        directory: The export.
        batch: From `parity_batch`.
        exact_weights: From `check_exact_weights`.
    """
    model, names = checkpoint.load_model(), checkpoint.names
    is_text = batch["attention_mask"].astype(bool)
    expected = _hidden_states(model, names.stack, batch)[is_text]
    generator = torch.Generator().manual_seed(0)
    floor = 0.0
    for _ in range(DRAWS):
        with perturbed_embedding(model, names.embedding, generator):
            moved = _hidden_states(model, names.stack, batch)[is_text]
        floor = max(floor, relative_error(moved, expected))
    found = OnnxEncoder(directory).run(batch)
    head_error = None
    if LOGITS_NAME in found:
        logits = _head_logits(model, names.stack, batch, found[HIDDEN_NAME])
        difference = np.linalg.norm(found[LOGITS_NAME].astype(np.float64) - logits)
        head_error = float(difference / np.linalg.norm(logits))
    return EncoderParityReport(
        exact_weights=exact_weights,
        hidden_error=relative_error(found[HIDDEN_NAME][is_text], expected),
        noise_floor=floor,
        bound=max(FLOOR_FACTOR * floor, LEAST_BOUND),
        head_error=head_error,
        head_bound=None if head_error is None else LEAST_BOUND,
    )


def parity_batch(checkpoint: EncoderCheckpoint) -> Batch:
    """Return texts of our evaluation sample as inputs of an encoder, int64 [TEXTS, S] each.

    Padding is on the right; the second half of every text is of the second type, if there is one.
    """
    config, tokenizer = checkpoint.config, load_tokenizer(checkpoint.directory)
    most = min(MOST_TOKENS, checkpoint.token_limit)
    lines = [line.split() for line in sample_text("evaluation.txt").splitlines() if line.strip()]
    rows = [
        tokenizer(
            " ".join(line[: WORDS_STEP * (number + 1)]),
            truncation=True,
            max_length=most,
            verbose=False,
        )["input_ids"]
        for number, line in enumerate(lines[:TEXTS])
    ]
    shape = (len(rows), max(map(len, rows)))
    ids = np.full(shape, config.pad_token_id or 0, np.int64)
    mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = np.asarray(row) % config.vocab_size
        mask[number, : len(row)] = 1
        types[number, len(row) // 2 : len(row)] = min(1, config.type_vocab_size - 1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _hidden_states(model: PreTrainedModel, stack: str, batch: Batch) -> np.ndarray:
    """Return the last hidden states, float32 [B, S, D]."""
    found: list[Tensor] = []

    def keep(output: Any) -> None:
        found.append(output.last_hidden_state)

    _run(model, stack, batch, keep)
    states: np.ndarray = found[0].numpy()
    return states


def _head_logits(
    model: PreTrainedModel, stack: str, batch: Batch, hidden: np.ndarray
) -> np.ndarray:
    """Return the logits that a classifier's own head gives for hidden states, float64 [B, C]."""

    def replace(output: Any) -> None:
        output.last_hidden_state = torch.from_numpy(hidden)

    logits: np.ndarray = _run(model, stack, batch, replace).logits.double().numpy()
    return logits


def _run(model: PreTrainedModel, stack: str, batch: Batch, touch: Callable[[Any], None]) -> Any:
    """Run a model; `touch` sees, and may change, what the stack of blocks gives."""
    with _hooked(model.get_submodule(stack), touch), torch.inference_mode():
        return model(**{name: torch.from_numpy(array) for name, array in batch.items()})


@contextmanager
def _hooked(module: nn.Module, touch: Callable[[Any], None]) -> Iterator[None]:
    def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        touch(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
