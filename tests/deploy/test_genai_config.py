from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig, LlamaConfig

from deploy.architecture import decoder_names
from deploy.genai_config import genai_config
from deploy.kernels import PORTABLE_GRAPH
from deploy.session import PORTABLE_OPTIONS


def config(**options: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 262,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": 99,
        }
        | options
    )


def test_sizes_and_names_are_the_graphs(tmp_path: Path) -> None:
    described = genai_config(config(), decoder_names(config()), tmp_path)["model"]
    assert described["type"] == "llama"
    assert (described["context_length"], described["vocab_size"]) == (99, 262)
    decoder = described["decoder"]
    assert decoder["filename"] == "model.onnx"
    sizes = [
        decoder[key]
        for key in (
            "head_size",
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
        )
    ]
    assert sizes == [16, 64, 8, 2, 4]
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, (1, 2, 0)),
        ({"bos_token_id": 1, "eos_token_id": [7, 8], "pad_token_id": None}, (1, [7, 8], 7)),
        ({"bos_token_id": None, "eos_token_id": 5, "pad_token_id": None}, (5, 5, 5)),
        ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}, (0, 0, 0)),
    ],
)
def test_token_ids_have_a_value_whatever_the_model_leaves_out(
    ids: dict[str, object], expected: tuple[object, ...], tmp_path: Path
) -> None:
    chosen = config(**ids)
    model = genai_config(chosen, decoder_names(chosen), tmp_path)["model"]
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert tuple(model[key] for key in keys) == expected


def test_the_generation_config_comes_first(tmp_path: Path) -> None:
    GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.8, eos_token_id=[3, 4], bos_token_id=9
    ).save_pretrained(tmp_path)
    chosen = config(eos_token_id=2)
    found = genai_config(chosen, decoder_names(chosen), tmp_path)
    assert (found["model"]["eos_token_id"], found["model"]["bos_token_id"]) == ([3, 4], 9)
    search = found["search"]
    assert search["do_sample"] is True
    assert (search["temperature"], search["top_k"], search["top_p"]) == (0.6, 20, 0.8)
    assert search["past_present_share_buffer"] is True
    assert search["max_length"] == 99


def test_a_portable_graph_is_run_as_it_was_checked(tmp_path: Path) -> None:
    described = genai_config(config(), decoder_names(config()), tmp_path, (PORTABLE_GRAPH,))
    options = described["model"]["decoder"]["session_options"]
    assert options.items() >= PORTABLE_OPTIONS.items()
    other = genai_config(config(), decoder_names(config()), tmp_path)
    assert not other["model"]["decoder"]["session_options"].keys() & PORTABLE_OPTIONS.keys()
