"""The way out: a merged adapter as a plain LoRA adapter that PEFT loads without this package.

A merge gives every layer factors A*_n, B*_n with delta W_n = s B*_n A*_n (`merged_factors`). PEFT
wants one rank R and scales by alpha / R (alpha / sqrt(R) with rsLoRA), so the windows of structure
`block`, which grow along the chain up to (m + 1) r, are filled up with zero rows and columns to the
longest, and alpha_export = s R (s sqrt(R)) keeps the factor s in front. Approximate merges have
rank r and keep the adapter's own alpha.

`recompress` brings an adapter of higher rank to a lower one by the best approximation of each
delta W_n in the Frobenius norm (Eckart-Young), and says what that costs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from reslora.adapter import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    Adapter,
    plain_json,
    tensor_key,
)
from reslora.merged_factors import MergeMethod, merged_factors
from reslora.shortcut_statistics import ShortcutStatistics


@dataclass(frozen=True)
class Recompressed:
    """An adapter of lower rank and what it lost."""

    adapter: Adapter
    errors: dict[str, float]
    """FQN to ||delta - approximation||_F / ||delta||_F."""


def to_peft_adapter(
    adapter: Adapter,
    method: MergeMethod,
    statistics: ShortcutStatistics | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Return a plain LoRA adapter with the weight changes that `merge_adapter` would make.

    Args:
        adapter: A loaded adapter.
        method: See `merged_factors`.
        statistics: For the methods that need them.
        dtype: Of the factors.

    Returns:
        An adapter without a shortcut; write it with `write_peft_adapter`.

    Invariant: scaling * B A of each layer is its `delta_weights`, each factor rounded once to
        `dtype`.

    Raises:
        ValueError: As `merged_factors`, or a factor is not finite in `dtype`.
    """
    merged = dict(merged_factors(adapter, method, statistics))
    rank = max(a.shape[0] for a, _ in merged.values())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for fqn, (a, b) in merged.items():
        surplus = rank - a.shape[0]
        a_full = torch.nn.functional.pad(a, (0, 0, 0, surplus)).to(dtype)  # [R, in]
        b_full = torch.nn.functional.pad(b, (0, surplus)).to(dtype)  # [out, R]
        if not bool(torch.isfinite(a_full).all() and torch.isfinite(b_full).all()):
            raise ValueError(f"{fqn}: merged factors are not finite in {dtype}; export in float32")
        factors[fqn] = (a_full, b_full)
    return Adapter(adapter.config.with_rank(rank), factors, adapter.head)


def recompress(adapter: Adapter, rank: int) -> Recompressed:
    """Return the best adapter of another rank, by singular value decomposition of each delta.

    Args:
        adapter: A plain LoRA adapter, as `to_peft_adapter` returns it.
        rank: The rank to reach.

    Raises:
        ValueError: The adapter has a shortcut, or the rank is below 1 or above the adapter's.
    """
    if adapter.config.structure is not None:
        raise ValueError("recompress needs a plain LoRA adapter: call to_peft_adapter first")
    if not 1 <= rank <= adapter.config.rank:
        raise ValueError(f"rank must be from 1 to {adapter.config.rank}, got {rank}")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    for fqn, (a, b) in adapter.factors.items():
        # B A = Q_b (R_b R_a^T) Q_a^T: the singular values are those of a small matrix
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, sizes, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        kept = min(rank, sizes.shape[0])
        root = sizes[:kept].sqrt()
        surplus = rank - kept
        new_b = torch.nn.functional.pad(q_b @ u[:, :kept] * root, (0, surplus))
        new_a = torch.nn.functional.pad(root[:, None] * (v_t[:kept] @ q_a.T), (0, 0, 0, surplus))
        factors[fqn] = (new_a.to(a.dtype), new_b.to(b.dtype))
        whole = float(sizes.norm())
        errors[fqn] = float(sizes[kept:].norm()) / whole if whole > 0 else 0.0
    plain = Adapter(adapter.config.with_rank(rank), factors, adapter.head)
    return Recompressed(plain, errors)


def write_peft_adapter(
    adapter: Adapter,
    directory: Path,
    *,
    base_model: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write a plain LoRA adapter as the files of `peft.PeftModel.from_pretrained`.

    Args:
        adapter: An adapter without a shortcut.
        directory: Created if missing.
        base_model: Noted as the model the adapter belongs to.
        task_type: PEFT's; it decides which wrapper PEFT puts around the model. None is the general
            one. An adapter with a classification head is for SEQ_CLS in any case.

    Raises:
        ValueError: The adapter has a shortcut, which a plain adapter cannot express.
    """
    if adapter.config.structure is not None:
        raise ValueError("PEFT knows no shortcut: call to_peft_adapter first")
    config = LoraConfig(
        task_type=task_type if adapter.head_name is None else "SEQ_CLS",
        modules_to_save=None if adapter.head_name is None else [adapter.head_name],
        base_model_name_or_path=base_model,
        r=adapter.config.rank,
        lora_alpha=_whole(adapter.config.alpha),
        lora_dropout=adapter.config.dropout,
        target_modules=list(adapter.factors),
        bias="none",
        use_rslora=adapter.config.rslora,
        inference_mode=True,
    )
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    for fqn, (a, b) in adapter.factors.items():
        tensors[tensor_key(fqn, "lora_A")] = a.contiguous()
        tensors[tensor_key(fqn, "lora_B")] = b.contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    text = json.dumps(plain_json(config.to_dict()), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _whole(alpha: float) -> Any:
    # peft declares an int but scales by any number; whole numbers stay whole in the file
    return int(alpha) if alpha == int(alpha) else alpha
