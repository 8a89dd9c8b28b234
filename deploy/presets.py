"""Settings of the ResLoRA paper, as defaults for options of `rolora finetune`.

From arXiv:2402.18039 and its release. Structure and depth are left alone, since the paper trains
every structure with the same settings, and so is the method, so that `--method lora` with a preset
is the paper's baseline. 128 sequences a step are made of small batches on one process; divide
`--gradient-accumulation` by the number of processes where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Preset(StrEnum):
    """Named sets of training settings."""

    RESLORA_NLG = "reslora-nlg"
    """GSM8K, SVAMP, MathQA, MetaMathQA and HellaSwag with LLaMA-2-7B."""
    RESLORA_NLU = "reslora-nlu"
    """GLUE with RoBERTa-large."""


_COMMON: dict[str, object] = {
    "targets": "q,v",
    "rank": 4,
    "dropout": 0.1,
    "warmup_ratio": 0.06,
    "scheduler": "linear",  # none is named: the default of the library it uses
    "weight_decay": 0.1,
    "seed": 0,
}
PRESETS: Mapping[str, Mapping[str, object]] = {
    # epochs as for more than 10000 rows; the paper takes 20 for less, 40 for less than 2000
    Preset.RESLORA_NLG: _COMMON
    | {
        "alpha": 8.0,
        "learning_rate": 1e-4,
        "batch_size": 2,
        "gradient_accumulation": 64,
        "epochs": 8.0,
        "max_tokens": 1000,
    },
    # the release says warm-up 0.6, of which the first epochs would learn next to nothing: taken for
    # a slip of 0.06
    Preset.RESLORA_NLU: _COMMON
    | {
        "alpha": 16.0,
        "learning_rate": 3e-4,
        "batch_size": 8,
        "gradient_accumulation": 16,
        "epochs": 20.0,
        "max_tokens": 512,
    },
}
"""Preset to option name (as in Python) and value."""
