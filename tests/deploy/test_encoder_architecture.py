from __future__ import annotations

import pytest
from torch import nn
from transformers import BertConfig, LlamaConfig, RobertaConfig

from deploy.encoder_architecture import (
    ENCODER_FAMILIES,
    ENCODER_HEAD,
    check_encoder,
    encoder_family_of,
    encoder_targets,
    encoder_token_limit,
)
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.families import ENCODER_TYPES, FAMILIES, family_of
from tests.reslora.tiny_encoder import build_encoder


@pytest.mark.parametrize("model_type", ENCODER_TYPES)
def test_all_targets_are_the_linears_of_the_blocks(model_type: str) -> None:
    model = build_encoder(model_type, layers=3)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name
    ]
    assert encoder_targets(model.config, "all") == linears
    assert ENCODER_HEAD in dict(model.named_children())


def test_each_target_is_one_linear_of_every_block() -> None:
    config = BertConfig(num_hidden_layers=2)
    block = "bert.encoder.layer.1."
    for target, place in {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }.items():
        found = encoder_targets(config, target)
        assert found == [f"bert.encoder.layer.0.{place}", block + place]
    assert encoder_targets(config, "query, value") == encoder_targets(config, "v,q")


@pytest.mark.parametrize("targets", ["output", "dense", "output.dense", "gate", "", "q,x", "out"])
def test_ambiguous_and_unknown_targets_are_refused(targets: str) -> None:
    with pytest.raises(ConfigError, match="o is the last linear of the attention and down that of"):
        encoder_targets(BertConfig(), targets)


def test_each_kind_of_model_is_told_where_it_belongs() -> None:
    assert tuple(ENCODER_FAMILIES) == ENCODER_TYPES
    assert not set(ENCODER_TYPES) & set(FAMILIES)
    with pytest.raises(UnsupportedModelError, match=r"'bert' is an encoder.*--task classification"):
        family_of("bert", "here")
    with pytest.raises(UnsupportedModelError, match=r"here: .*'llama' is a decoder.*bert, roberta"):
        encoder_family_of("llama", "here")
    with pytest.raises(UnsupportedModelError, match="'t5' is not supported"):
        encoder_family_of("t5")


def test_features_that_would_be_dropped_are_refused() -> None:
    check_encoder(BertConfig())
    with pytest.raises(UnsupportedModelError, match="position_embedding_type is 'relative_key'"):
        check_encoder(BertConfig(position_embedding_type="relative_key"))
    with pytest.raises(UnsupportedModelError, match="is_decoder is true"):
        check_encoder(RobertaConfig(is_decoder=True))
    with pytest.raises(UnsupportedModelError, match="is a decoder"):
        check_encoder(LlamaConfig())


def test_roberta_counts_positions_from_its_padding() -> None:
    assert encoder_token_limit(BertConfig(max_position_embeddings=512)) == 512
    roberta = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert encoder_token_limit(roberta) == 512
