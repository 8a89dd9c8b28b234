"""The whole path on a real model, from a name to a table: `rolora demo`.

    unpack -> finetune (ResLoRA, block) -> merge -> quantize to each scheme -> export
           -> evaluate and time -> one answer

The reference of every figure is the fine-tuned model itself, merged and exported in float32, so
that the table shows what quantization alone costs. Text and training rows are the package's own
samples: the figures show that the path works; benchmark results stand in the README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.artifact import read_manifest
from deploy.bench import bench_onnx
from deploy.bench_report import BenchSettings
from deploy.calibration_text import sample_path, sample_text
from deploy.checkpoint_settings import CheckpointSettings, RotationChoice, choose_recipe
from deploy.export import Target, export_onnx
from deploy.finetune import FinetuneSettings, Method, finetune
from deploy.language_model import OpenedModel, open_language_model
from deploy.loading import load_model, save_tokenizer
from deploy.merge_rotate_quantize import merge_rotate_quantize
from deploy.model_location import DEMO_MODEL
from deploy.run import Sampling, TextGenerator
from deploy.staging import staged_directory
from deploy.text_quality import Task, cut_windows, evaluate_model
from reslora.config import AdapterConfig, Structure
from reslora.merge import MergeMethod
from reslora.settings import TrainSettings
from rolora.rotation import DEFAULT_ROTATIONS

QUESTION = "Why does bread rise when it is baked?"


@dataclass(frozen=True)
class Variant:
    """One row of the table: a way to quantize."""

    label: str
    directory: str
    scheme: str
    rotation: RotationChoice


def variants() -> list[Variant]:
    """Return the rows of the table, the float reference first."""
    rotated = RotationChoice(DEFAULT_ROTATIONS)
    plain = RotationChoice(frozenset())

    return [
        Variant("fine-tuned, float32", "fp32", "FP32", plain),
        Variant("W8A8, not rotated", "w8a8-plain", "W8A8", plain),
        Variant("W8A8, rotated", "w8a8", "W8A8", rotated),
        Variant("W4A8, rotated", "w4a8", "W4A8", rotated),
        Variant("W4A4, rotated", "w4a4", "W4A4", rotated),
    ]


@dataclass(frozen=True)
class DemoRow:
    """What was measured of one variant."""

    label: str
    directory: str
    ppl_ratio: float
    top1_agreement: float
    file_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class DemoReport:
    """The table and the answer."""

    rows: tuple[DemoRow, ...]
    question: str
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does."""

    model: str = DEMO_MODEL
    steps: int = 20
    windows: int = 4
    window_tokens: int = 512
    threads: int | None = None


def run_demo(
    settings: DemoSettings, output: Path, progress: Callable[[str], None] = lambda step: None
) -> DemoReport:
    """Run the whole path; stages whose output is there already are skipped.

    Args:
        settings: How much to do.
        output: Directory that receives and keeps all artifacts.
        progress: Called with a line for each step.

    Raises:
        RoloraError: Whatever a stage refuses.
        ValueError: The number of steps is out of range.
    """
    adapter = output / "adapter"
    model = output / "model"
    training = _finetune_settings(settings, model)
    unpack_model(settings.model, model, progress)
    finetune(training, adapter, progress=progress)
    exports: list[tuple[Variant, Path]] = []
    for variant in variants():
        progress(f"== {variant.label} ==")
        checkpoint, export = (
            output / variant.directory / "checkpoint",
            output / variant.directory / "onnx",
        )
        merge_rotate_quantize(_checkpoint_settings(model, adapter, variant), checkpoint, progress)
        export_onnx(checkpoint, export, Target.CPU, progress=progress)
        exports.append((variant, export))
    reference = open_language_model(str(exports[0][1]), threads=settings.threads)
    rows = []
    for variant, export in exports:
        progress(f"measuring {variant.label}")
        rows.append(_measure(variant, export, reference, settings))
    chosen = next(export for variant, export in exports if variant.directory == "w8a8")
    return DemoReport(tuple(rows), QUESTION, answer(chosen, QUESTION))


def answer(export: Path, question: str) -> str:
    """Return the answer of an exported model to a question, greedily decoded."""
    generator = TextGenerator(export)
    prompt = generator.chat_prompt([{"role": "user", "content": question}])
    return "".join(generator.stream(prompt, Sampling(max_new_tokens=96))).strip()


def unpack_model(
    reference: str, directory: Path, progress: Callable[[str], None] = lambda step: None
) -> Path:
    """Save a model as safetensors once, since every stage loads it and a GGUF file loads slowly.

    Args:
        reference: Anything that `load_model` takes.
        directory: Receives it; kept as it is if it is there.
        progress: Called with a line for each step.

    Returns:
        The directory.
    """
    if not directory.is_dir():
        progress(f"unpacking {reference}")
        loaded = load_model(reference)
        with staged_directory(directory) as partial:
            loaded.model.save_pretrained(partial)
            save_tokenizer(loaded, partial)
    return directory


def _finetune_settings(settings: DemoSettings, model: Path) -> FinetuneSettings:
    return FinetuneSettings(
        model=str(model),
        data=str(sample_path("finetune.jsonl")),
        method=Method.RESLORA,
        adapter=AdapterConfig(rank=8, alpha=16.0, dropout=0.0, structure=Structure.BLOCK, depth=4),
        targets="q,v",
        training=TrainSettings(
            max_steps=settings.steps, batch_size=8, max_tokens=256, learning_rate=5e-4
        ),
    )


def _checkpoint_settings(model: Path, adapter: Path, variant: Variant) -> CheckpointSettings:
    return CheckpointSettings(
        model=str(model),
        adapter=adapter,
        merge=MergeMethod.EXACT,
        rotation=variant.rotation,
        recipe=choose_recipe(variant.scheme),
        calibration=None,
        calibration_windows=8,
    )


def _measure(
    variant: Variant, export: Path, reference: OpenedModel, settings: DemoSettings
) -> DemoRow:
    opened = open_language_model(str(export), threads=settings.threads)
    windows = cut_windows(
        opened.tokenizer, sample_text("evaluation.txt"), settings.windows, settings.window_tokens
    )
    quality = evaluate_model(opened.model, reference.model, windows, frozenset(Task))
    del opened
    speed = bench_onnx(
        export, BenchSettings(prompt_tokens=512, new_tokens=64, runs=3, threads=settings.threads)
    )
    graph_bytes = sum(
        record.bytes
        for name, record in read_manifest(export).files.items()
        if name.endswith((".onnx", ".onnx.data"))
    )
    return DemoRow(
        label=variant.label,
        directory=str(export),
        ppl_ratio=quality["ppl_ratio"],
        top1_agreement=quality["top1_agreement"],
        file_bytes=graph_bytes,
        prefill_tokens_per_s=speed.medians["prefill_tokens_per_s"],
        decode_tokens_per_s=speed.medians["decode_tokens_per_s"],
    )
