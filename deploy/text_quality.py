"""Quality of a model on text: perplexity, and divergence from a reference.

A text is cut into windows of equal length, evenly spaced over it; every model sees the same tokens.
For the logits of a window, with p of the reference and q of the model,

    ppl = exp(mean NLL)      kl_mean = mean KL(p || q)      top1_agreement = mean [argmax p = argmax
    q]

over all predicted positions. Logits come from a torch model, a quantized checkpoint or an exported
ONNX directory through one protocol, so that figures compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deploy.errors import ConfigError
from deploy.language_model import LanguageModel


class Task(StrEnum):
    """What can be measured on running text."""

    PPL = "ppl"
    KL = "kl"


@dataclass(frozen=True)
class Windows:
    """Token windows of one text."""

    ids: tuple[np.ndarray, ...]
    """int64 [T] each."""


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, tokens: int) -> Windows:
    """Cut a text into windows evenly spaced from its first to its last token.

    A tokenizer that starts texts with a BOS token gets it in place of the first token of each
    window.

    Args:
        tokenizer: Of the model under test.
        text: The whole text.
        count: Number of windows.
        tokens: Tokens a window.

    Raises:
        ConfigError: The counts are not positive, or the text is shorter than one window.
    """
    if count < 1 or tokens < 2:
        raise ConfigError(f"expected at least 1 window of 2 tokens, got {count} of {tokens}")
    ids = np.asarray(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64
    )
    if len(ids) < tokens:
        raise ConfigError(
            f"the text has {len(ids)} tokens, a window needs {tokens}; use a longer text or "
            f"shorter windows"
        )
    starts = np.linspace(0, len(ids) - tokens, count).astype(int)
    windows = [ids[start : start + tokens].copy() for start in starts]
    empty = tokenizer("")["input_ids"]
    if tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id]:
        for window in windows:
            window[0] = tokenizer.bos_token_id
    return Windows(tuple(windows))


@dataclass
class _Sums:
    """Running sums over positions."""

    positions: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreements: int = 0


def evaluate_model(
    model: LanguageModel,
    reference: LanguageModel | None,
    windows: Windows,
    tasks: frozenset[Task],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Measure a model on windows.

    Args:
        model: Under test.
        reference: What it is compared with; needed by KL, and gives `ppl_ratio`.
        windows: From `cut_windows`.
        tasks: What to measure.
        progress: Called with the number of finished windows.

    Returns:
        `ppl`, with a reference also `ppl_ratio`, `kl_mean` and `top1_agreement`, as far as asked
        for.

    Raises:
        ConfigError: KL without a reference, or the two vocabularies differ.
    """
    if Task.KL in tasks and reference is None:
        raise ConfigError("task kl compares with a reference: give --reference")
    sums = _Sums()
    for done, ids in enumerate(windows.ids, start=1):
        _add_window(sums, ids, model, reference, want_kl=Task.KL in tasks)
        progress(done)
    results: dict[str, float] = {}
    if Task.PPL in tasks:
        results["ppl"] = _exp(sums.nll / sums.positions)
        if reference is not None:
            results["reference_ppl"] = _exp(sums.reference_nll / sums.positions)
            results["ppl_ratio"] = _exp((sums.nll - sums.reference_nll) / sums.positions)
    if Task.KL in tasks:
        results["kl_mean"] = sums.kl / sums.positions
        results["top1_agreement"] = sums.agreements / sums.positions
    return results


def _add_window(
    sums: _Sums,
    ids: np.ndarray,
    model: LanguageModel,
    reference: LanguageModel | None,
    *,
    want_kl: bool,
) -> None:
    targets = torch.from_numpy(ids[1:])
    log_q = _log_probabilities(model, ids)
    sums.positions += len(targets)
    sums.nll -= float(log_q.gather(1, targets[:, None]).double().sum())
    if reference is None:
        return
    log_p = _log_probabilities(reference, ids)
    if log_p.shape != log_q.shape:
        raise ConfigError(
            f"reference {reference.name} has a vocabulary of {log_p.shape[1]}, model {model.name} "
            f"of {log_q.shape[1]}: "
            "they cannot be compared token by token"
        )
    sums.reference_nll -= float(log_p.gather(1, targets[:, None]).double().sum())
    if want_kl:
        sums.agreements += int((log_p.argmax(dim=1) == log_q.argmax(dim=1)).sum())
        sums.kl += float(torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))


def _log_probabilities(model: LanguageModel, ids: np.ndarray) -> torch.Tensor:
    """Return log-probabilities at all but the last position, float32 [T - 1, V]."""
    logits = model.logits(ids)
    return torch.log_softmax(torch.from_numpy(logits[:-1]), dim=-1)


def _exp(value: float) -> float:
    """Return e^value, infinite where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
