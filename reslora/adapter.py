"""An adapter on disk and in memory.

The format is PEFT's (`adapter_config.json`, `adapter_model.safetensors`, keys
`base_model.model.<fqn>.lora_A.weight`), so a plain LoRA adapter made here loads in PEFT and one
made by PEFT loads here. An adapter with a shortcut has `peft_type` RESLORA and the keys `structure`
and `depth`: PEFT refuses it, where reading it as a LoRA would silently drop the shortcut.
An adapter for classification (`task_type` SEQ_CLS) holds the trained head too (`reslora.head`).

Loading trusts nothing: every tensor is checked against the configuration before it is handed out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reslora.attach import ADAPTER_NAME, PEFT_INITIALIZATIONS, RESLORA_TYPE, attached_config
from reslora.config import AdapterConfig, Initialization, Structure
from reslora.head import (
    HEAD_NAMES,
    require_head,
    trained_head_parameters,
    trained_head_tensors,
    write_head,
)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

KEY_PREFIX = "base_model.model."
_SIDES = ("lora_A", "lora_B")
_CLASSIFICATION = "SEQ_CLS"
_FOREIGN_OPTIONS = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
"""PEFT options that change what the tensors mean; an adapter that uses one is refused."""
_HARMLESS_STARTS = (None, False, "eva", "mica")
"""Values of PEFT's `init_lora_weights` that we do not offer, but that leave the base weight alone:
once trained, such an adapter is LoRA like any other."""


@dataclass(frozen=True)
class Adapter:
    """Trained blocks: what they mean and their factors."""

    config: AdapterConfig
    factors: dict[str, tuple[Tensor, Tensor]]
    """FQN of the linear to (A [rank, in], B [out, rank])."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """FQN to tensor of a trained classification head; empty for a language model."""

    @property
    def head_name(self) -> str | None:
        """Name of the module that `head` belongs to; None for a language model."""
        return next((name.partition(".")[0] for name in self.head), None)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return FQN to (out_features, in_features) of the linears the adapter was trained on."""
        return {fqn: (b.shape[0], a.shape[1]) for fqn, (a, b) in self.factors.items()}


