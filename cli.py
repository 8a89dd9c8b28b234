"""The command line: one subcommand a stage.

Stages are imported only when they run, so that `--help` is quick.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deploy.errors import ConfigError, RoloraError

if TYPE_CHECKING:
    from deploy.bench_report import BenchReport
    from deploy.kept_adapters import AdapterChoice

app = typer.Typer(
    name="rolora",
    no_args_is_help=True,
    rich_markup_mode=None,  # its tables leave an option with long choices no room for its help
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Fine-tune a language model with ResLoRA or RoLoRA, quantize weights and activations, "
    "export it to ONNX.\n\n"
    "Exit codes: 0 done, 2 bad usage or configuration, 3 stage out of order, 4 unreadable or "
    "damaged artifact, 5 unsupported model, 6 a parity or quality check failed.",
)
INTERRUPTED = 130
"""Exit code that typer turns Ctrl-C into, 128 + SIGINT."""
PIPE_WIDTH = 100
"""Columns where no terminal says how many it has, so that tables do not break in a log."""
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)


class MethodName(StrEnum):
    """Values of --method."""

    RESLORA = "reslora"
    ROLORA = "rolora"
    LORA = "lora"


class TaskName(StrEnum):
    """Values of --task."""

    LANGUAGE = "language"
    CLASSIFICATION = "classification"


class StructureName(StrEnum):
    """Values of --structure."""

    BLOCK = "block"
    INPUT = "input"
    MIDDLE = "middle"


class PresetName(StrEnum):
    """Values of --preset."""

    RESLORA_NLG = "reslora-nlg"
    RESLORA_NLU = "reslora-nlu"


class SchedulerName(StrEnum):
    """Values of --scheduler."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant_with_warmup"


class KeepName(StrEnum):
    """Values of --keep."""

    BEST = "best"
    LAST = "last"


class PrecisionName(StrEnum):
    """Values of --precision."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class MergeName(StrEnum):
    """Values of --merge."""

    AUTO = "auto"
    EXACT = "exact"
    LEAST_SQUARES = "least-squares"
    LEAST_SQUARES_SCALAR = "least-squares-scalar"
    INPUT_NORM = "input-norm"
    WEIGHT_NORM = "weight-norm"
    DROP = "drop"


class DestinationName(StrEnum):
    """Values of --to."""

    MODEL = "model"
    ADAPTER = "adapter"


class DtypeName(StrEnum):
    """Values of --dtype."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class LearnFromName(StrEnum):
    """Mirrors `deploy.quantized_training.LearnFrom`."""

    TEACHER = "teacher"
    LABELS = "labels"


class KindName(StrEnum):
    """Values of --rotation-kind."""

    HADAMARD = "hadamard"
    ORTHOGONAL = "orthogonal"


class ObjectiveName(StrEnum):
    """Values of --objective."""

    KL = "kl"
    CE = "ce"


class WeightsName(StrEnum):
    """Values of --weights."""

    RTN = "rtn"
    GPTQ = "gptq"


