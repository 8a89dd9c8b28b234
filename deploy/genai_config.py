"""The configuration that onnxruntime-genai reads beside the graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from deploy.conventions import context_length
from deploy.kernels import ONE_INTEGER_GRAPH, GraphForm
from deploy.session import HIDDEN_NAME, PORTABLE_OPTIONS, PROMPT_NAME, TOKEN_NAME
from deploy.targets import Target
from rolora.decoder import DecoderNames

PROMPT_CHUNK = 256
"""Tokens of a prompt that go through the model at a time, on a CPU.

Attention multiplies a chunk by the tokens up to its end only, not by all of the prompt; but every
chunk reads all weights, and makes the tokens before it float32 again if the cache has 8 bits.
"""
PIPELINE_TYPE = "decoder-pipeline"
"""Model type under which onnxruntime-genai runs a graph per phase over one cache."""


def genai_config(
    config: PretrainedConfig,
    names: DecoderNames,
    directory: Path,
    forms: Sequence[GraphForm] = (ONE_INTEGER_GRAPH,),
) -> dict[str, Any]:
    """Describe an exported decoder to onnxruntime-genai.

    Args:
        config: The model's configuration.
        names: Its parts and sizes.
        directory: The checkpoint, for its `generation_config.json` if it has one.
        forms: The graphs of the export.

    Returns:
        The content of `genai_config.json`.
    """
    target = forms[0].target
    decoders = [form for form in forms if not form.head_only]
    generation = _generation_config(config, directory)
    end = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    pad = generation.pad_token_id if generation.pad_token_id is not None else config.pad_token_id
    first_end = end[0] if isinstance(end, list) else end
    begin = generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id
    return {
        "model": {
            "bos_token_id": _first_id(begin, first_end, 0),
            "eos_token_id": _first_id(end, 0),
            "pad_token_id": _first_id(pad, first_end, 0),
            "context_length": context_length(config),
            "type": config.model_type if len(decoders) == 1 else PIPELINE_TYPE,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{"cuda": {}}] if target is Target.CUDA else [],
                }
                | (PORTABLE_OPTIONS if target is Target.QDQ else {}),
                **_graphs(decoders, len(names.blocks)),
                "head_size": names.head_dim,
                "hidden_size": names.hidden_size,
                "num_attention_heads": names.num_heads,
                "num_hidden_layers": len(names.blocks),
                "num_key_value_heads": names.num_key_value_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.do_sample),
            "temperature": _number(generation.temperature, 1.0),
            "top_k": int(_number(generation.top_k, 50)),
            "top_p": _number(generation.top_p, 1.0),
            "repetition_penalty": _number(generation.repetition_penalty, 1.0),
            "early_stopping": True,
            "length_penalty": 1.0,
            "diversity_penalty": 0.0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "min_length": 0,
            "max_length": context_length(config),
            "past_present_share_buffer": target is not Target.QDQ,
        }
        | ({} if target in (Target.CUDA, Target.QDQ) else {"chunk_size": PROMPT_CHUNK}),
    }


def _graphs(forms: Sequence[GraphForm], layers: int) -> dict[str, Any]:
    """Name the one graph, or the graph of each phase with its inputs and outputs.

    Every output of a graph has to be listed: onnxruntime-genai 0.18 frees those that are not twice.
    """
    if len(forms) == 1:
        return {"filename": forms[0].file}
    caches = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in caches)]
    outputs = ["logits", *(f"present.{name}" for name in caches)]
    return {
        "pipeline": [
            {
                phase: {
                    "filename": file,
                    "inputs": inputs,
                    "outputs": [*outputs, HIDDEN_NAME] if phase == "prompt" else outputs,
                    "run_on_prompt": phase == "prompt",
                    "run_on_token_gen": phase == "token",
                }
            }
            for phase, file in (("prompt", PROMPT_NAME), ("token", TOKEN_NAME))
        ]
    }


def _generation_config(config: PretrainedConfig, directory: Path) -> GenerationConfig:
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def _first_id(*candidates: Any) -> Any:
    """Return the first token id (or list of ids) that is set."""
    return next(candidate for candidate in candidates if candidate is not None)


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)
