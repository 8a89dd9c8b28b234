from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reslora.chains import Chain, find_chains


def test_layers_are_linked_in_depth_order_not_name_order() -> None:
    shapes = {f"layers.{i}.attn.q": (8, 8) for i in (10, 2, 0, 1)}
    (chain,) = find_chains(shapes)
    assert chain.kind == "layers.*.attn.q"
    assert chain.fqns == tuple(f"layers.{i}.attn.q" for i in (0, 1, 2, 10))
    assert chain.break_reason is None


def test_kinds_are_separate_chains() -> None:
    shapes = {f"layers.{i}.{kind}": (8, 8) for i in range(3) for kind in ("q", "v")}
    assert [chain.kind for chain in find_chains(shapes)] == ["layers.*.q", "layers.*.v"]


def test_expert_number_is_part_of_the_kind() -> None:
    shapes = {f"layers.{i}.experts.{e}.up": (8, 8) for i in range(2) for e in range(3)}
    chains = find_chains(shapes)
    assert len(chains) == 3
    assert chains[1].fqns == ("layers.0.experts.1.up", "layers.1.experts.1.up")


def test_chain_breaks_where_shapes_differ_and_says_so() -> None:
    shapes = {"l.0.q": (8, 8), "l.1.q": (8, 8), "l.2.q": (8, 4), "l.3.q": (8, 4)}
    first, second = find_chains(shapes)
    assert first.fqns == ("l.0.q", "l.1.q")
    assert second.fqns == ("l.2.q", "l.3.q")
    assert second.break_reason == "l.2.q has shape [8, 4] but l.1.q has [8, 8]"


def test_name_without_layer_index_is_its_own_chain() -> None:
    assert find_chains({"head": (9, 8)}) == [Chain("head", ("head",), (9, 8))]


@pytest.mark.parametrize(
    ("position", "reach", "expected"),
    [(0, -1, (0,)), (3, -1, (3, 2, 1, 0)), (3, 0, (3,)), (3, 2, (3, 2, 1)), (1, 5, (1, 0))],
)
def test_window(position: int, reach: int, expected: tuple[int, ...]) -> None:
    chain = Chain("k", ("a", "b", "c", "d"), (1, 1))
    assert chain.window(position, reach) == expected


@settings(deadline=None)
@given(
    st.dictionaries(
        st.builds("layers.{}.{}".format, st.integers(0, 12), st.sampled_from("qkv")),
        st.tuples(st.integers(1, 3), st.integers(1, 3)),
        min_size=1,
    )
)
def test_every_linear_is_in_exactly_one_chain_of_one_shape(
    shapes: dict[str, tuple[int, int]],
) -> None:
    chains = find_chains(shapes)
    members = [fqn for chain in chains for fqn in chain.fqns]
    assert sorted(members) == sorted(shapes)
    assert all(shapes[fqn] == chain.shape for chain in chains for fqn in chain.fqns)
