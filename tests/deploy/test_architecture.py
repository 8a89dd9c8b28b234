from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from deploy.architecture import decoder_names, qk_norms, resolve_targets
from deploy.conventions import (
    LayerAttention,
    context_length,
    conventions,
    rotary_size,
    sliding_window_per_layer,
)
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.families import FAMILIES
from deploy.module_layout import to_our_layout
from tests.conftest import MODEL_TYPES


def test_every_name_is_a_module_and_every_linear_and_norm_is_named(
    any_model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(any_model_type)
    to_our_layout(model)
    names = decoder_names(model.config)
    head_norms = [fqn for pair in qk_norms(model.config) for fqn in (pair.query, pair.key)]
    norms = [fqn for block in names.blocks for fqn in (block.attention_norm, block.mlp_norm)]
    after = [fqn for b in names.blocks for fqn in (b.attention_post_norm, b.mlp_post_norm) if fqn]
    norms += [names.final_norm, *head_norms, *after]
    linears = [*names.linears(), names.head]
    modules = dict(model.named_modules())
    found_linears = [fqn for fqn, module in modules.items() if isinstance(module, nn.Linear)]
    found_norms = [fqn for fqn, module in modules.items() if "RMSNorm" in type(module).__name__]
    assert sorted(linears) == sorted(found_linears)
    assert linears == found_linears or any_model_type == "phi3"  # which lists o in front of q, k, v
    assert sorted(norms) == sorted(found_norms)
    assert isinstance(modules[names.embedding], nn.Embedding)


def test_sizes_are_those_of_the_weights(
    any_model_type: str, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(any_model_type, head_dim=12)  # 4 heads of 12 are wider than hidden 32
    to_our_layout(model)
    names = decoder_names(model.config)
    block = names.blocks[1]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    heads, kv_heads = names.num_heads, names.num_key_value_heads
    assert shapes[f"{block.query}.weight"] == (heads * names.head_dim, names.hidden_size)
    assert shapes[f"{block.value}.weight"] == (kv_heads * names.head_dim, names.hidden_size)
    assert shapes[f"{block.output}.weight"] == (names.hidden_size, heads * names.head_dim)
    assert shapes[f"{block.down}.weight"] == (names.hidden_size, names.intermediate_size)


def test_few_families_have_qk_norms() -> None:
    having = [name for name, family in FAMILIES.items() if family.has_qk_norms]
    assert having == ["qwen3", "gemma3_text"]
    assert qk_norms(LlamaConfig()) == ()


def test_every_family_is_tested() -> None:
    assert tuple(FAMILIES) == MODEL_TYPES


def test_conventions_are_read_off_the_config() -> None:
    llama = conventions(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2))
    assert llama.attention_scale == 0.25
    assert llama.attention_cap is llama.logit_cap is llama.embedding_scale is None
    assert llama.layers == (LayerAttention(None, None),) * 2
    gemma = conventions(Gemma2Config(hidden_size=64, num_hidden_layers=2, query_pre_attn_scalar=64))
    assert (gemma.attention_scale, gemma.embedding_scale) == (0.125, 8.0)
    assert (gemma.attention_cap, gemma.logit_cap) == (50.0, 30.0)
    assert gemma.layers == (LayerAttention(4096, None), LayerAttention(None, None))
    assert gemma.torch_attention == "eager"
    types = ["sliding_attention", "full_attention"]
    layers = conventions(Gemma3TextConfig(num_hidden_layers=2, layer_types=types)).layers
    assert layers == (LayerAttention(4096, types[0]), LayerAttention(None, types[1]))


def test_the_context_of_longrope_is_its_original_window() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4} | factors,
    )
    assert context_length(config) == 4096
    assert context_length(Phi3Config(max_position_embeddings=4096)) == 4096
    assert rotary_size(config) == 96


def test_gemma_that_sees_what_comes_later_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention is set"):
        decoder_names(Gemma3TextConfig(use_bidirectional_attention=True))


def test_another_family_is_refused_naming_those_supported() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"gpt2.*llama, mistral, qwen2, qwen3, phi3"
    ) as caught:
        decoder_names(GPT2Config())
    assert caught.value.exit_code == 5
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        decoder_names(MixtralConfig())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor is 0.5",
        ),
        ({"num_experts": 8}, "8 experts"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic', expected one of default, linear, llama3, yarn, longrope",
        ),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, "no multiple of 5"),
    ],
)
def test_a_feature_we_do_not_handle_is_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        decoder_names(LlamaConfig(**options))


def test_windows_follow_the_rule_of_each_family() -> None:
    assert sliding_window_per_layer(LlamaConfig(num_hidden_layers=2)) == [None, None]
    mistral = MistralConfig(num_hidden_layers=2, sliding_window=64)
    assert sliding_window_per_layer(mistral) == [64, 64]
    assert sliding_window_per_layer(MistralConfig(num_hidden_layers=1, sliding_window=None)) == [
        None
    ]
    off = Qwen2Config(num_hidden_layers=2, use_sliding_window=False, sliding_window=64)
    assert sliding_window_per_layer(off) == [None, None]
    upper = Qwen3Config(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=64, max_window_layers=1
    )
    assert sliding_window_per_layer(upper) == [None, 64, 64]


def test_layer_types_that_we_do_not_know_are_refused() -> None:
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=64)
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        sliding_window_per_layer(config)
    config.layer_types = ["full_attention"]
    with pytest.raises(UnsupportedModelError, match="2 layers"):
        sliding_window_per_layer(config)
    mistral = MistralConfig(num_hidden_layers=2, sliding_window=64)
    mistral.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedModelError, match="one window for every layer"):
        decoder_names(mistral)


def test_targets_come_in_depth_order_without_repeats() -> None:
    names = decoder_names(LlamaConfig(num_hidden_layers=2))
    assert resolve_targets(names, " v,q , v") == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert resolve_targets(names, "all") == list(names.linears())
    assert resolve_targets(names, "q,k,v,o,gate,up,down") == list(names.linears())


@pytest.mark.parametrize(("targets", "got"), [("q,qq", "qq"), ("", "none"), (" , ", "none")])
def test_an_unknown_or_no_target_is_refused(targets: str, got: str) -> None:
    names = decoder_names(LlamaConfig(num_hidden_layers=1))
    with pytest.raises(ConfigError, match=f"expected q, k, .*all.*got {got}"):
        resolve_targets(names, targets)
