"""Where the files of a model lie: what a user may write as --model, turned into a path."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from deploy.errors import ConfigError, RoloraError
from deploy.families import ENCODER_TYPES
from deploy.gguf_files import find_demo_file
from deploy.weight_files import CONFIG_NAME, find_demo_encoder, read_model_config

DEMO_MODEL = "smollm2-135m"
DEMO_ENCODER = "minilm-l6"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
HUB_IGNORED = ("consolidated*", "*/*")
LOCAL_OPTIONS = f"a model directory, a .gguf file or {DEMO_MODEL}"


@dataclass(frozen=True)
class LocatedModel:
    """Where the files of a model lie."""

    path: Path
    """A directory or a `.gguf` file."""
    name: str
    is_gguf: bool = False


def locate_model(reference: str | Path) -> LocatedModel:
    """Find the files of a model, which for a hub id are downloaded; none is opened.

    Args:
        reference: See `load_model`.

    Raises:
        ConfigError: nothing is there, or the hub cannot be reached.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if text == DEMO_MODEL:
        return LocatedModel(find_demo_file(), text, is_gguf=True)
    if text == DEMO_ENCODER:
        return LocatedModel(find_demo_encoder(), text)
    if path.is_dir():
        return LocatedModel(path, path.resolve().name)
    if path.is_file() and path.suffix == ".gguf":
        return LocatedModel(path, path.stem, is_gguf=True)
    if path.exists():
        raise ConfigError(f"model {text}: expected {LOCAL_OPTIONS}, got another kind of file")
    if HUB_ID.fullmatch(text) and path.suffix != ".gguf":
        return LocatedModel(download_model(text), text)
    raise ConfigError(f"model {text}: no such file or directory; give {LOCAL_OPTIONS}, or a hub id")


def is_encoder(reference: str | Path, *, fetch: bool = True) -> bool:
    """Tell whether a model, checkpoint or merged model is an encoder, by its config.json alone.

    Where there is none the answer is no, and whoever opens the model says what is wrong.

    Args:
        reference: See `locate_model`.
        fetch: Download that file of a hub id, if it is not here yet.
    """
    text = str(reference)
    path = Path(text).expanduser()
    if text == DEMO_ENCODER:
        return True
    try:
        if path.is_dir():
            config = read_model_config(path)
        elif not path.exists() and text != DEMO_MODEL and HUB_ID.fullmatch(text):
            cached = try_to_load_from_cache(text, CONFIG_NAME)
            if not isinstance(cached, str):
                if not fetch:
                    return False
                cached = hf_hub_download(text, CONFIG_NAME)
            config = read_model_config(Path(cached).parent)
        else:
            return False
    except (RoloraError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return False
    return config.get("model_type") in ENCODER_TYPES


def download_model(reference: str) -> Path:
    """Fetch a model's files from the hub, pickles and code left out, and return where they lie.

    Raises:
        ConfigError: the hub has no such model or cannot be reached.
    """
    try:
        return Path(
            snapshot_download(
                reference, allow_patterns=list(HUB_PATTERNS), ignore_patterns=list(HUB_IGNORED)
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {reference}: no local file or directory has this name, and the hub did not "
            f"give it ({reason}); give {LOCAL_OPTIONS}, or a hub id that can be reached"
        ) from error