class SymmetryName(StrEnum):
    """Values of --activation-symmetry."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"


class EqualizeName(StrEnum):
    """Inputs whose channels are scaled."""

    NONE = "none"
    INNER = "inner"
    ALL = "all"


class StaticName(StrEnum):
    """Values of --static."""

    YES = "yes"
    NO = "no"
    AUTO = "auto"
    ALL = "all"


class FormatName(StrEnum):
    """Values of --format."""

    ONNX = "onnx"
    COMPRESSED_TENSORS = "compressed-tensors"


class TargetName(StrEnum):
    """Values of --target."""

    CPU = "cpu"
    CPU_AVX2 = "cpu-avx2"
    CPU_ARM64 = "cpu-arm64"
    CUDA = "cuda"
    QDQ = "qdq"


class KernelName(StrEnum):
    """Kernels of an export (`deploy.kernels.Kernel`)."""

    AUTO = "auto"
    INTEGER = "integer"
    NBITS = "nbits"
    QDQ = "qdq"


Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as JSON on stdout; everything else goes to stderr."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved settings and stop.")]
Output = Annotated[
    Path,
    typer.Option("--output", help="Directory to make. It must not exist, or be this very result."),
]
MERGE_HELP = (
    "How the adapter is merged: exact for block and plain LoRA; the others for input and middle, "
    "measured on the calibration text; auto tries all that fit and takes the nearest to the "
    "unmerged model."
)
CALIBRATION_HELP = (
    "Calibration text: JSONL(.gz) or text file, or hub id. Default: a sample of ours."
)
TASK_CALIBRATION_HELP = (
    f"{CALIBRATION_HELP} Of a classifier: labelled rows; default: those of its adapter's training."
)
ROTATION_HELP = "Take the rotation of this artifact, such as learn-rotation wrote."
GROUP_HELP = "Input columns that share a weight scale; needs A8. Default: whole channels."
CLIP_HELP = "Part of a token's range in a scale. Default: 1, at 4 bits 0.7 (0.9 in groups)."
STATIC_HELP = "Calibrated scales after norms."
MODEL_HELP = "Hub id, directory with safetensors, .gguf file, or smollm2-135m."


def _take_preset(context: typer.Context, name: PresetName | None) -> PresetName | None:
    """Let a preset give the defaults of the options that are not on the command line."""
    if name is not None:
        from deploy.presets import PRESETS

        context.default_map = {**(context.default_map or {}), **PRESETS[name]}
    return name


@app.command("finetune")
def finetune_command(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help="Training rows: JSONL(.gz) or text file, or hub id.")],
    output: Output,
    task: Annotated[
        TaskName,
        typer.Option(
            help="What is learned: language by a decoder, or classification, with labelled rows, "
            "by an encoder (bert, roberta; minilm-l6 is one that a package brings)."
        ),
    ] = TaskName.LANGUAGE,
    preset: Annotated[
        PresetName | None,
        typer.Option(
            is_eager=True,
            callback=_take_preset,
            help="Settings of the ResLoRA paper; options given beside it win. --dry-run shows all.",
        ),
    ] = None,
    method: Annotated[
        MethodName, typer.Option(help="What is trained, and in which basis.")
    ] = MethodName.RESLORA,
    structure: Annotated[
        StructureName | None,
        typer.Option(help="ResLoRA shortcut; reslora takes block unless told otherwise."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(help="Previous layers a shortcut reaches; -1 is all of them. Default: 4."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank r of the update.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by alpha / rank. Default: rank.")
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank) instead.")
    ] = False,
    init: Annotated[
        str,
        typer.Option(
            help="How the update begins, at zero: default, gaussian, or orthogonal (even rank, not "
            "with --structure middle)."
        ),
    ] = "default",
    dropout: Annotated[float, typer.Option(help="Dropout on the input of the adapters.")] = 0.0,
    targets: Annotated[
        str,
        typer.Option(
            help="Adapted linears: a list of q,k,v,o,gate,up,down, or all. An encoder has no gate, "
            "and query,key,value are names too."
        ),
    ] = "q,v",
    validation: Annotated[
        str | None, typer.Option(help="Validation rows. Default: a share of the training rows.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; overrides --epochs.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows per process and step.")] = 8,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches summed into one step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    warmup_ratio: Annotated[
        float, typer.Option(help="Share of the steps in which the rate rises.")
    ] = 0.06,
    scheduler: Annotated[
        SchedulerName, typer.Option(help="How the rate moves after the warm-up.")
    ] = SchedulerName.COSINE,
    weight_decay: Annotated[float, typer.Option(help="Decay of AdamW.")] = 0.1,
    precision: Annotated[
        PrecisionName,
        typer.Option(help="Products in forward and backward pass; weights stay float32."),
    ] = PrecisionName.FLOAT32,
    max_tokens: Annotated[int, typer.Option(help="Longest row, in tokens.")] = 512,
    packing: Annotated[
        bool, typer.Option(help="Put several examples into a row, invisible to each other.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Less memory, about a third slower.")
    ] = False,
    eval_every: Annotated[
        int, typer.Option(help="Steps between validations; 0: only at the end.")
    ] = 100,
    early_stopping: Annotated[
        int | None,
        typer.Option(help="Stop after this many validations in a row without a new best."),
    ] = None,
    keep: Annotated[
        KeepName | None,
        typer.Option(help="Adapter to end with. Default: best if there are validation rows."),
    ] = None,
    best_metric: Annotated[
        str, typer.Option(help="Validation figure that tells the best: loss, or one of the task's.")
    ] = "loss",
    save_every: Annotated[int, typer.Option(help="Steps between training checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of data order, initialization and dropout.")] = 0,
    rotation_kind: Annotated[
        KindName, typer.Option(help="Rotation of method rolora.")
    ] = KindName.HADAMARD,
    rotation_seed: Annotated[int, typer.Option(help="Seed of the rotation of method rolora.")] = 0,
    start: Annotated[
        Path | None,
        typer.Option(
            help="Quantization-aware training: a quantized checkpoint of the model; the adapter "
            "and all scales learn inside its rounding and rotation. Finish with rolora pack."
        ),
    ] = None,
    learn_from: Annotated[
        LearnFromName,
        typer.Option(help="With --start: the float model's predictions, or the data's tokens."),
    ] = LearnFromName.TEACHER,
    rotation: Annotated[Path | None, typer.Option(help=ROTATION_HELP)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest training checkpoint.")
    ] = False,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Write curves for TensorBoard there (extra tensorboard)."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train an adapter: LoRA, ResLoRA (shortcuts between layers), or RoLoRA (rotated LoRA)."""
    from deploy.describe import training_rows
    from deploy.finetune import FinetuneSettings, Method, finetune
    from deploy.finetune_tasks import TrainingTask
    from deploy.quantized_training import LearnFrom
    from reslora.config import AdapterConfig, Structure, parse_initialization
    from reslora.settings import Keep, Precision, Scheduler, TrainSettings
    from rolora.rotation import RotationKind

    if structure is None and method is MethodName.RESLORA:
        structure = StructureName.BLOCK
    if depth is not None and structure is None:
        raise ConfigError(f"--depth {depth}: is how far the shortcuts of --structure reach")
    with _bad_values():
        adapter = AdapterConfig(
            rank=rank,
            alpha=float(rank) if alpha is None else alpha,
            dropout=dropout,
            structure=None if structure is None else Structure(structure),
            depth=4 if depth is None else depth,
            rslora=rslora,
            initialization=parse_initialization(init),
        )
        training = TrainSettings(
            max_steps=max_steps,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            learning_rate=learning_rate,
            warmup_ratio=warmup_ratio,
            scheduler=Scheduler(scheduler),
            weight_decay=weight_decay,
            precision=Precision(precision),
            early_stopping=early_stopping,
            keep=None if keep is None else Keep(keep),
            best_metric=best_metric,
            max_tokens=max_tokens,
            packing=packing,
            gradient_checkpointing=gradient_checkpointing,
            eval_every=eval_every,
            save_every=save_every,
            seed=seed,
        )
    settings = FinetuneSettings(
        model=model,
        data=data,
        validation=validation,
        task=TrainingTask(task),
        method=Method(method),
        adapter=adapter,
        targets=targets,
        training=training,
        rotation_kind=RotationKind(rotation_kind),
        rotation_seed=rotation_seed,
        start=start,
        learn_from=LearnFrom(learn_from),
        rotation=rotation,
    )
    if dry_run:
        shown = {"output": str(output), "preset": preset, "tensorboard": tensorboard}
        _print_json({"stage": "finetune", **shown, **settings.to_config()})
        return
    report = finetune(settings, output, resume=resume, tensorboard=tensorboard, progress=_log_step)
    if report is None:
        return
    result = report.to_dict()
    merging = "" if structure in (None, StructureName.BLOCK) else "--merge auto "
    following = (
        f"rolora merge-rotate-quantize --model {_quoted(model)} --adapter {_quoted(output)} "
        f"{merging}--scheme W8A8 --output ..."
    )
    if start is not None:
        following = f"rolora pack --model {_quoted(model)} --adapter {_quoted(output)} --output ..."
    if task is TaskName.CLASSIFICATION:
        following = (
            f"rolora evaluate --tasks classification --model {_quoted(model)} "
            f"--adapter {_quoted(output)} --data ..."
        )
    _finish(
        result,
        as_json,
        [
            ("adapter", str(output)),
            *training_rows(result["training"]),
            ("next", following),
        ],
    )


