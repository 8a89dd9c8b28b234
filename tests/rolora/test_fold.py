from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rolora import fold, rtn
from rolora.fold import fold_norm_gains, untie_head

MakeDecoder = Callable[..., Any]


@pytest.mark.parametrize("tied", [True, False])
def test_untying_changes_no_bit(make_decoder: MakeDecoder, model_type: str, tied: bool) -> None:
    decoder = make_decoder(model_type, tied=tied)
    before = decoder.logits()
    assert untie_head(decoder.model, decoder.names) is tied
    assert torch.equal(decoder.logits(), before)
    assert decoder.model.config.tie_word_embeddings is False
    assert untie_head(decoder.model, decoder.names) is False
    head = decoder.model.get_parameter("lm_head.weight")
    assert head is not decoder.model.get_parameter("model.embed_tokens.weight")
    assert head.requires_grad


def test_an_untied_head_survives_saving(make_decoder: MakeDecoder, tmp_path: Path) -> None:
    decoder = make_decoder("llama", tied=True)
    untie_head(decoder.model, decoder.names)
    with torch.no_grad():
        decoder.model.get_parameter("lm_head.weight").mul_(2)
    decoder.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for key, tensor in decoder.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


@pytest.mark.parametrize("tied", [True, False])
def test_folding_changes_nothing(make_decoder: MakeDecoder, model_type: str, tied: bool) -> None:
    decoder = make_decoder(model_type, tied=tied)
    before = decoder.logits()
    untie_head(decoder.model, decoder.names)
    gains = {n: p.clone() for n, p in decoder.model.named_parameters() if "norm" in n}
    fold_norm_gains(decoder.model, decoder.names)
    assert decoder.error_to(before) < decoder.rounding
    for name, gain in gains.items():
        folded = decoder.model.get_parameter(name)
        is_head_norm = "q_norm" in name or "k_norm" in name
        assert torch.equal(folded, gain if is_head_norm else torch.ones_like(gain)), name


@pytest.mark.parametrize("mistake", ["one reader without the gain", "gain twice", "centred"])
def test_a_wrong_fold_is_noticed(make_decoder: MakeDecoder, model_type: str, mistake: str) -> None:
    decoder = make_decoder(model_type)
    model, names = decoder.model, decoder.names
    before = decoder.logits()
    gain = model.get_parameter(f"{names.blocks[1].mlp_norm}.weight").detach().clone()
    fold_norm_gains(model, names)
    with torch.no_grad():
        if mistake == "one reader without the gain":
            model.get_parameter(f"{names.blocks[1].up}.weight").div_(gain)
        elif mistake == "gain twice":
            model.get_parameter(f"{names.blocks[1].mlp_norm}.weight").copy_(gain)
        else:
            table = model.get_parameter(f"{names.embedding}.weight")
            table.sub_(table.mean(dim=1, keepdim=True))
    assert decoder.error_to(before) > 1e-3


def test_folding_in_chunks_of_rows_is_the_same(
    make_decoder: MakeDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chunked = make_decoder("qwen2"), make_decoder("qwen2")
    fold_norm_gains(whole.model, whole.names)
    monkeypatch.setattr(rtn, "_CHUNK_ELEMENTS", 36)  # four rows of 36
    fold_norm_gains(chunked.model, chunked.names)
    for key, tensor in whole.weights().items():
        assert torch.equal(chunked.weights()[key], tensor), key


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3), (64, 5000), (3, 1 << 23)])
def test_chunks_cover_every_row_once(rows: int, columns: int) -> None:
    weight = torch.empty(rows, columns, device="meta")
    covered = [row for part in fold.row_chunks(weight) for row in range(rows)[part]]
    assert covered == list(range(rows))


def test_a_tied_head_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama", tied=True)
    before = decoder.weights()
    with pytest.raises(ValueError, match=r"lm_head: .*tied to model.embed_tokens.*untie_head"):
        fold_norm_gains(decoder.model, decoder.names)
    for key, tensor in decoder.weights().items():
        assert torch.equal(tensor, before[key]), key


def test_a_layer_norm_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    decoder.model.get_submodule("model.layers.2").input_layernorm = nn.LayerNorm(36).double()
    with pytest.raises(ValueError, match=r"layers.2.input_layernorm: .*LayerNorm"):
        fold_norm_gains(decoder.model, decoder.names)


def test_another_width_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    decoder.model.get_submodule("model.layers.1.mlp").up_proj = nn.Linear(35, 44)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj: expected 36 inputs.*\(44, 35\)"):
        fold_norm_gains(decoder.model, decoder.names)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 6e4])
def test_what_is_not_finite_is_refused_and_nothing_written(
    make_decoder: MakeDecoder, value: float
) -> None:
    decoder = make_decoder("llama")
    decoder.model.half()  # 6e4 is finite in float16, 2 * 6e4 is not
    with torch.no_grad():
        decoder.model.get_parameter("model.norm.weight").fill_(2.0)
        decoder.model.get_parameter("lm_head.weight")[50, 3] = value
    before = decoder.weights()
    with pytest.raises(ValueError, match=r"lm_head: .*not finite.*float16.*float32"):
        fold_norm_gains(decoder.model, decoder.names)
    for key, tensor in decoder.weights().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)
