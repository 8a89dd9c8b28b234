"""Load a causal language model from wherever the user keeps it, or say exactly what is wrong.

Four sources become the same `LoadedModel`: a hub id, a local directory, a GGUF file, and the name
`smollm2-135m`, whose file comes in a Python package. Weights are safetensors or GGUF, never
pickles, and no code from a model directory is run. A tensor that is missing, misshapen, unknown or
not finite is an error, since transformers would go on with random or dropped weights.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from deploy.architecture import decoder_names
from deploy.artifact import (
    MANIFEST_NAME,
    TAKEN_BY,
    ArtifactKind,
    is_artifact,
    read_manifest,
    verify_files,
)
from deploy.errors import ArtifactError, StageOrderError, UnsupportedModelError
from deploy.families import family_of
from deploy.gguf_files import check_gguf
from deploy.model_location import locate_model
from deploy.module_layout import to_our_layout
from deploy.weight_files import (
    CONFIG_NAME,
    digest_files,
    digest_model,
    find_weight_files,
    name_some,
    read_model_config,
)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """How to call it in a table."""
    digest: str
    """The sha256 over the names and contents of its weight files and config.json."""
    text_digest: str | None = None
    """Likewise of tokenizer, chat template and generation config; None of a GGUF file, where the
    other digest counts them."""

    def parents(self) -> dict[str, str]:
        """Return the digests for the manifest of what is made from the model."""
        text = {} if self.text_digest is None else {"tokenizer": self.text_digest}
        return {"model": self.digest} | text


def load_model(reference: str | Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        reference: hub id, local directory, `.gguf` file, or `smollm2-135m`. The network is used for
            a hub id only.
        dtype: of the weights in memory, whatever they are on disk.

    Raises:
        ConfigError: nothing is there, the hub cannot be reached, or the weights are a pickle.
        StageOrderError: the directory is an adapter, or an artifact of ours that is no model.
        ArtifactError: a file is missing or damaged, or the weights do not fit the config.
        UnsupportedModelError: another family, a feature we do not handle, or a model that is
            quantized already.
    """
    located = locate_model(reference)
    if located.is_gguf:
        return _load_gguf(located.path, located.name, dtype)
    return _load_directory(located.path, located.name, dtype)


def save_tokenizer(loaded: LoadedModel, directory: Path) -> None:
    """Write the tokenizer, its chat template and the generation config into a directory.

    Raises:
        UnsupportedModelError: the tokenizer has no tokenizer.json form, which the runtime needs.
    """
    loaded.tokenizer.save_pretrained(directory)
    generation = getattr(loaded.model, "generation_config", None)  # encoders have none
    if generation is not None:
        generation.save_pretrained(directory)
    if not (directory / "tokenizer.json").is_file():
        raise UnsupportedModelError(
            f"model {loaded.name}: its tokenizer ({type(loaded.tokenizer).__name__}) has no "
            "tokenizer.json form"
        )
    _name_for_older_readers(directory / "tokenizer_config.json")


def _name_for_older_readers(path: Path) -> None:
    """Spell a tokenizer's configuration so that transformers 4 reads it too, as 5 still does.

    Version 5 calls the class of a bare tokenizer.json TokenizersBackend, and lists what 4 calls
    additional special tokens under a name that there holds a mapping.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_model_directory(directory: Path) -> list[Path]:
    """Return the weight files of a float decoder's directory, each opened once.

    Raises:
        As `load_model`.
    """
    refuse_other_stages(directory)
    raw_config = read_model_config(directory)
    family_of(str(raw_config.get("model_type")), str(directory))
    refuse_quantized(directory, raw_config)
    return find_weight_files(directory)


def _load_directory(directory: Path, name: str, dtype: torch.dtype) -> LoadedModel:
    weight_files = check_model_directory(directory)
    model = _load_weights(directory, dtype, use_safetensors=True)
    tokenizer = load_local_tokenizer(directory)
    return LoadedModel(model, tokenizer, name, *digest_model(directory, weight_files))


def _load_gguf(path: Path, name: str, dtype: torch.dtype) -> LoadedModel:
    check_gguf(path)
    # The dequantizing loop draws a bar on stderr that no transformers setting turns off.
    with redirect_stderr(io.StringIO()):
        model = _load_weights(path.parent, dtype, gguf_file=path.name)
        tokenizer = load_local_tokenizer(path.parent, gguf_file=path.name)
    model.config._name_or_path = name
    return LoadedModel(model, tokenizer, name, digest_files([path]))


def refuse_quantized(directory: Path, raw_config: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are integers already.

    Raises:
        UnsupportedModelError: config.json says so.
    """
    if raw_config.get("quantization_config"):
        method = raw_config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModelError(
            f"{directory}: is quantized already ({method}); give the model it was made from"
        )


