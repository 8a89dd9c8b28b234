"""Quantization-aware training: an adapter that learns inside a quantized checkpoint.

A checkpoint of `merge-rotate-quantize`, the start, says everything about the format: rotation, bit
widths, granularities, embedding and head. Its linears are set up to round in every forward pass
(`rolora.quantization_aware`), with the adapter's change in their weights (`reslora.inside_weight`).
The adapter and all scales learn, from the task's labels or from the float model's predictions on
the same tokens. What was trained is packed by setting the same modules up again and reading their
integers, so both are the same by construction.

    build_aware_model   the start + a float model -> a model that trains through its rounding
    packed_model        the same, trained -> the model of the new checkpoint
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deploy.architecture import decoder_names
from deploy.checkpoint import Checkpoint
from deploy.conventions import conventions
from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.loading import LoadedModel
from deploy.rotate import rotate_model
from reslora.attach import attach_adapters
from reslora.batches import IGNORED
from reslora.config import AdapterConfig
from reslora.inside_weight import WeightChange, put_inside_weights, require_inside_weight
from reslora.training_extension import TrainingExtension
from rolora.blocks import readers_by_linear
from rolora.decoder import DecoderNames
from rolora.equalization import Equalized
from rolora.fold import untie_head
from rolora.head_loss import Head, cross_entropy, divergence
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.online import install_online_rotations
from rolora.quantization_aware import InputQuantizer, QuantizationAwareLinear

SCALES_FILE = "quantization.safetensors"
"""Beside an adapter that was trained through rounding: the scales that were trained with it."""


class LearnFrom(StrEnum):
    """What quantization-aware training learns from."""

    TEACHER = "teacher"
    """The float model's predictions on the same tokens (KL divergence, LLM-QAT)."""
    LABELS = "labels"
    """The tokens of the data (cross-entropy), as training without quantization does."""


