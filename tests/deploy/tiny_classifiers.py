"""Tiny encoders as a user has them, rows of a task, and a trained classification adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel

from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.finetune_tasks import TrainingTask
from reslora.config import AdapterConfig, Structure
from reslora.settings import TrainSettings
from tests.reslora.tiny_encoder import build_encoder, build_encoder_tokenizer

ROWS = [
    {"sentence": f"{word} {'so ' * (index % 4)}{index}", "label": label}
    for index in range(8)
    for label, word in enumerate(("bad", "good"))
]


def save_encoder(
    directory: Path, model_type: str = "bert", *, with_head: bool = False, **options: Any
) -> Path:
    """Save a tiny encoder with its tokenizer, bare or with the head of a classifier."""
    model: PreTrainedModel = build_encoder(model_type, **{"labels": 2, "layers": 2} | options)
    if not with_head:
        bare: PreTrainedModel = AutoModel.from_config(model.config)
        bare.load_state_dict(
            model.get_submodule(model.base_model_prefix).state_dict(), strict=model_type == "bert"
        )
        for key in ("problem_type", "id2label", "label2id"):
            setattr(bare.config, key, None)
        bare.config.num_labels = 2
        model = bare
    model.save_pretrained(directory)
    build_encoder_tokenizer().save_pretrained(directory)
    return directory


def write_labelled(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write classification rows."""
    text = "".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows))
    path.write_text(text, encoding="utf-8")
    return path


def classifier_settings(
    model: Path, data: Path, structure: Structure | None = Structure.INPUT, **training: Any
) -> FinetuneSettings:
    """Return settings of a quick classification run."""
    quick = {
        "max_steps": 12,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "learning_rate": 2e-2,
        "warmup_ratio": 0.0,
        "max_tokens": 32,
        "eval_every": 0,
        "validation_fraction": 0.25,
    }
    return FinetuneSettings(
        model=str(model),
        data=str(data),
        method=Method.LORA if structure is None else Method.RESLORA,
        adapter=AdapterConfig(rank=2, alpha=2.0, structure=structure),
        targets="query,value",
        task=TrainingTask.CLASSIFICATION,
        training=TrainSettings(**quick | training),
    )


def make_classifier_adapter(
    model: Path, output: Path, structure: Structure | None = Structure.INPUT, **training: Any
) -> Path:
    """Run finetune."""
    data = write_labelled(output.with_name(f"{output.name}.jsonl"))
    finetune(classifier_settings(model, data, structure, **training), output)
    return output
