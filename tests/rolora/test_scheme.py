from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolora.scheme import (
    ACTIVATION_BITS,
    FLOAT_BITS,
    FLOAT_INPUT,
    GROUP_SIZES,
    UNQUANTIZED_BITS,
    WEIGHT_BITS,
    ActivationSpec,
    Granularity,
    QuantizationRecipe,
    Scheme,
    WeightMethod,
    WeightSpec,
)

schemes = st.builds(Scheme, st.sampled_from(WEIGHT_BITS), st.sampled_from(ACTIVATION_BITS))


@settings(max_examples=50, deadline=None)
@given(schemes, st.sampled_from([str.upper, str.lower, "  {}\n".format]))
def test_a_name_reads_back_in_any_case(scheme: Scheme, spell: Any) -> None:
    assert Scheme.parse(spell(str(scheme))) == scheme


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8) | st.from_regex(r"[wW]\d*[aA]\d*", fullmatch=True))
def test_no_other_text_is_a_scheme(text: str) -> None:
    supported = {f"W{w}A{a}" for w in WEIGHT_BITS for a in ACTIVATION_BITS}
    if text.strip().upper() in supported:
        assert str(Scheme.parse(text)) == text.strip().upper()
    elif re.fullmatch(r"W0*([468]|16)A0*([468]|16)", text.strip().upper()) is None:
        with pytest.raises(ValueError, match=r"supported: W\{4,6,8,16\}A\{4,6,8,16\}"):
            Scheme.parse(text)


@pytest.mark.parametrize(
    "name", ["", "W8", "A8W8", "W8A8A8", "W-8A8", "W8.0A8", "W3A8", "W8A32", "W\u0668A8"]
)
def test_a_bad_name_is_quoted_with_what_is_supported(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name)) + r".*for example W8A8"):
        Scheme.parse(name)