def refuse_other_stages(directory: Path) -> None:
    """Refuse a directory that holds one of our artifacts or an adapter instead of a model.

    A model that `rolora merge` wrote passes if its files are still those of its manifest.

    Raises:
        StageOrderError: it does.
        ArtifactError: it is a merged model whose files are not what was written.
    """
    if is_artifact(directory):
        kind = read_manifest(directory).kind
        if kind is ArtifactKind.MODEL:
            _verify_merged(directory)
            return
        raise StageOrderError(
            f"{directory}: expected a model, got an artifact of kind {kind}, which is for "
            f"{TAKEN_BY[kind]}"
        )
    if (directory / "adapter_config.json").is_file() and not (directory / CONFIG_NAME).is_file():
        raise StageOrderError(
            f"{directory}: expected a model, got an adapter; give it as --adapter together with "
            "the --model it was trained on"
        )


def _verify_merged(directory: Path) -> None:
    try:
        verify_files(directory)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}. If it was changed on purpose, remove {MANIFEST_NAME}: then it is a model "
            "like any other"
        ) from error


def _load_weights(directory: Path, dtype: torch.dtype, **source: Any) -> PreTrainedModel:
    """Load config and weights with every departure of one from the other made an error."""
    where = str(directory / source.get("gguf_file", ""))
    config_source = {key: value for key, value in source.items() if key == "gguf_file"}
    with quiet_transformers():
        config = call_loader(where, AutoConfig.from_pretrained, directory, **config_source)
        decoder_names(config)
        model, info = call_loader(
            where,
            AutoModelForCausalLM.from_pretrained,
            directory,
            config=config,
            quantization_config=GgufConfig(dequantize=True) if "gguf_file" in source else None,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the other faults below
            **source,
        )
    refuse_departures(where, info)
    refuse_non_finite(where, model)
    to_our_layout(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_local_tokenizer(directory: Path, **source: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    where = str(directory / source.get("gguf_file", ""))
    with quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = call_loader(
            f"{where}: tokenizer", AutoTokenizer.from_pretrained, directory, **source
        )
    return tokenizer


def call_loader(where: str, load: Callable[..., Any], directory: Path, **options: Any) -> Any:
    """Call a transformers loader on local files; what it raises then is about those files.

    Raises:
        ArtifactError: the loader raised.
    """
    try:
        return load(str(directory), local_files_only=True, **options)
    except Exception as error:  # tokenizers raises bare Exception, transformers nearly any type
        raise ArtifactError(f"{where}: cannot be loaded ({error})") from error


def refuse_departures(where: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that are not those of the config.

    Args:
        where: model named in the message.
        info: what transformers reports of loading.

    Raises:
        ArtifactError: a tensor is missing, unknown or of another shape.
    """
    faults = []
    if info["missing_keys"]:
        faults.append(f"the files lack {name_some(info['missing_keys'])}")
    if info["unexpected_keys"]:
        faults.append(
            f"the files hold, but the model has not, {name_some(info['unexpected_keys'])}"
        )
    if info["mismatched_keys"]:
        shapes = [
            f"{key} (file {list(found)}, model {list(expected)})"
            for key, found, expected in info["mismatched_keys"]
        ]
        faults.append(f"other shapes: {name_some(shapes)}")
    if faults:
        raise ArtifactError(f"{where}: weights do not fit {CONFIG_NAME}: {'; '.join(faults)}")


def refuse_non_finite(where: str, model: PreTrainedModel) -> None:
    """Refuse a model with NaN or infinite weights.

    Raises:
        ArtifactError: a tensor holds one.
    """
    for name, parameter in model.named_parameters():
        # A float64 sum is finite when every term is, and needs no mask as large as the tensor.
        if not torch.isfinite(parameter.sum(dtype=torch.float64)):
            raise ArtifactError(
                f"{where}: tensor {name} holds NaN or infinite values in {parameter.dtype}; "
                "use another copy of the model"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers logs and draws on files: every fault is raised instead."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