def adapter_tensors(peft_model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's file keys, on the CPU.

    Args:
        peft_model: A model made by `attach_adapters`.
    """
    suffix = f".{ADAPTER_NAME}.weight"
    named = list(peft_model.named_parameters())
    blocks = {
        name.removesuffix(suffix) + ".weight": tensor.detach().to("cpu").contiguous()
        for name, tensor in named
        if name.endswith(suffix) and any(f".{side}." in name for side in _SIDES)
    }
    return blocks | trained_head_tensors(named, ADAPTER_NAME)


def save_adapter(peft_model: PeftModel, config: AdapterConfig, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `directory`.

    Args:
        peft_model: A model made by `attach_adapters`.
        config: The configuration it was attached with.
        directory: Created if missing.

    Raises:
        ValueError: The model was attached with another configuration, or a tensor is not finite;
            nothing is written.
    """
    held = attached_config(peft_model)
    if held != config:
        raise ValueError(
            f"cannot save adapter: model was attached with {held}, asked to save {config}"
        )
    tensors = adapter_tensors(peft_model)
    for key, tensor in tensors.items():
        _refuse_non_finite(
            tensor, key, "trained adapter", "lower the learning rate and train again"
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    peft_config = peft_model.peft_config[ADAPTER_NAME].to_dict()
    text = json.dumps(plain_json({**peft_config, "inference_mode": True}), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def load_adapter(directory: Path) -> Adapter:
    """Read an adapter written by `save_adapter`, or a plain LoRA adapter written by PEFT.

    Raises:
        ValueError: A file is missing or damaged, the adapter is of a kind this package cannot merge
            exactly, or a tensor is missing, of wrong shape or not finite. The message names file
            and key.
    """
    values = _read_config_file(directory / CONFIG_FILE)
    config = _parse_config(values, directory / CONFIG_FILE)
    path = directory / WEIGHTS_FILE
    tensors = _read_tensors(path)
    pairs: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    classifies = values.get("task_type") == _CLASSIFICATION
    for key, tensor in tensors.items():
        _refuse_non_finite(tensor, key, str(path), "the training run diverged: train again")
        name = key.removeprefix(KEY_PREFIX)
        if classifies and name != key and name.partition(".")[0] in HEAD_NAMES:
            head[name] = tensor
            continue
        fqn, side = _parse_key(key, path)
        pairs.setdefault(fqn, {})[side] = tensor
    if not pairs:
        raise ValueError(f"{path}: holds no adapter tensors; train the adapter again")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for fqn, pair in pairs.items():
        for side in _SIDES:
            if side not in pair:
                raise ValueError(f"{path}: key {tensor_key(fqn, side)} is missing")
        a, b = pair["lora_A"], pair["lora_B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != config.rank or b.shape[1] != config.rank:
            raise ValueError(
                f"{path}: {fqn}: expected lora_A [{config.rank}, in] and lora_B [out, "
                f"{config.rank}] as {CONFIG_FILE} says, got {list(a.shape)} and {list(b.shape)}"
            )
        factors[fqn] = (a, b)
    if classifies and len({name.partition(".")[0] for name in head}) != 1:
        raise ValueError(
            f"{path}: task_type is {_CLASSIFICATION}: expected the tensors of one classification "
            f"head, {' or '.join(HEAD_NAMES)}, got {', '.join(sorted(head)) or 'none'}"
        )
    return Adapter(config, factors, head)


def restore_adapter(peft_model: PeftModel, directory: Path) -> None:
    """Load a saved adapter's tensors back into the attached model they came from.

    Raises:
        ValueError: As `load_adapter`; or the adapter's configuration or layers are not the model's.
            The model is unchanged then.
    """
    adapter = load_adapter(directory)
    held = attached_config(peft_model)
    if adapter.config != held:
        raise ValueError(f"{directory}: adapter has {adapter.config}, the model has {held}")
    base = peft_model.get_base_model()
    layers: dict[str, Any] = {
        name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)
    }
    if layers.keys() != adapter.factors.keys():
        differing = sorted(layers.keys() ^ adapter.factors.keys())
        raise ValueError(f"{directory}: adapter and model differ in layers: {differing[:5]}")
    for fqn, (a, b) in adapter.factors.items():
        layer = layers[fqn]
        expected = (layer.out_features, layer.in_features)
        if (b.shape[0], a.shape[1]) != expected:
            raise ValueError(
                f"{directory}: {fqn}: adapter is for a linear {[b.shape[0], a.shape[1]]}, "
                f"the model's is {list(expected)}"
            )
    head = trained_head_parameters(base, ADAPTER_NAME)
    require_head(str(directory), adapter.head, head)
    write_head(head, adapter.head)
    with torch.no_grad():
        for fqn, (a, b) in adapter.factors.items():
            layers[fqn].lora_A[ADAPTER_NAME].weight.copy_(a)
            layers[fqn].lora_B[ADAPTER_NAME].weight.copy_(b)


def tensor_key(fqn: str, side: str) -> str:
    """Return PEFT's file key of a factor; side is `lora_A` or `lora_B`."""
    return f"{KEY_PREFIX}{fqn}.{side}.weight"


def _read_config_file(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; expected an adapter directory") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: unreadable ({error}); train or copy the adapter again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _parse_config(values: Mapping[str, Any], path: Path) -> AdapterConfig:
    kind = values.get("peft_type")
    if kind not in ("LORA", RESLORA_TYPE):
        raise ValueError(f"{path}: peft_type is {kind!r}, expected 'LORA' or '{RESLORA_TYPE}'")
    foreign = [name for name in _FOREIGN_OPTIONS if values.get(name)]
    saved = values.get("modules_to_save")
    if (
        values.get("task_type") == _CLASSIFICATION
        and isinstance(saved, list)
        and set(map(str, saved)) <= set(HEAD_NAMES)
        and "modules_to_save" in foreign
    ):
        foreign.remove("modules_to_save")  # the head: see reslora.head
    if values.get("bias", "none") != "none":
        foreign.append("bias")
    if foreign:
        raise ValueError(
            f"{path}: uses PEFT options that are not supported here: {', '.join(foreign)}; "
            "merge it with PEFT and use the merged model"
        )
    try:
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        dropout = float(values.get("lora_dropout") or 0.0)
        more: Any = {
            "rslora": bool(values.get("use_rslora")),
            "initialization": _read_initialization(values.get("init_lora_weights")),
        }
        if kind == "LORA":
            return AdapterConfig(rank, alpha, dropout, **more)
        structure = Structure(values["structure"])
        return AdapterConfig(rank, alpha, dropout, structure, int(values["depth"]), **more)
    except KeyError as error:
        raise ValueError(f"{path}: key {error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_initialization(value: Any) -> Initialization:
    for name, theirs in PEFT_INITIALIZATIONS.items():
        if type(value) is type(theirs) and value == theirs:
            return name
    if value in _HARMLESS_STARTS:
        return Initialization.DEFAULT
    raise ValueError(
        f"init_lora_weights is {value!r}, which trains against a changed base weight, so the "
        "tensors are no change of the model you have; save it with PEFT's "
        "path_initial_model_for_weight_conversion, or merge it with PEFT and use the merged model"
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: missing; an adapter needs it beside {CONFIG_FILE}")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error}); copy or train the adapter again") from None


def _parse_key(key: str, path: Path) -> tuple[str, str]:
    for side in _SIDES:
        suffix = f".{side}.weight"
        if key.startswith(KEY_PREFIX) and key.endswith(suffix):
            return key.removeprefix(KEY_PREFIX).removesuffix(suffix), side
    raise ValueError(
        f"{path}: unexpected key {key!r}, expected {KEY_PREFIX}<module>.lora_A|lora_B.weight; "
        "adapters that train anything else are not supported"
    )


def _refuse_non_finite(tensor: Tensor, key: str, where: str, advice: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{where}: {key} has dtype {tensor.dtype}, expected a float")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{where}: {key} holds {bad} NaN or infinite values; {advice}")


def plain_json(value: Any) -> Any:
    """Turn sets into sorted lists, so that the same adapter gives the same bytes."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
