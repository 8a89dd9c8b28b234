from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rolora.kv_attention import (
    ATTENTION_NAME,
    CODEC_NAME,
    install_codecs,
    quantize_kv_cache,
)
from rolora.kv_cache import FLOAT_KV_BITS, KV_BITS, CacheCodec
from rolora.rotation import RotationKind, RotationName, RotationPlan
from tests.rolora.conftest import TOKENS, VOCABULARY, TinyDecoder

MakeDecoder = Callable[..., TinyDecoder]
IDS = (torch.arange(2 * TOKENS) * 17 % VOCABULARY).reshape(2, TOKENS)


def r3_of(decoder: TinyDecoder) -> Tensor:
    plan = RotationPlan.draw(decoder.names, [RotationName.R3], RotationKind.HADAMARD, seed=1)
    return plan.find(RotationName.R3, None).dense()


def install(decoder: TinyDecoder, bits: int) -> None:
    if bits == FLOAT_KV_BITS:
        codecs = [CacheCodec(r3_of(decoder)) for _ in decoder.names.blocks]
        install_codecs(decoder.model, decoder.names, codecs)
    else:
        quantize_kv_cache(decoder.model, decoder.names, bits, r3_of(decoder), [{"input_ids": IDS}])


def cached_logits(model: PreTrainedModel, first: int) -> Tensor:
    """Run a prompt of `first` tokens, then the others one by one over the cache."""
    with torch.inference_mode():
        output = model(input_ids=IDS[:, :first], use_cache=True)
        logits = [output.logits]
        for token in range(first, TOKENS):
            output = model(
                input_ids=IDS[:, token : token + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


def full_logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        logits = model(input_ids=IDS, use_cache=False).logits
    assert isinstance(logits, Tensor)
    return logits


def test_r3_alone_changes_nothing(make_decoder: MakeDecoder, model_type: str) -> None:
    decoder = make_decoder(model_type)
    before = decoder.logits()
    install(decoder, FLOAT_KV_BITS)
    assert 0 < decoder.error_to(before) < decoder.rounding


def test_r3_on_the_keys_alone_would_be_noticed(make_decoder: MakeDecoder) -> None:
    class KeysOnly(CacheCodec):
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            return (query, *super().forward(query, key, value)[1:])

    decoder = make_decoder("llama")
    before = decoder.logits()
    codecs = [KeysOnly(r3_of(decoder)) for _ in decoder.names.blocks]
    install_codecs(decoder.model, decoder.names, codecs)
    assert decoder.error_to(before) > 1e-3


@pytest.mark.parametrize("bits", [FLOAT_KV_BITS, *KV_BITS])
def test_prompt_and_steps_over_the_cache_give_the_full_forward(
    make_decoder: MakeDecoder, model_type: str, bits: int
) -> None:
    decoder = make_decoder(model_type)
    before = full_logits(decoder.model)
    install(decoder, bits)
    full = full_logits(decoder.model)
    largest = float(full.abs().max())
    for first in (1, 4):
        cached = cached_logits(decoder.model, first)
        assert float((cached - full).abs().max()) < 1e-9 * largest
    changed = float((full - before).abs().max()) / largest
    least, most = {FLOAT_KV_BITS: (0.0, 1e-12), 8: (1e-4, 0.1), 4: (1e-2, 1.0)}[bits]
    assert least <= changed < most


def test_a_sliding_window_stays_in_force(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("mistral")
    full = full_logits(decoder.model)
    decoder.model.config.sliding_window = 3
    windowed = full_logits(decoder.model)
    install(decoder, FLOAT_KV_BITS)
    torch.testing.assert_close(full_logits(decoder.model), windowed, rtol=0, atol=1e-10)
    assert float((windowed - full).abs().max()) > 1e-3


def test_padding_stays_masked(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("qwen2")
    install(decoder, 8)
    mask = torch.ones_like(IDS)
    mask[1, -3:] = 0
    with torch.inference_mode():
        padded = decoder.model(input_ids=IDS, attention_mask=mask).logits
        alone = decoder.model(input_ids=IDS[1:, :-3]).logits
    torch.testing.assert_close(padded[1:, :-3], alone, rtol=0, atol=1e-9)


def test_scales_are_saved_with_the_model_and_the_rotation_is_not(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    install(decoder, 8)
    prefix = f"{decoder.names.blocks[0].attention}.{CODEC_NAME}"
    state = decoder.model.state_dict()
    found = {key.removeprefix(f"{prefix}.") for key in state if key.startswith(prefix)}
    assert found == {"key_scale", "value_scale"}


def test_the_attention_function_is_not_part_of_a_saved_config(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    install(decoder, FLOAT_KV_BITS)
    assert decoder.model.config._attn_implementation == ATTENTION_NAME
    assert ATTENTION_NAME not in decoder.model.config.to_json_string()


def test_another_attention_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    decoder.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'sdpa' or 'eager', got 'flex_attention'"):
        install(decoder, 8)


def test_a_codec_for_every_block_is_expected(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    with pytest.raises(ValueError, match="shorter"):
        install_codecs(decoder.model, decoder.names, [CacheCodec(None)])


def test_calibration_names_the_module_and_leaves_no_recorder(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    fqn = decoder.names.blocks[1].attention
    with torch.no_grad():
        decoder.model.get_parameter(f"{fqn}.k_proj.weight").fill_(torch.inf)
    with pytest.raises(ValueError, match=rf"{fqn}: .*NaN or infinite"):
        install(decoder, 8)
    assert not hasattr(decoder.model.get_submodule(fqn), CODEC_NAME)
    with pytest.raises(ValueError, match="no token was seen"):
        quantize_kv_cache(decoder.model, decoder.names, 8, None, [])


@pytest.mark.parametrize("cap", [None, 2.0])
def test_masks_of_both_kinds_of_attention_mean_the_same(
    make_decoder: MakeDecoder, cap: float | None
) -> None:
    """A model of eager attention makes masks that are added, ours takes boolean ones."""
    attention = make_decoder("llama").model.get_submodule("model.layers.0.self_attn")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, 0] = False  # padding
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    attend = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
    found = [
        attend(attention, query, key, value, mask, softcap=cap, scaling=0.3)[0]
        for mask in (seen, added)
    ]
    torch.testing.assert_close(found[1][:, 1:], found[0][:, 1:], rtol=0, atol=1e-6)
    assert bool(torch.isfinite(torch.stack(found)).all())
    unmasked = attend(attention, query, key, value, None, softcap=cap, scaling=0.3)[0]
    assert float((unmasked[1, 1:] - found[0][1, 1:]).abs().max()) > 1e-2