@dataclass(frozen=True)
class AwareModel:
    """A model that rounds as its start does, ready to be trained or packed."""

    peft_model: PeftModel
    start: Checkpoint
    names: DecoderNames
    layers: Mapping[str, QuantizationAwareLinear]
    """FQN to every quantized linear of the blocks."""
    head: QuantizedLinear | nn.Linear
    """The start's; its place in the model is taken by its input quantizer."""
    head_input: InputQuantizer | None

    def scales(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters beside the adapter, by name; each once."""
        found: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        quantizers = {fqn: layer.input_quantizer for fqn, layer in self.layers.items()}
        if self.head_input is not None:
            quantizers[self.names.head] = self.head_input
        for fqn, layer in self.layers.items():
            found[f"{fqn}.weight_scale"] = layer.log_factor
        for fqn, quantizer in quantizers.items():
            if quantizer.log_factor.requires_grad and id(quantizer) not in seen:
                seen.add(id(quantizer))
                found[f"{fqn}.input"] = quantizer.log_factor
        return found


def open_start(directory: Path, loaded: LoadedModel) -> Checkpoint:
    """Open the checkpoint that quantization-aware training starts from.

    Raises:
        ArtifactError: It is damaged, or of another model.
        StageOrderError: It is no checkpoint.
        ConfigError: Nothing in it is quantized, or it holds an adapter.
    """
    start = Checkpoint(directory)
    parents = start.manifest.parents
    if parents.get("model") != loaded.digest:
        raise ArtifactError(
            f"{directory}: was made of {start.manifest.config.get('model')} (digest "
            f"{str(parents.get('model'))[:12]}), but the model given is {loaded.name} (digest "
            f"{loaded.digest[:12]}); give the model it was made of"
        )
    if (
        "adapter" in parents and "start" not in parents
    ):  # a packed one is of the model's own weights
        raise ConfigError(
            f"{directory}: holds a merged adapter, and quantization-aware training needs the float "
            "weights it was rounded from; write the merged model with rolora merge --to model, "
            "quantize that, and start from the result"
        )
    if not start.manifest.details.get("linears"):
        raise ConfigError(
            f"{directory}: nothing in it is quantized (scheme "
            f"{start.manifest.details.get('scheme')}); quantize with W4A4, W4A8 or W8A8 first"
        )
    return start


def build_aware_model(
    loaded: LoadedModel,
    start: Checkpoint,
    config: AdapterConfig,
    targets: list[str],
    *,
    seed: int,
) -> AwareModel:
    """Turn a float model into one that rounds like the start and carries a fresh adapter.

    Args:
        loaded: The start's model, in its own basis; changed in place.
        start: See `open_start`.
        config: The adapter: plain LoRA or structure block, without dropout.
        targets: FQNs of the adapted linears, all of them quantized in the start.
        seed: Of the adapter's A matrices.

    Raises:
        ConfigError: The adapter's structure does not fit, or a target is not quantized.
        ArtifactError: The start does not fit the model.
    """
    names = decoder_names(loaded.model.config)
    if conventions(loaded.model.config).logit_cap is not None:
        raise UnsupportedModelError(
            f"{loaded.name}: caps its logits by a tanh (final_logit_softcapping), and quantization-"
            f"aware training computes its loss at the head without one; train it on float weights, "
            f"without --start"
        )
    try:
        require_inside_weight(config)
    except ValueError as error:
        raise ConfigError(f"quantization-aware training: {error}") from error
    quantized = start.load_model()
    _require_quantized(start, quantized, targets)
    _require_one_basis(start, config, targets, names)
    with torch.no_grad():
        if start.rotation is not None:
            rotate_model(loaded, names, start.rotation)
        else:
            untie_head(loaded.model, names)
    model = loaded.model
    readers = readers_by_linear(names)
    inputs: dict[str, InputQuantizer] = {}
    layers: dict[str, QuantizationAwareLinear] = {}

    def aware(fqn: str, base: nn.Linear, change: WeightChange | None) -> nn.Module:
        theirs = quantized.get_submodule(fqn)
        if not isinstance(theirs, QuantizedLinear):
            return base
        shared = inputs.setdefault(
            readers[fqn][0], InputQuantizer(theirs.activation, theirs.input_scale)
        )
        layers[fqn] = QuantizationAwareLinear(base.weight, theirs, shared, change)
        return layers[fqn]

    try:
        peft_model = attach_adapters(model, config, targets, seed=seed)
        put_inside_weights(peft_model, aware)
        for fqn in names.linears():
            linear = model.get_submodule(fqn)
            if type(linear) is nn.Linear:
                model.set_submodule(fqn, aware(fqn, linear, None))
    except ValueError as error:
        raise ConfigError(f"quantization-aware training: {error}") from error
    embedding = quantized.get_submodule(names.embedding)
    if isinstance(embedding, QuantizedEmbedding):
        model.set_submodule(names.embedding, embedding)
    head = quantized.get_submodule(names.head)
    head_input = None
    if isinstance(head, QuantizedLinear):
        head_input = InputQuantizer(head.activation, head.input_scale)
    elif not isinstance(head, nn.Linear):
        raise TypeError(f"{names.head}: expected a linear, got {type(head).__name__}")
    # The loss is computed at the head: in its place stands what happens to its input.
    model.set_submodule(names.head, nn.Identity() if head_input is None else head_input)
    if start.rotation is not None:
        install_online_rotations(peft_model, start.rotation, names)
    return AwareModel(peft_model, start, names, layers, head, head_input)


def training_extension(
    aware: AwareModel, teacher: PreTrainedModel | None, dtype: torch.dtype
) -> TrainingExtension:
    """Return the loss of the rounded model, and the scales that learn with the adapter.

    Args:
        aware: The model.
        teacher: A float model to learn from; None learns from the labels.
        dtype: Of the products with the head.
    """
    loss = _HeadObjective(aware, teacher, dtype)
    identity = {
        "start": aware.start.manifest.digest,
        "learn_from": str(LearnFrom.LABELS if teacher is None else LearnFrom.TEACHER),
    }
    return TrainingExtension(loss, aware.scales(), identity)


def make_teacher(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Copy a float model as it is now, to be learned from."""
    teacher = copy.deepcopy(model)
    nn.Module.to(teacher, dtype=dtype)
    teacher.requires_grad_(False)
    teacher.eval()
    return teacher


class _HeadObjective:
    """Mean loss of the learned tokens, computed at the head (`rolora.head_loss`)."""

    def __init__(
        self, aware: AwareModel, teacher: PreTrainedModel | None, dtype: torch.dtype
    ) -> None:
        head = aware.head
        weight = head.dequantized_weight() if isinstance(head, QuantizedLinear) else head.weight
        self._head = Head(weight.detach().to(dtype), head.bias)
        self._teacher = teacher
        if teacher is not None:
            their_head = teacher.get_submodule(aware.names.head)
            assert isinstance(their_head, nn.Linear)
            self._teacher_head = Head(their_head.weight, their_head.bias)
            teacher.set_submodule(aware.names.head, nn.Identity())

    def __call__(
        self, model: nn.Module, inputs: Mapping[str, Any], items: Tensor | int | None
    ) -> Tensor:
        fed = {name: value for name, value in inputs.items() if name != "labels"}
        labels = inputs["labels"][:, 1:]
        learned = labels != IGNORED
        hidden = model(**fed).logits[:, :-1][learned]
        if self._teacher is None:
            mean = cross_entropy(hidden.float(), self._head, labels[learned])
        else:
            with torch.no_grad():
                theirs = self._teacher(**fed).logits[:, :-1][learned]
            mean = divergence(hidden.float(), self._head, theirs, self._teacher_head)
        return mean if items is None else mean * (learned.sum() / items)


def save_scales(aware: AwareModel, directory: Path) -> None:
    """Write the trained scales beside the adapter."""
    tensors = {name: each.detach().cpu().clone() for name, each in aware.scales().items()}
    save_file(tensors, directory / SCALES_FILE)


def restore_scales(aware: AwareModel, directory: Path) -> None:
    """Read trained scales back, in place.

    Raises:
        ArtifactError: The file is missing, damaged, or of another start.
    """
    path = directory / SCALES_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {error}; train the adapter again") from error
    scales = aware.scales()
    wanted = {name: tuple(each.shape) for name, each in scales.items()}
    if wanted != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ArtifactError(f"{path}: scales of another checkpoint than the start given")
    for name, parameter in scales.items():
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ArtifactError(f"{path}: {name} is not finite; train with a lower learning rate")
        parameter.data.copy_(tensors[name])


@torch.no_grad()
def packed_model(aware: AwareModel) -> PreTrainedModel:
    """Return the start's model with the integers, scales and clip ratios that were trained."""
    model = aware.start.load_model()
    for fqn, layer in aware.layers.items():
        _replace(model, fqn, layer.integers(), layer.scale(), layer.input_quantizer)
    if aware.head_input is not None and isinstance(aware.head, QuantizedLinear):
        head = aware.head
        _replace(model, aware.names.head, head.weight, head.weight_scale, aware.head_input)
    return model


def _replace(
    model: PreTrainedModel, fqn: str, q: Tensor, scale: Tensor, quantizer: InputQuantizer
) -> None:
    old = model.get_submodule(fqn)
    assert isinstance(old, QuantizedLinear)
    new = QuantizedLinear(
        q.cpu(),
        scale.detach().cpu().clone(),
        old.bias,
        old.weight_spec,
        quantizer.trained_spec(),
        quantizer.value().detach().cpu().clone() if quantizer.static else None,
    )
    for hook in old._forward_pre_hooks.values():
        new.register_forward_pre_hook(hook)
    model.set_submodule(fqn, new)


def _require_quantized(start: Checkpoint, quantized: nn.Module, targets: list[str]) -> None:
    floats = [
        fqn for fqn in targets if not isinstance(quantized.get_submodule(fqn), QuantizedLinear)
    ]
    if floats:
        raise ConfigError(
            f"{start.directory}: {floats[0]} is not quantized there, so no adapter can learn to be "
            "rounded in it; leave it out of --targets"
        )


def _require_one_basis(
    start: Checkpoint, config: AdapterConfig, targets: list[str], names: DecoderNames
) -> None:
    """Refuse a shortcut between layers whose R2 or scales differ (see `adapter_basis`)."""
    plan = start.rotation
    if config.reach == 0 or plan is None:
        return
    around_values = {fqn for block in names.blocks for fqn in (block.value, block.output)}
    if plan.equalization is not None:
        mixed, left_out = set(names.linears()), ""
        if plan.equalization.inputs is Equalized.INNER:
            mixed = {fqn for block in names.blocks for fqn in (block.up, block.down)}
            mixed |= around_values
            left_out = "leave v, o, up and down out of --targets, "
        if clash := sorted(mixed & set(targets)):
            raise ConfigError(
                f"{start.directory}: every layer has channel scales of its own, and a shortcut at "
                f"{clash[0]} would mix their bases; quantize the start with --equalize none, "
                f"{left_out}or train without --structure"
            )
    if plan.r2 is None or all(torch.equal(plan.r2[0].dense(), each.dense()) for each in plan.r2):
        return
    if clash := sorted(around_values & set(targets)):
        raise ConfigError(
            f"{start.directory}: every layer has an R2 of its own, and a shortcut at {clash[0]} "
            "would mix their bases; quantize the start with --rotate r1,r4, or leave v and o out "
            "of --targets"
        )