@app.command("merge")
def merge_command(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    to: Annotated[
        DestinationName,
        typer.Option(help="A Hugging Face model directory, or a plain LoRA adapter for PEFT."),
    ],
    output: Output,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Adapter to merge; it must have been trained on the model. Without one, --to "
            "model writes the model as it is."
        ),
    ] = None,
    merge: Annotated[MergeName, typer.Option(help=MERGE_HELP)] = MergeName.EXACT,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Recompress the written adapter to this rank, and report what that costs."
        ),
    ] = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Numbers that are written; the arithmetic is float64.")
    ] = DtypeName.FLOAT32,
    calibration: Annotated[str | None, typer.Option(help=TASK_CALIBRATION_HELP)] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into an ordinary model or adapter that needs nothing of this package."""
    from deploy.describe import merge_rows
    from deploy.merge import Destination, FloatType, MergeSettings
    from deploy.merge import merge as run_merge
    from reslora.merge import MergeMethod

    settings = MergeSettings(
        model=model,
        adapter=adapter,
        to=Destination(to),
        merge=None if merge is MergeName.AUTO else MergeMethod(merge),
        rank=rank,
        dtype=FloatType(dtype),
        calibration=calibration,
    )
    if dry_run:
        _print_json({"stage": "merge", "output": str(output), **settings.to_config()})
        return
    with stderr.status("starting") as status:
        report = run_merge(settings, output, lambda step: status.update(step))
    result = report.to_dict()
    error = result["recompression_error"]
    _finish(
        result,
        as_json,
        [
            (result["to"], str(output)),
            *merge_rows(result["merge"] or {}),
            *([("rank", str(result["rank"]))] if result["rank"] else []),
            *([("error of the lower rank", f"{error:.3g}")] if error is not None else []),
            ("weights", _megabytes(result["weights_bytes"])),
        ],
    )


@app.command("merge-rotate-quantize")
def merge_rotate_quantize_command(
    model: Annotated[
        str, typer.Option(help=f"{MODEL_HELP} Or an encoder (bert, roberta), as minilm-l6 is.")
    ],
    scheme: Annotated[
        str,
        typer.Option(
            help="W8A8, W4A8, W4A4, W6A6, W4A16 ... or FP32 to merge and rotate only; 16 is float."
        ),
    ],
    output: Output,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter to merge; it must have been trained on the model.")
    ] = None,
    merge: Annotated[MergeName, typer.Option(help=MERGE_HELP)] = MergeName.EXACT,
    rotate: Annotated[
        str | None,
        typer.Option(
            help="A list of r1,r2,r3,r4, or none. Default: the adapter's own, else r1,r2,r4; and "
            "r3 with a KV cache of 4 bits."
        ),
    ] = None,
    rotation_kind: Annotated[
        KindName, typer.Option(help="How the rotations are drawn.")
    ] = KindName.HADAMARD,
    rotation_seed: Annotated[int, typer.Option(help="Seed of the rotations.")] = 0,
    rotation_block: Annotated[
        int | None,
        typer.Option(
            help="Channels that the rotations at run time mix (R4; R1 with --equalize all): 64 is "
            "faster and mixes less. Default: all."
        ),
    ] = None,
    rotation: Annotated[Path | None, typer.Option(help=ROTATION_HELP)] = None,
    weights: Annotated[
        WeightsName, typer.Option(help="How weights are rounded.")
    ] = WeightsName.GPTQ,
    group_size: Annotated[
        int | None,
        typer.Option(help=GROUP_HELP),
    ] = None,
    clip_search: Annotated[
        bool, typer.Option(help="Search the clipping point of each weight scale.")
    ] = True,
    activation_clip: Annotated[
        str | None,
        typer.Option(
            help="Part of a token's range that its scale covers, or auto: searched for each input. "
            "Default: 1, at 4 bits 0.7 (0.9 in groups)."
        ),
    ] = None,
    activation_symmetry: Annotated[
        SymmetryName,
        typer.Option(help="asymmetric: per-token activations have zero points."),
    ] = SymmetryName.SYMMETRIC,
    activation_group_size: Annotated[
        int | None,
        typer.Option(
            help="Input columns that share an activation scale. Default: whole tokens, or the "
            "weights' groups."
        ),
    ] = None,
    static: Annotated[
        StaticName | None,
        typer.Option(
            help="Calibrated scales after norms; auto: where they cost no more than per-token "
            "ones; all: for every input, as --target qdq needs. Default: yes if R1 is used and "
            "channels are not scaled."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="Bits of single linears, as PATTERN=BITS: down=A8, o,down=A8, layers.0.*=W8A8. "
            "Roles are q, k, v, o, gate, up, down, head. Can be repeated; the last one counts."
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            help="Average bits, as W4.5, A5 or W4.5A5: raise what rounding harms most to 8 bits "
            "until they are reached."
        ),
    ] = None,
    embedding_bits: Annotated[int, typer.Option(help="4, 8, or 32 for float.")] = 8,
    head_bits: Annotated[
        int | None,
        typer.Option(
            help="4, 8, or 32 for float. Default: 8, or the embedding's with --share-table; an "
            "encoder's pooler and classifier are float."
        ),
    ] = None,
    share_table: Annotated[
        bool,
        typer.Option(
            "--share-table",
            help="Store embedding and head of a tied model as one table, of 8 bits or 4 "
            "(--embedding-bits 4: smaller, faster in decode, and further from the model), with "
            "channel scales in front of the rotations.",
        ),
    ] = False,
    kv_bits: Annotated[int, typer.Option(help="Of the KV cache: 8, 4, or 16 for float.")] = 16,
    equalize: Annotated[
        EqualizeName | None,
        typer.Option(
            help="Scale channels in front of the rotations by what each can bear of rounding: "
            "`inner` those between two linears of a block (values, the MLP's activation), which "
            "costs nothing at run time; `all` those behind the norms too, and R1 then acts at run "
            "time. Default: all for activations of 4 or 6 bits, inner for W8A8, else none.",
        ),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help=TASK_CALIBRATION_HELP)] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on behind the parts that an interrupted run finished in OUTPUT.quantizing, or "
            "remove them and begin anew.",
        ),
    ] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter, rotate outliers away, and quantize weights and activations."""
    from deploy.checkpoint_settings import (
        CheckpointSettings,
        RotationChoice,
        choose_recipe,
        parse_activation_clip,
        parse_rotation,
        parse_static,
    )
    from deploy.describe import merge_rows
    from deploy.merge_rotate_quantize import merge_rotate_quantize
    from deploy.model_location import is_encoder
    from deploy.quantize_encoder import quantize_encoder
    from reslora.merge import MergeMethod
    from rolora.equalization import Equalized
    from rolora.mixed_precision import Budget
    from rolora.overrides import Override
    from rolora.rotation import RotationKind
    from rolora.scheme import FLOAT_BITS

    choice = parse_rotation(rotate, RotationKind(rotation_kind), rotation_seed, kv_bits)
    encoder = is_encoder(model, fetch=not dry_run)
    if encoder and choice is None:
        choice = RotationChoice(frozenset())
    if head_bits is None:
        of_decoder = embedding_bits if share_table else 8
        head_bits = FLOAT_BITS if encoder else of_decoder
    with _bad_values():
        recipe = choose_recipe(
            scheme,
            weights=weights,
            group_size=group_size,
            clip_search=clip_search,
            activation_clip=parse_activation_clip(activation_clip),
            static=parse_static(static),
            embedding_bits=embedding_bits,
            head_bits=head_bits,
            asymmetric=activation_symmetry is SymmetryName.ASYMMETRIC,
            activation_group_size=activation_group_size,
            shared_table=share_table,
        )
        overrides = tuple(Override.parse(text) for text in override or ())
        budget = None if mixed_precision is None else Budget.parse(mixed_precision)
        settings = CheckpointSettings(
            model=model,
            adapter=adapter,
            merge=None if merge is MergeName.AUTO else MergeMethod(merge),
            rotation=choice,
            recipe=recipe,
            calibration=calibration,
            overrides=overrides,
            budget=budget,
            stored_rotation=rotation,
            kv_bits=kv_bits,
            equalize=None if equalize is None else Equalized(equalize),
            rotation_block=rotation_block,
        )
    if dry_run:
        _print_json(
            {"stage": "merge-rotate-quantize", "output": str(output), **settings.to_config()}
        )
        return
    with _layer_bar() as bar:
        task = bar.add_task("starting", total=None)
        quantize = quantize_encoder if encoder else partial(merge_rotate_quantize, resume=resume)
        report = quantize(
            settings,
            output,
            lambda step: bar.update(task, description=step),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    result = report.to_dict()
    _finish(
        result,
        as_json,
        [
            ("checkpoint", str(output)),
            ("scheme", str(result["scheme"])),
            *merge_rows(result["merge"] or {}),
            ("quantized layers", str(result["quantized_layers"])),
            *(
                [("seconds per block", f"{sum(seconds) / len(seconds):.1f}")]
                if (seconds := report.seconds_per_block)
                else []
            ),
            ("peak memory", _megabytes(report.peak_memory_bytes)),
            ("next", f"rolora export --format onnx --checkpoint {_quoted(output)} --output ..."),
        ],
    )


@app.command("pack")
def pack_command(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    adapter: Annotated[Path, typer.Option(help="Adapter of rolora finetune --start.")],
    output: Output,
    start: Annotated[
        Path | None,
        typer.Option(help="The checkpoint it was trained in. Default: where it was then."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the quantized checkpoint that quantization-aware training ended with."""
    from deploy.pack import PackSettings, pack

    settings = PackSettings(model, adapter, start)
    if dry_run:
        _print_json({"stage": "pack", "output": str(output), **settings.to_config()})
        return
    report = pack(settings, output, _log_step)
    result = report.to_dict()
    _finish(
        result,
        as_json,
        [
            ("checkpoint", str(output)),
            ("scheme", str(result["scheme"])),
            ("peak memory", _megabytes(report.peak_memory_bytes)),
            ("next", f"rolora export --format onnx --checkpoint {_quoted(output)} --output ..."),
        ],
    )


@app.command("learn-rotation")
def learn_rotation_command(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    scheme: Annotated[
        str, typer.Option(help="W8A8, W4A8, W4A4 ...: what the rotation is learned for.")
    ],
    output: Output,
    calibration: Annotated[str | None, typer.Option(help=CALIBRATION_HELP)] = None,
    steps: Annotated[
        int, typer.Option(help="Steps, a window of text each; 0 only chooses a draw.")
    ] = 100,
    learning_rate: Annotated[
        float, typer.Option(help="Rate of the first step; it falls linearly to 0.")
    ] = 0.3,
    objective: Annotated[
        ObjectiveName,
        typer.Option(
            help="kl: the float model's predictions are kept. ce: the text's probability."
        ),
    ] = ObjectiveName.KL,
    best_of: Annotated[
        int,
        typer.Option(help="Draws to start from, of which the one with the least loss is taken."),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first draw and of the text's order.")] = 0,
    window_tokens: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    held_out: Annotated[
        int, typer.Option(help="Windows for static scales and comparisons, not learned from.")
    ] = 4,
    precision: Annotated[
        PrecisionName,
        typer.Option(help="Products in forward and backward pass; rotations are float64."),
    ] = PrecisionName.FLOAT32,
    shared_r2: Annotated[
        bool,
        typer.Option("--shared-r2", help="One R2 for all layers, as adapters with shortcuts need."),
    ] = False,
    group_size: Annotated[int | None, typer.Option(help=GROUP_HELP)] = None,
    activation_clip: Annotated[float | None, typer.Option(help=CLIP_HELP)] = None,
    static: Annotated[bool, typer.Option("--static/--dynamic", help=STATIC_HELP)] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Learn rotations for the activations of a scheme, for --rotation of the other stages."""
    from deploy.checkpoint_settings import choose_recipe, is_float
    from deploy.describe import learning_rows
    from deploy.learn_rotation import LearnRotationSettings, learn_rotation_artifact
    from rolora.learned import LearningSettings, Objective

    if is_float(scheme):
        raise ConfigError(f"--scheme {scheme}: expected one that rounds activations, such as W4A4")
    with _bad_values():
        recipe = choose_recipe(
            scheme,
            group_size=group_size,
            activation_clip=activation_clip,
            static=static,
        )
    assert recipe is not None
    settings = LearnRotationSettings(
        model=model,
        recipe=recipe.in_basis(rotated=True, scaled=False),
        learning=LearningSettings(
            steps=steps,
            learning_rate=learning_rate,
            objective=Objective(objective),
            bfloat16=precision is PrecisionName.BFLOAT16,
            one_r2=shared_r2,
        ),
        calibration=calibration,
        seed=seed,
        best_of=best_of,
        tokens=window_tokens,
        held_out=held_out,
    )
    if dry_run:
        _print_json({"stage": "learn-rotation", "output": str(output), **settings.to_config()})
        return
    with _layer_bar() as bar:
        task = bar.add_task("starting", total=None)
        report = learn_rotation_artifact(
            settings,
            output,
            lambda step: bar.update(task, description=step),
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    result = report.to_dict()
    _finish(
        result,
        as_json,
        [
            ("rotation", str(output)),
            ("scheme", str(result["scheme"])),
            *learning_rows(result["learning"]),
            ("peak memory", _megabytes(report.peak_memory_bytes)),
            (
                "next",
                f"rolora merge-rotate-quantize --model {_quoted(model)} --scheme {scheme} "
                f"--rotation {_quoted(output)} --output ...",
            ),
        ],
    )


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Option(help="What merge-rotate-quantize wrote.")],
    output: Output,
    file_format: Annotated[
        FormatName,
        typer.Option(
            "--format",
            help="onnx: for ONNX Runtime. compressed-tensors: for transformers and vLLM.",
        ),
    ] = FormatName.ONNX,
    target: Annotated[
        TargetName | None,
        typer.Option(
            help="onnx: where the graph runs. cpu: x64 with VNNI; cpu-avx2: x64 without; "
            "cpu-arm64; cuda: NVIDIA GPUs; qdq: standard operators only, for TensorRT, OpenVINO, "
            "QNN and browsers. Default: cpu."
        ),
    ] = None,
    kernel: Annotated[
        KernelName | None,
        typer.Option(
            help="onnx: integer, one graph with integer products; nbits, one graph with "
            "MatMulNBits; qdq, one graph of standard operators (--target qdq); auto (default), "
            "integer products for prompts, MatMulNBits for single tokens."
        ),
    ] = None,
    keep_adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIRECTORY",
            help="onnx: keep a plain LoRA adapter beside a base that was quantized without one, to "
            "be swapped at run time. May be given more than once; NAME is the directory's by "
            "default.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="--keep-adapter: where the checkpoint's model is, if not where it was; its norm "
            "gains are read."
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX or compressed-tensors, and check it against torch."""
    from deploy.kept_adapters import parse_adapter_choices

    keep = parse_adapter_choices(keep_adapter or [])
    if model is not None and not keep:
        raise ConfigError("--model needs --keep-adapter; an export itself reads the checkpoint")
    if file_format is FormatName.COMPRESSED_TENSORS:
        if keep:
            raise ConfigError(
                f"--keep-adapter: only --format onnx has adapters beside the base; serve "
                f"{file_format} with the adapter in PEFT's format"
            )
        given = ["--target"] * (target is not None) + ["--kernel"] * (kernel is not None)
        if given:
            raise ConfigError(
                f"{' and '.join(given)}: only --format onnx takes kernels; the programs that read "
                f"{file_format} choose their own"
            )
    kernel = kernel or KernelName.AUTO
    target = target or (TargetName.QDQ if kernel is KernelName.QDQ else TargetName.CPU)
    if file_format is FormatName.ONNX:
        from deploy.kernels import Kernel, require_offered
        from deploy.targets import Target

        require_offered(Target(target), Kernel(kernel))
    if dry_run:
        _print_json(
            {
                "stage": "export",
                "output": str(output),
                "checkpoint": str(checkpoint),
                "format": file_format,
            }
            | ({} if model is None else {"model": model})
            | ({"target": target, "kernel": kernel} if file_format is FormatName.ONNX else {})
            | (
                {"keep_adapter": {choice.name: str(choice.directory) for choice in keep}}
                if keep
                else {}
            )
        )
        return
    if file_format is FormatName.COMPRESSED_TENSORS:
        _export_compressed(checkpoint, output, as_json)
    else:
        _export_onnx(checkpoint, output, target, kernel, keep, model, as_json)


@app.command("run")
def run_command(
    model: Annotated[Path, typer.Option(help="What export wrote.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, or the user's turn with --chat.")],
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most probable tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Name of an adapter that was kept at export; default: the base alone."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text with an exported model, piece by piece, in onnxruntime-genai."""
    from deploy.run import Sampling, TextGenerator

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    if system is not None and not chat:
        raise ConfigError("--system needs --chat")
    generator = TextGenerator(model, adapter)
    text = prompt
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = generator.chat_prompt([*messages, {"role": "user", "content": prompt}])
    pieces = []
    for piece in generator.stream(text, sampling):
        pieces.append(piece)
        if not as_json:
            stdout.out(piece, end="", highlight=False)
            sys.stdout.flush()
    if as_json:
        _print_json({"model": str(model), "prompt": prompt, "text": "".join(pieces)})
    else:
        stdout.out("")


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Option(help=f"An export, a checkpoint, or: {MODEL_HELP}")],
    data: Annotated[
        str | None,
        typer.Option(
            help="For ppl and kl text, as for --calibration; default, and beside a directory: a "
            "sample of ours. For exact-match, completion-ppl and classification rows, as for "
            "finetune. For multiple choice a directory with TASK.jsonl(.gz) or TASK.dev.jsonl.gz."
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Model to compare with.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Adapter to evaluate unmerged, shortcuts and online rotations at work; it must "
            "have been trained on the model."
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="A list of ppl, kl, exact-match, completion-ppl, arc_easy, arc_challenge, boolq, "
            "hellaswag, openbookqa, piqa, social_i_qa, winogrande, mmlu; or classification, alone."
        ),
    ] = "ppl",
    windows: Annotated[int, typer.Option(help="Windows, evenly spaced over the text.")] = 12,
    window_tokens: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    limit: Annotated[
        int | None, typer.Option(help="Most rows or questions of a task, the first ones.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest answer of exact-match, in tokens.")
    ] = 256,
    threads: Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.")] = None,
    as_json: Json = False,
) -> None:
    """Measure any model: perplexity, divergence from a reference, answers, choices, labels."""
    names = {name.strip() for name in tasks.split(",")} - {""}
    if TaskName.CLASSIFICATION in names:
        if len(names) > 1 or data is None or reference is not None or limit is not None:
            raise ConfigError(
                f"--tasks {tasks!r}: classification stands alone, needs --data with labelled rows, "
                "and takes no --reference and no --limit"
            )
        _evaluate_classification(model, adapter, data, threads, as_json)
        return
    from deploy.evaluation import EvaluationSettings, parse_tasks, result_lines, run_evaluation

    settings = EvaluationSettings(
        model=model,
        tasks=parse_tasks(tasks),
        data=data,
        reference=reference,
        adapter=adapter,
        windows=windows,
        window_tokens=window_tokens,
        limit=limit,
        max_new_tokens=max_new_tokens,
        threads=threads,
    )
    with stderr.status("reading data") as status:
        summary = run_evaluation(settings, lambda step: status.update(step))
    lines = result_lines(summary["results"])
    for name, figures in result_lines(summary.get("reference_results", {})):
        lines.append((f"reference {name}", figures))
    _finish(summary, as_json, lines)


@app.command("bench")
def bench_command(
    model: Annotated[Path, typer.Option(help="What export wrote.")],
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of the prompt; of an encoder, of each text.")
    ] = 512,
    new_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens decoded after it. Default: 128; an encoder decodes none."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs; the figures are medians.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads. Default: what ONNX Runtime chooses; with --against or --profile the "
            "processors this process may use."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that go on together, or texts.")] = 1,
    against: Annotated[
        str | None,
        typer.Option(
            help="Peers to measure in turn with it, separated by commas: genai-int4, genai-int8, "
            "genai-fp32 (built by onnxruntime-genai), genai:DIRECTORY, llama.cpp:Q8_0 or another "
            "type (MODEL's file in --peer-cache), llama.cpp:FILE.gguf, torch (the float model in "
            "transformers, of an encoder too)."
        ),
    ] = None,
    peer_model: Annotated[
        str | None,
        typer.Option(help="Float model of the peers. Default: the one that the export came from."),
    ] = None,
    peer_cache: Annotated[
        Path | None, typer.Option(help="Keeps built peers. Default: ~/.cache/rolora/peers.")
    ] = None,
    llama_cpp: Annotated[
        str | None,
        typer.Option("--llama-cpp", help="A Python that has llama-cpp-python, for its peers."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Write a JSON file that says which operators a decoder's time goes to, and how "
            "far that is from what this machine allows."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure speed, latency, memory and size of an export: of prompt and decode, or of texts."""
    from deploy.bench import bench_onnx, settings_for
    from deploy.bench_report import fix_threads
    from deploy.report_file import require_place

    require_place("--profile", profile)
    settings = settings_for(model, prompt_tokens, new_tokens, runs, threads, batch)
    if profile is not None:
        if settings.new_tokens is None:
            raise ConfigError(f"{model}: holds an encoder; --profile is for decoders")
        settings = fix_threads(settings)
    if against is None:
        given = {"--peer-model": peer_model, "--peer-cache": peer_cache, "--llama-cpp": llama_cpp}
        if unused := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{', '.join(unused)}: only --against takes peers")
        with stderr.status("measuring") as status:
            report = bench_onnx(
                model, settings, lambda done: status.update(f"run {done} of {runs}")
            )
        _finish(report.to_dict(), as_json, report.rows())
    else:
        from deploy.bench_against import LEGEND, bench_against
        from deploy.bench_peers import PeerSettings, parse_peers

        peers = PeerSettings(parse_peers(against), peer_model, peer_cache, llama_cpp)
        with stderr.status("starting") as status:
            comparison = bench_against(model, settings, peers, lambda step: status.update(step))
        report = comparison.reports[comparison.ours]
        rows = comparison.rows()
        _finish_table(comparison.to_dict(), as_json, comparison.columns(), rows, LEGEND)
    if profile is not None:
        _profile(model, report, profile, as_json)


@app.command("parity")
def parity_command(
    model: Annotated[Path, typer.Option(help="What export wrote.")],
    checkpoint: Annotated[Path, typer.Option(help="What it was exported from.")],
    report: Annotated[
        Path | None, typer.Option(help="Write every comparison to this JSON file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--every", help="Show every linear, not only those beyond their bound.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show, layer by layer, how an export departs from torch, and where first."""
    from deploy.artifact import EXPORTS, ArtifactKind, read_manifest
    from deploy.encoder_layer_parity import EncoderExportReport, report_on_encoder
    from deploy.layer_parity import report_on_export
    from deploy.layer_report import COLUMNS, LayerReport
    from deploy.report_file import require_place, write_report

    require_place("--report", report)
    found: LayerReport | EncoderExportReport
    with stderr.status("comparing"):
        if read_manifest(model, *EXPORTS).kind is ArtifactKind.ENCODER:
            found = report_on_encoder(model, checkpoint)
        else:
            found = report_on_export(model, checkpoint)
    if report is not None:
        write_report(report, found.to_dict())
    _finish_table(found.to_dict(), as_json, COLUMNS, found.rows(every=every))
    found.require_within_bounds()


@app.command("inspect")
def inspect_command(
    directory: Annotated[
        Path, typer.Argument(help="An adapter, checkpoint, export or merged model.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its sha256.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what an artifact is: manifest, sizes, operators, checks."""
    from deploy.describe import describe_artifact

    description = describe_artifact(directory, verify=verify)
    _finish(description.to_dict(), as_json, description.summary())


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option(help="Directory that keeps all artifacts.")] = Path(
        "artifacts/demo"
    ),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 20,
    threads: Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.")] = None,
    as_json: Json = False,
) -> None:
    """Run the whole path on SmolLM2-135M: fine-tune, quantize, export, compare, answer."""
    from deploy.demo import DemoSettings, run_demo

    with _bad_values():
        report = run_demo(DemoSettings(steps=steps, threads=threads), output, _log_step)
    if as_json:
        _print_json(report.to_dict())
        return
    table = Table("model", "ppl ratio", "top-1", "file", "prefill tok/s", "decode tok/s")
    for row in report.rows:
        table.add_row(
            row.label,
            f"{row.ppl_ratio:.4g}",
            f"{row.top1_agreement:.1%}",
            _megabytes(row.file_bytes),
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
        )
    stdout.print(table)
    stdout.print(f"Q: {report.question}\nA: {report.answer}", markup=False)
    stdout.print(f"\nEverything is kept in {output}. Ask it yourself:", markup=False)
    stdout.print(
        f"  rolora run --model {_quoted(output / 'w8a8' / 'onnx')} --chat --prompt "
        f"'How do magnets work?'",
        markup=False,
    )


def _profile(model: Path, report: BenchReport, output: Path, as_json: bool) -> None:
    """Record the operators of an export that was just measured."""
    from deploy.bench_profile import PROFILE_COLUMNS, profile_onnx
    from deploy.report_file import write_report

    with stderr.status("starting") as status:
        profile = profile_onnx(model, report, lambda step: status.update(step))
    write_report(output, profile.to_dict())
    if as_json:
        return
    for name, phase in (("prefill", profile.prefill), ("decode", profile.decode)):
        stdout.print(f"\n{name}", markup=False)
        _finish_table({}, False, PROFILE_COLUMNS, phase.rows())
    _finish({}, False, profile.rows())


def _export_onnx(
    checkpoint: Path,
    output: Path,
    target: TargetName,
    kernel: KernelName,
    keep: tuple[AdapterChoice, ...],
    model: str | None,
    as_json: bool,
) -> None:
    """Export to ONNX."""
    from deploy.encoder_export import export_encoder
    from deploy.export import Target, export_onnx
    from deploy.kernels import Kernel
    from deploy.model_location import is_encoder

    encoder = is_encoder(checkpoint)
    if encoder and (keep or model):
        raise ConfigError(
            f"{checkpoint}: --keep-adapter and --model are for decoders; merge an "
            f"encoder's adapter with rolora merge-rotate-quantize --adapter"
        )
    with stderr.status("starting") as status:
        chosen = (checkpoint, output, Target(target), Kernel(kernel))
        report = (
            export_encoder(*chosen, status.update)
            if encoder
            else export_onnx(*chosen, status.update, keep=keep, model=model)
        )
    result = report.to_dict()
    parity = result["parity"]
    following = f"rolora run --model {_quoted(output)} --chat --prompt ..."
    error, bound = parity["hidden_error" if encoder else "prefill_error"], parity["bound"]
    if encoder:
        classifies = parity["head_error"] is not None
        command = "evaluate --tasks classification" if classifies else "bench"
        data = " --data ..." if classifies else ""
        following = f"rolora {command} --model {_quoted(output)}{data}"
    elif Kernel(kernel) is Kernel.NBITS:  # which rounds inputs itself, and finer
        error, bound = parity["float_activation_error"], parity["float_activation_bound"]
    _finish(
        result,
        as_json,
        [
            ("export", str(output)),
            ("size", _megabytes(result["file_bytes"])),
            ("nodes", str(sum(result["operators"].values()))),
            *(
                [("not run", where)]
                if (where := (result["verified_on"] or {}).get("not_run"))
                else []
            ),
            ("parity", f"{error:.2e}, bound {bound:.2e}"),
            *(
                (
                    f"adapter {name}",
                    f"changes logits by {found['adapter_effect']:.2e}; parity "
                    f"{found['prefill_error']:.2e}, bound {found['bound']:.2e}",
                )
                for name, found in (result["adapters"] or {}).items()
            ),
            ("peak memory", _megabytes(report.peak_memory_bytes)),
            ("next", following),
        ],
    )


def _export_compressed(checkpoint: Path, output: Path, as_json: bool) -> None:
    """Export to compressed-tensors, and warn where a reader has something to do."""
    from deploy.compressed_card import TRANSFORM_WARNING
    from deploy.compressed_export import export_compressed

    with stderr.status("starting") as status:
        report = export_compressed(checkpoint, output, lambda step: status.update(step))
    result = report.to_dict()
    reader = result["reader"]
    _finish(
        result,
        as_json,
        [
            ("export", str(output)),
            ("size", _megabytes(result["file_bytes"])),
            *result["groups"].items(),
            ("as transformers reads it", f"{reader['error']:.2e}, bound {reader['bound']:.2e}"),
            ("to our own scales", f"{reader['scale_choice_error']:.2e}"),
            ("peak memory", _megabytes(report.peak_memory_bytes)),
            ("next", f"rolora evaluate --model {_quoted(output)} --tasks ppl --data ..."),
        ],
    )
    if report.needs_transform:
        stderr.print(
            f"warning: {TRANSFORM_WARNING} {output}/README.md shows how to apply it. For a model "
            f"that every program reads: rolora merge-rotate-quantize --rotate r1,r2",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def _evaluate_classification(
    model: str, adapter: Path | None, data: str, threads: int | None, as_json: bool
) -> None:
    """Measure an encoder on labelled rows."""
    from deploy.classify import evaluate_on_rows

    with stderr.status("loading") as status:
        summary = evaluate_on_rows(
            model,
            adapter,
            data,
            lambda done, total: status.update(f"row {done} of {total}"),
            threads=threads,
        )
    results = summary["results"]
    _finish(summary, as_json, [(name, f"{value:.6g}") for name, value in results.items()])


class _bad_values:
    """Turn the ValueError of an option's value into an error of the command line."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, ValueError):
            raise ConfigError(str(error)) from error


def _layer_bar() -> Progress:
    """Return a bar for work that goes layer by layer."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    )


def _log_step(line: str) -> None:
    """Log a step; of several processes only the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("rolora").info(line)


def _finish(result: dict[str, Any], as_json: bool, rows: list[tuple[str, str]]) -> None:
    """Print a result: as JSON, or as a table of names and values."""
    if as_json:
        _print_json(result)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    stdout.print(table, markup=False)


def _finish_table(
    result: dict[str, Any],
    as_json: bool,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    legend: str = "",
) -> None:
    """Print a result: as JSON, or as a table with a head and a legend."""
    if as_json:
        _print_json(result)
        return
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    stdout.print(table, markup=False)
    if legend:
        stdout.print(legend, markup=False)


def _print_json(result: dict[str, Any]) -> None:
    stdout.out(json.dumps(result, indent=2, default=str), highlight=False)


def _quoted(path: Path | str) -> str:
    """Return a path as a command line takes it."""
    return shlex.quote(str(path))


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def main() -> NoReturn:
    """Run the command line; a user's fault becomes a message, a bug a traceback."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=stderr, show_path=False, markup=False)],
    )
    for noisy in ("httpx", "datasets", "transformers", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except RoloraError as error:
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            stderr.print("interrupted; nothing half-written is left", markup=False)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
