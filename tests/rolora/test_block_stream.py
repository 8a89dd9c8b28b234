from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rolora.block_stream import BlockStream, KnownRows
from rolora.calibration import RangeObserver, observe_inputs
from rolora.decoder import BlockNames, DecoderNames
from rolora.online import install_online_rotations
from rolora.rotation import RotationKind, RotationName, RotationPlan

MakeDecoder = Callable[..., Any]
BATCHES = [
    {"input_ids": torch.arange(9)[None]},
    {"input_ids": (torch.arange(14) * 5 % 53).reshape(2, 7)},
    {
        "input_ids": (torch.arange(10) * 3 % 53).reshape(2, 5),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    },
]


def linears(block: BlockNames) -> tuple[str, ...]:
    return (block.query, block.output, block.gate, block.down)


def full_forward_inputs(model: nn.Module, fqns: Iterable[str]) -> dict[str, list[Tensor]]:
    """Return the first input of each module in a plain forward pass of each batch."""
    seen: dict[str, list[Tensor]] = {fqn: [] for fqn in fqns}
    handles = [
        model.get_submodule(fqn).register_forward_pre_hook(
            lambda _module, inputs, fqn=fqn: seen[fqn].append(inputs[0].clone())
        )
        for fqn in seen
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def moments(inputs: list[Tensor]) -> Tensor:
    x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]).double()
    return x.t() @ x


def hessian(stream: BlockStream, block: BlockNames, fqn: str) -> Tensor:
    """Return the second moments of a linear's input; the stream stays where it is."""
    states = stream.states
    inputs = stream.advance(block, kept=[fqn])[fqn]
    stream.states = states
    moments = stream.moments(block, fqn, inputs)
    assert torch.equal(moments.cross, moments.hessian)
    return moments.hessian


