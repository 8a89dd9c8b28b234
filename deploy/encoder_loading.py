"""Load an encoder, with the care of `loading`: nothing missing but, for classification, the head.

Sources are a hub id, a local directory, and the name `minilm-l6`, whose directory comes in a Python
package. A classification head that the files lack, or that is for another number of labels, is
drawn anew from a seed. Heads of pretraining are left out. An encoder that is taken as it is has a
head if its files hold one; without one it is bare, and without its pooler, which nothing reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from deploy.encoder_architecture import (
    ENCODER_HEAD,
    check_encoder,
    encoder_family_of,
    encoder_token_limit,
)
from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.loading import (
    LoadedModel,
    call_loader,
    load_local_tokenizer,
    quiet_transformers,
    refuse_departures,
    refuse_non_finite,
    refuse_other_stages,
    refuse_quantized,
)
from deploy.model_location import DEMO_ENCODER, DEMO_MODEL, HUB_ID, download_model
from deploy.weight_files import (
    CONFIG_NAME,
    digest_model,
    find_demo_encoder,
    find_weight_files,
    name_some,
    read_model_config,
    read_tensor_names,
)
from reslora.labelled_rows import LabelScheme

LOCAL_OPTIONS = f"a model directory or {DEMO_ENCODER}"
REGRESSION = "regression"
CLASSES = "single_label_classification"


@dataclass(frozen=True)
class LoadedClassifier:
    """An encoder with a classification head, in evaluation mode."""

    loaded: LoadedModel
    labels: LabelScheme
    """What its logits mean, in their order."""
    head_is_new: bool
    """Whether the head, or a tensor of it, was drawn instead of read."""

    @property
    def token_limit(self) -> int:
        """How many tokens it reads at most."""
        return encoder_token_limit(self.loaded.model.config)


def load_classifier(
    reference: str | Path,
    labels: LabelScheme | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LoadedClassifier:
    """Load an encoder and its tokenizer.

    Args:
        reference: hub id, local directory, or `minilm-l6`. The network is used for a hub id only.
        labels: what the logits shall mean; where the model has classes of these very names, in its
            order. None takes the model's own labels and needs its head.
        seed: of a new head; the global generator is left as it was.
        dtype: of the weights in memory, whatever they are on disk.

    Raises:
        ConfigError: nothing is there, the hub cannot be reached, or the weights are a pickle.
        StageOrderError: the directory is an adapter or one of our artifacts.
        ArtifactError: a file is missing or damaged, or the weights do not fit the config.
        UnsupportedModelError: a decoder, another family, or a feature we do not handle.
    """
    directory, name = _locate(str(reference))
    return _load_directory(directory, name, labels, seed, dtype)


def load_encoder(
    reference: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[LoadedModel, LabelScheme | None]:
    """Load an encoder as it is: with the classification head that its files hold, else bare.

    Args:
        reference: as `load_classifier` takes it.
        dtype: of the weights in memory, whatever they are on disk.

    Returns:
        The model, and what its logits mean; None where it gives hidden states.

    Raises:
        As `load_classifier`.
    """
    directory, name = _locate(str(reference))
    weight_files = _check_directory(directory)
    held = set().union(*map(read_tensor_names, weight_files))
    if any(key.startswith(f"{ENCODER_HEAD}.") for key in held):
        opened = _load_directory(directory, name, None, 0, dtype)
        return opened.loaded, opened.labels
    return _load_bare(directory, name, weight_files, dtype), None


def save_classifier(loaded: LoadedModel, directory: Path) -> None:
    """Write a plain Hugging Face directory, which AutoModelForSequenceClassification loads."""
    with quiet_transformers():
        loaded.model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)


def _locate(text: str) -> tuple[Path, str]:
    """Return the directory of an encoder, which for a hub id is downloaded, and its name."""
    path = Path(text).expanduser()
    if text == DEMO_MODEL or path.suffix == ".gguf":
        raise UnsupportedModelError(
            f"model {text}: is a decoder, or in a file format of decoders; --task classification "
            f"takes an encoder: {LOCAL_OPTIONS}, or a hub id"
        )
    if text == DEMO_ENCODER:
        return find_demo_encoder(), text
    if path.is_dir():
        return path, path.resolve().name
    if path.exists() or not HUB_ID.fullmatch(text):
        raise ConfigError(f"model {text}: no such directory; give {LOCAL_OPTIONS}, or a hub id")
    return download_model(text), text


def _check_directory(directory: Path) -> list[Path]:
    """Return the weight files of a float encoder, each opened once."""
    refuse_other_stages(directory)
    raw_config = read_model_config(directory)
    encoder_family_of(str(raw_config.get("model_type")), str(directory))
    refuse_quantized(directory, raw_config)
    return find_weight_files(directory)


def _load_bare(
    directory: Path, name: str, weight_files: list[Path], dtype: torch.dtype
) -> LoadedModel:
    """Load an encoder without head and pooler."""
    where = str(directory)
    with quiet_transformers():
        config = call_loader(where, AutoConfig.from_pretrained, directory)
        check_encoder(config)
        model, info = call_loader(
            where,
            AutoModel.from_pretrained,
            directory,
            config=config,
            add_pooling_layer=False,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the other faults
            use_safetensors=True,
        )
    family = encoder_family_of(config.model_type)
    unread = (*family.other_heads, "pooler.", f"{config.model_type}.pooler.")
    unexpected = {key for key in info["unexpected_keys"] if not key.startswith(unread)}
    refuse_departures(where, {**info, "unexpected_keys": unexpected})
    refuse_non_finite(where, model)
    return _with_tokenizer(directory, name, weight_files, model)


def _with_tokenizer(
    directory: Path, name: str, weight_files: list[Path], model: PreTrainedModel
) -> LoadedModel:
    tokenizer = load_local_tokenizer(directory)
    if model.config.type_vocab_size < 2:  # it cannot tell texts of a pair apart by an id
        tokenizer.model_input_names = [
            key for key in tokenizer.model_input_names if key != "token_type_ids"
        ]
    return LoadedModel(model.eval(), tokenizer, name, *digest_model(directory, weight_files))


def _load_directory(
    directory: Path, name: str, labels: LabelScheme | None, seed: int, dtype: torch.dtype
) -> LoadedClassifier:
    weight_files = _check_directory(directory)
    with quiet_transformers():
        own = call_loader(str(directory), AutoConfig.from_pretrained, directory)
        check_encoder(own)
        needs_head = labels is None
        labels = _own_labels(own, str(directory)) if labels is None else _ordered(labels, own)
        config = call_loader(
            str(directory), AutoConfig.from_pretrained, directory, **_label_options(labels)
        )
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model, info = call_loader(
                str(directory),
                AutoModelForSequenceClassification.from_pretrained,
                directory,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are reported with the other faults
                use_safetensors=True,
            )
    head = {f"{ENCODER_HEAD}.{key}" for key in model.get_submodule(ENCODER_HEAD).state_dict()}
    new_head = _refuse_departures_but_head(str(directory), config, info, head)
    if new_head and needs_head:
        raise ConfigError(
            f"{directory}: holds an encoder without a classification head; give the adapter that "
            "was trained on it, or a merged model"
        )
    refuse_non_finite(str(directory), model)
    loaded = _with_tokenizer(directory, name, weight_files, model)
    return LoadedClassifier(loaded, labels, bool(new_head))


def _refuse_departures_but_head(
    where: str, config: PreTrainedConfig, info: dict[str, Any], head: set[str]
) -> set[str]:
    """Return the head's tensors that the files do not give; refuse every other departure."""
    other_heads = encoder_family_of(config.model_type).other_heads
    missing = set(info["missing_keys"]) & head
    mismatched = {key for key, _, _ in info["mismatched_keys"]} & head
    if missing and missing != head:
        raise ArtifactError(
            f"{where}: weights do not fit {CONFIG_NAME}: the files lack {name_some(missing)} of a "
            "classification head they hold in part"
        )
    refuse_departures(
        where,
        {
            "missing_keys": set(info["missing_keys"]) - head,
            "unexpected_keys": {
                key for key in info["unexpected_keys"] if not key.startswith(other_heads)
            },
            "mismatched_keys": [
                fault for fault in info["mismatched_keys"] if fault[0] not in mismatched
            ],
        },
    )
    return missing | mismatched


def _label_options(labels: LabelScheme) -> dict[str, Any]:
    names = labels.names or ("LABEL_0",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": REGRESSION if labels.is_regression else CLASSES,
    }


def _own_labels(config: PreTrainedConfig, where: str) -> LabelScheme:
    problem = config.problem_type or (REGRESSION if config.num_labels == 1 else CLASSES)
    if problem not in (REGRESSION, CLASSES) or (problem == REGRESSION and config.num_labels != 1):
        raise UnsupportedModelError(
            f"{where}: problem_type is {problem!r} with {config.num_labels} labels, expected "
            f"{CLASSES!r}, or {REGRESSION!r} with one"
        )
    if problem == REGRESSION:
        return LabelScheme(())
    return LabelScheme(_class_names(config))


def _ordered(labels: LabelScheme, config: PreTrainedConfig) -> LabelScheme:
    """Return labels in the model's own order where it has the same ones."""
    own = _class_names(config)
    return LabelScheme(own) if set(own) == set(labels.names) else labels


def _class_names(config: PreTrainedConfig) -> tuple[str, ...]:
    names: Any = config.id2label or {}
    return tuple(str(names.get(index)) for index in range(len(names)))