def test_a_width_too_long_for_python_is_refused_like_any_other() -> None:
    with pytest.raises(ValueError, match="supported: W"):
        Scheme.parse(f"W{'8' * 5000}A8")


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("W8A8", {"group_size": 48}, "group size: .*got 48"),
        ("W8A8", {"group_size": 0}, "group size: .*got 0"),
        ("W4A4", {"group_size": 32}, "group size 32 with W4A4.*use A8"),
        ("W6A8", {"group_size": 32}, "4 or 8 bits, got 6"),
        ("W8A8", {"activation_clip": 0.0}, "clip ratio.*got 0.0"),
        ("W8A8", {"activation_clip": 1.01}, "clip ratio.*got 1.01"),
        ("W8A8", {"activation_clip": float("nan")}, "clip ratio.*got nan"),
        ("W8A8", {"activation_clip": "best"}, "expected auto or a number, got 'best'"),
        ("W8A8", {"static_after_norm": "maybe"}, "static scales: .*got 'maybe'"),
        ("W8A8", {"static_after_norm": "all", "asymmetric": True}, "for all inputs .*symmetric"),
        ("W8A8", {"static_after_norm": "all", "activation_group_size": 32}, "for all inputs"),
        ("W4A4", {"activation_group_size": 48}, "activation group size: .*got 48"),
        ("W4A8", {"group_size": 32, "activation_group_size": 32}, "quantizes their inputs itself"),
        ("W4A8", {"group_size": 32, "asymmetric": True}, "quantizes their inputs itself"),
        ("W8A8", {"embedding_bits": 6}, "embedding bits.*got 6"),
        ("W8A8", {"head_bits": 16}, "head bits.*got 16"),
    ],
)
def test_a_recipe_that_no_kernel_runs_is_refused(
    scheme: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationRecipe(Scheme.parse(scheme), **options)


@settings(max_examples=50, deadline=None)
@given(
    schemes,
    st.none() | st.sampled_from(GROUP_SIZES),
    st.booleans(),
    st.booleans(),
    st.floats(0.1, 1.0),
)
def test_every_accepted_recipe_gives_weight_and_input_the_same_groups(
    scheme: Scheme, group_size: int | None, static: bool, after_norm: bool, clip: float
) -> None:
    try:
        recipe = QuantizationRecipe(
            scheme, group_size=group_size, static_after_norm=static, activation_clip=clip
        )
    except ValueError:
        assert group_size is not None
        assert scheme.activation_bits in (4, 6) or scheme.weight_bits == 6
        return
    weight, activation = recipe.block_weight(), recipe.block_input(after_norm=after_norm)
    assert weight.bits == scheme.weight_bits
    assert activation.bits == scheme.activation_bits
    assert weight.group_size == (None if weight.bits == UNQUANTIZED_BITS else group_size)
    assert activation.group_size == (None if activation.is_float else group_size)
    assert (weight.granularity is Granularity.GROUP) == (weight.group_size is not None)
    if not activation.is_float:
        assert (activation.granularity is Granularity.GROUP) == (group_size is not None)


def test_static_scales_stand_only_behind_norms() -> None:
    recipe = QuantizationRecipe(Scheme(4, 6), activation_clip=0.9)
    assert recipe.block_input(after_norm=True) == ActivationSpec(6, Granularity.TENSOR)
    assert recipe.block_input(after_norm=False) == ActivationSpec(6, Granularity.TOKEN, 0.9)
    assert recipe.head_input(WeightSpec(8)) == ActivationSpec(8, Granularity.TENSOR)
    dynamic = QuantizationRecipe(Scheme(4, 6), activation_clip=0.9, static_after_norm=False)
    assert dynamic.block_input(after_norm=True) == ActivationSpec(6, Granularity.TOKEN, 0.9)
    assert dynamic.head_input(WeightSpec(8)) == ActivationSpec(8, Granularity.TOKEN)


@pytest.mark.parametrize("group_size", [None, 32])
def test_static_scales_for_all_inputs_leave_the_weights_their_groups(
    group_size: int | None,
) -> None:
    recipe = QuantizationRecipe(Scheme(4, 8), static_after_norm="all", group_size=group_size)
    for after_norm in (True, False):
        spec = recipe.block_input(after_norm=after_norm)
        assert spec == ActivationSpec(8, Granularity.TENSOR)
    assert recipe.block_weight() == WeightSpec(4, group_size)
    assert recipe.head_input(WeightSpec(8)) == ActivationSpec(8, Granularity.TENSOR)
    weights_alone = QuantizationRecipe(Scheme(4, 16), static_after_norm="all")
    assert weights_alone.block_input(after_norm=True) == FLOAT_INPUT


def test_defaults_are_the_safe_choices() -> None:
    recipe = QuantizationRecipe(Scheme(8, 8))
    assert recipe.weights is WeightMethod.RTN
    assert recipe.block_weight() == WeightSpec(8)
    assert FLOAT_BITS not in (recipe.embedding_bits, recipe.head_bits)


def test_inputs_without_a_clip_given_are_clipped_at_four_bits_alone() -> None:
    recipe = QuantizationRecipe(Scheme(4, 4))
    ratios = [recipe.block_input(after_norm=False, bits=bits).clip_ratio for bits in (4, 6, 8)]
    assert ratios == [0.7, 1.0, 1.0]


def test_asymmetry_and_groups_are_for_scales_found_at_run_time() -> None:
    recipe = QuantizationRecipe(Scheme(4, 4), asymmetric=True)
    assert recipe.block_input(after_norm=True) == ActivationSpec(4, Granularity.TENSOR)
    expected = ActivationSpec(4, Granularity.TOKEN, 0.7, symmetric=False)
    assert recipe.block_input(after_norm=False) == expected
    grouped = QuantizationRecipe(Scheme(4, 4), activation_group_size=16)
    for after_norm in (False, True):
        spec = grouped.block_input(after_norm=after_norm)
        assert spec == ActivationSpec(4, Granularity.GROUP, 0.9, 16)


def test_a_scheme_with_float_inputs_leaves_the_heads_input_alone_too() -> None:
    recipe = QuantizationRecipe(Scheme(4, 16), group_size=32)
    assert recipe.block_input(after_norm=True) == recipe.head_input(WeightSpec(8)) == FLOAT_INPUT
    assert recipe.block_weight() == WeightSpec(4, 32)
    assert recipe.head_input(WeightSpec(8), 8) == ActivationSpec(8, Granularity.TENSOR)
