from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.decoder import LinearRole
from rolora.layer_plan import plan_layers
from rolora.overrides import Override, matches
from rolora.scheme import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    Granularity,
    QuantizationRecipe,
    Scheme,
    WeightSpec,
)

MakeDecoder = Callable[..., Any]
patterns = st.text("abcdefgjklmnopqruvwxyz.*?_0123456789[]", min_size=1, max_size=12)
overrides = st.builds(
    Override,
    st.lists(patterns, min_size=1, max_size=4).map(tuple),
    st.sampled_from((None, *WEIGHT_BITS)),
    st.sampled_from((None, *ACTIVATION_BITS)),
).filter(lambda override: override.weight_bits or override.activation_bits)


@settings(max_examples=100, deadline=None)
@given(overrides, st.sampled_from([str, str.swapcase, " {} ".format]))
def test_an_override_reads_back(override: Override, spell: Any) -> None:
    left, _, right = str(override).partition("=")
    text = f"{left}={spell(right)}"
    assert Override.parse(text) == override
    assert Override.parse(text.replace(",", " , ")) == override


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_an_override_or_refused_in_words(text: str) -> None:
    try:
        override = Override.parse(text)
    except ValueError as error:
        said = str(error)
    else:
        assert Override.parse(str(override)) == override
        return
    assert repr(text) in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("down", "expected PATTERN=BITS"),
        ("=A8", "expected PATTERN=BITS"),
        ("o,,down=A8", "expected PATTERN=BITS"),
        ("down=", "expected PATTERN=BITS"),
        ("down=8", "expected PATTERN=BITS"),
        ("down=A8W8", "expected PATTERN=BITS"),
        ("down=W8=A8", "expected PATTERN=BITS"),
        ("down=A\u0668", "expected PATTERN=BITS"),
        ("down=A5", "activations of 4, 6, 8, 16 bits, got 5"),
        ("down=W3A8", "weights of 4, 6, 8, 16 bits, got 3"),
    ],
)
def test_what_is_no_override_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Override.parse(text)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 12),
    st.sampled_from(["self_attn.q_proj", "mlp.down_proj"]),
    st.integers(0, 12),
)
def test_a_layer_pattern_matches_its_layer_alone(layer: int, name: str, other: int) -> None:
    fqn = f"model.layers.{layer}.{name}"
    assert matches(f"layers.{other}.*", fqn, LinearRole.Q) == (layer == other)
    assert matches(f"model.layers.{other}.*", fqn, LinearRole.Q) == (layer == other)
    assert matches(name, fqn, LinearRole.Q)
    assert not matches(name[1:], fqn, LinearRole.Q)


def recipe(scheme: str = "W4A4", **options: Any) -> QuantizationRecipe:
    return QuantizationRecipe(Scheme.parse(scheme), **options)


def plan(decoder: Any, given: QuantizationRecipe, *texts: str) -> dict[str, Any]:
    plans = plan_layers(decoder.names, given, [Override.parse(text) for text in texts])
    return {found.fqn: found for found in plans}


def test_overrides_change_what_they_name_and_nothing_else(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    first, second, *_ = decoder.names.blocks
    before = plan(decoder, recipe())
    after = plan(decoder, recipe(), "down=A8", "layers.0.*=W8A8", "layers.0.mlp.up_proj=W6")
    for fqn, found in after.items():
        bits = (found.weight.bits, found.activation.bits)
        if fqn == first.up:
            assert bits == (6, 8)
        elif fqn in first.linears():
            assert bits == (8, 8)
        elif fqn.endswith("down_proj"):
            assert bits == (4, 8)
            assert found.activation.clip_ratio == 1.0
        else:
            assert found == before[fqn]
    assert before[second.down].activation.clip_ratio == 0.7
    assert list(before) == list(after)


def test_of_two_overrides_the_last_one_counts(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    down = decoder.names.blocks[1].down
    assert plan(decoder, recipe(), "down=W8A8", "layers.1.*=A6")[down].activation.bits == 6
    assert plan(decoder, recipe(), "down=W8A8", "layers.1.*=A6")[down].weight.bits == 8
    assert plan(decoder, recipe(), "layers.1.*=A6", "down=W8A8")[down].activation.bits == 8


def test_4_bit_weights_need_an_even_number_of_inputs(make_decoder: MakeDecoder) -> None:
    names = replace(make_decoder("llama").names, intermediate_size=45)
    down = names.blocks[0].down
    with pytest.raises(ValueError, match=rf"{down}: has 45 input columns.*--override {down}=W8"):
        plan_layers(names, recipe("W4A8"))
    plans = {
        found.fqn: found
        for found in plan_layers(names, recipe("W4A8"), [Override.parse("down=W8")])
    }
    assert plans[down].weight.bits == 8


def test_the_head_and_linears_left_in_float(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    head = decoder.names.head
    assert plan(decoder, recipe(), "head=A16")[head].activation.is_float
    assert plan(decoder, recipe(), "head=W4")[head].weight == WeightSpec(4)
    assert head not in plan(decoder, recipe(), "head=W16A16")
    assert head not in plan(decoder, recipe(head_bits=32))
    assert plan(decoder, recipe(head_bits=32), "head=W8A8")[head].weight == WeightSpec(8)
    floating = plan(decoder, recipe("W16A16"), "down=W8A8")
    assert set(floating) == {block.down for block in decoder.names.blocks} | {head}
    assert floating[head].activation.is_float


def test_weights_that_share_an_input_may_differ_but_the_input_may_not(
    make_decoder: MakeDecoder,
) -> None:
    decoder = make_decoder("llama")
    block = decoder.names.blocks[0]
    assert plan(decoder, recipe(), "v=W8")[block.value].weight.bits == 8
    for text, blamed in (("v=A8", block.value), ("up=A16", block.up), ("q=W16A16", block.key)):
        with pytest.raises(ValueError, match=f"{blamed} and .* read the same input"):
            plan(decoder, recipe(), text)


@pytest.mark.parametrize("text", ["downn=A8", "layers.9.*=A8", "o,nothing=W8", "Down=A8"])
def test_a_pattern_that_matches_nothing_is_named(make_decoder: MakeDecoder, text: str) -> None:
    decoder = make_decoder("llama")
    with pytest.raises(ValueError, match=r"matches no linear; roles are q, k, v, o, gate"):
        plan(decoder, recipe(), text)


def test_overrides_must_go_with_weight_groups(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    grouped = recipe("W4A8", group_size=16)
    block = decoder.names.blocks[0]
    kept = plan(decoder, grouped, "down=A16", "o=W8")
    assert kept[block.down].weight == WeightSpec(4, 16)
    assert kept[block.output].weight == WeightSpec(8, 16)
    assert kept[block.output].activation.granularity is Granularity.GROUP
    for text, said in (("down=A4", "use A8 or A16"), ("down=W6", "4 or 8 bits, got 6")):
        with pytest.raises(ValueError, match=f"^{block.down}: .*{said}"):
            plan(decoder, grouped, text)


def test_groups_of_inputs_must_divide_each_of_them(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")  # hidden size 36, 4 heads of 12, 44 in the MLP
    query = decoder.names.blocks[0].query
    with pytest.raises(
        ValueError, match=f"^{query}: activation group size 16 does not divide the 36"
    ):
        plan(decoder, recipe(activation_group_size=16))