def assert_moments(got: Tensor, inputs: list[Tensor]) -> None:
    expected = moments(inputs)
    assert got.dtype == torch.float32
    # Inputs are rounded to float32 and 33 products summed in it, none above the largest diagonal.
    bound = 40 * torch.finfo(torch.float32).eps * float(expected.diagonal().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


def test_states_and_moments_are_those_of_the_full_forward(
    make_decoder: MakeDecoder, model_type: str
) -> None:
    decoder = make_decoder(model_type)
    model, names = decoder.model, decoder.names
    blocks = [block.fqn for block in names.blocks]
    wanted = [*blocks, *(fqn for block in names.blocks for fqn in linears(block))]
    seen = full_forward_inputs(model, wanted)
    stream = BlockStream(model, names, BATCHES)
    for fqn, block in zip(blocks, names.blocks, strict=True):
        for got, expected in zip(stream.states, seen[fqn], strict=True):
            assert torch.equal(got, expected)
        for linear in linears(block):
            assert_moments(hessian(stream, block, linear), seen[linear])
        stream.advance(block)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_moments_of_another_block_are_others(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    first, second = decoder.names.blocks[:2]
    seen = full_forward_inputs(decoder.model, [first.query, second.query])
    stream = BlockStream(decoder.model, decoder.names, BATCHES)
    with pytest.raises(AssertionError, match="not close"):
        assert_moments(hessian(stream, first, first.query), seen[second.query])


@pytest.mark.parametrize("kind", RotationKind)
def test_moments_are_taken_behind_the_online_rotation(
    make_decoder: MakeDecoder, kind: RotationKind
) -> None:
    decoder = make_decoder("llama")
    block = decoder.names.blocks[0]
    plain = full_forward_inputs(decoder.model, [block.down])[block.down]
    plan = RotationPlan.draw(decoder.names, [RotationName.R4], kind, seed=1)
    install_online_rotations(decoder.model, plan, decoder.names)
    assert plan.r4 is not None
    got = hessian(BlockStream(decoder.model, decoder.names, BATCHES), block, block.down)
    assert_moments(got, [x @ plan.r4.dense() for x in plain])
    with pytest.raises(AssertionError, match="not close"):
        assert_moments(got, plain)


def test_a_block_sees_what_the_changed_blocks_before_it_make(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("qwen2")
    model, (first, second, _) = decoder.model, decoder.names.blocks
    before = full_forward_inputs(model, [first.down, second.query])
    stream = BlockStream(model, decoder.names, BATCHES)
    # A changed linear is seen at once by those behind it in its block ...
    up = model.get_submodule(first.up)
    model.get_submodule(first.up.rpartition(".")[0]).up_proj = nn.Sequential(up, nn.ReLU())
    after = full_forward_inputs(model, [first.down, second.query])
    got = hessian(stream, first, first.down)
    assert_moments(got, after[first.down])
    with pytest.raises(AssertionError, match="not close"):
        assert_moments(got, before[first.down])
    # ... and after the advance by the next block.
    stream.advance(first)
    got = hessian(stream, second, second.query)
    assert_moments(got, after[second.query])
    with pytest.raises(AssertionError, match="not close"):
        assert_moments(got, before[second.query])


def test_cross_moments_pair_each_token_of_two_models(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    model, block = decoder.model, decoder.names.blocks[0]
    streams = [BlockStream(model, decoder.names, BATCHES) for _ in range(2)]
    before = full_forward_inputs(model, [block.down])[block.down]
    kept = streams[0].advance(block, kept=[block.query, block.down])
    assert [len(inputs) for inputs in kept.values()] == [len(BATCHES)] * 2
    up = model.get_submodule(block.up)
    model.get_submodule(block.up.rpartition(".")[0]).up_proj = nn.Sequential(up, nn.ReLU())
    after = full_forward_inputs(model, [block.down])[block.down]
    got = streams[1].moments(block, block.down, kept[block.down])
    assert_moments(got.hessian, after)
    x, own = (
        torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs]).double()
        for inputs in (before, after)
    )
    bound = 40 * torch.finfo(torch.float32).eps * float((x.t() @ x).diagonal().max())
    torch.testing.assert_close(got.cross.double(), x.t() @ own, rtol=0, atol=bound)
    with pytest.raises(AssertionError, match="not close"):  # the control: x' x^T is another
        torch.testing.assert_close(got.cross.double(), own.t() @ x, rtol=0, atol=bound)


def test_without_batches_the_linear_is_named(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    block = decoder.names.blocks[0]
    stream = BlockStream(decoder.model, decoder.names, [])
    with pytest.raises(ValueError, match=rf"{block.query}: no calibration input"):
        stream.moments(block, block.query, [])


def test_a_forward_that_fails_leaves_no_hook(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    with pytest.raises(IndexError):
        BlockStream(decoder.model, decoder.names, [{"input_ids": torch.tensor([[10**6]])}])
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


def test_the_model_still_runs_to_its_end(make_decoder: MakeDecoder, names: DecoderNames) -> None:
    decoder = make_decoder("llama")
    before = decoder.logits()
    stream = BlockStream(decoder.model, names, BATCHES)
    stream.advance(names.blocks[0])
    assert torch.equal(decoder.logits(), before)


def test_ranges_seen_on_the_way_are_those_of_the_full_forward(
    make_decoder: MakeDecoder, model_type: str
) -> None:
    decoder = make_decoder(model_type)
    model, names = decoder.model, decoder.names
    wanted = [fqn for block in names.blocks for fqn in linears(block)]
    expected = observe_inputs(model, wanted, BATCHES[:2])
    stream = BlockStream(model, names, BATCHES[:2])
    observers = {fqn: RangeObserver() for fqn in wanted}
    for block in names.blocks:
        stream.advance(block, {fqn: observers[fqn] for fqn in linears(block)})
    for fqn in wanted:
        assert observers[fqn].limit == expected[fqn].limit
        assert torch.equal(observers[fqn].counts, expected[fqn].counts), fqn
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_known_rows_stand_for_the_embedding(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    model, names = decoder.model, decoder.names
    own = model.get_submodule(names.embedding)
    tokens = torch.unique(torch.cat([batch["input_ids"].flatten() for batch in BATCHES]))
    assert 0 < len(tokens) < len(own.weight)
    rows = own.weight.detach()[tokens]
    expected = BlockStream(model, names, BATCHES).states
    found = BlockStream(model, names, BATCHES, KnownRows(tokens, rows)).states
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model.get_submodule(names.embedding) is own
    other = BlockStream(model, names, BATCHES, KnownRows(tokens, rows.flip(0))).states
    assert not torch.equal(other[0], expected[0])
