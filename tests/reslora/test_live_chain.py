"""Input and middle shortcuts: arithmetic, what outlives a pass, and every way a model is run."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from reslora.attach import attach_adapters, attached_config
from reslora.chains import Chain
from reslora.config import AdapterConfig, Structure
from reslora.layers import ShortcutLinear
from reslora.live_chain import LiveChain, _Replay, recompute_contexts
from tests.reslora.ladder import DOUBLE_EPS, RANK, attached_ladder, ladder_input
from tests.reslora.tiny import build_llama, draw_b

BLOCK = AdapterConfig(rank=RANK, alpha=5, structure=Structure.BLOCK)
INPUT = AdapterConfig(rank=RANK, alpha=5, structure=Structure.INPUT)
MIDDLE = AdapterConfig(rank=RANK, alpha=5, structure=Structure.MIDDLE)
WINDOW = AdapterConfig(rank=RANK, alpha=5, structure=Structure.MIDDLE, depth=2)
BOTH = pytest.mark.parametrize("config", [INPUT, MIDDLE], ids=["input", "middle"])
ALL = pytest.mark.parametrize("config", [INPUT, MIDDLE, WINDOW], ids=["input", "middle", "window"])


def layer_tensors(model: Any, kind: str, x: Tensor) -> list[tuple[Any, Tensor, Tensor]]:
    """Layer, input and output of every linear of a kind in one forward pass."""
    seen: list[tuple[Any, Tensor, Tensor]] = []
    handles = [
        block[kind].register_forward_hook(
            lambda layer, inputs, output: seen.append((layer, inputs[0].detach(), output.detach()))
        )
        for block in model.get_base_model().blocks
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def paper_branch(
    config: AdapterConfig, seen: list[tuple[Any, Tensor, Tensor]], n: int, first: int
) -> Tensor:
    """The paper's formula without dropout, term by term; the window starts at layer `first`."""
    b = seen[n][0].factor("lora_B", "default").detach()
    if config.structure is Structure.INPUT:
        a = seen[n][0].factor("lora_A", "default").detach()
        before = torch.zeros_like(seen[n][1]) if first == n and n > 0 else seen[max(0, n - 1)][1]
        return config.scaling * (seen[n][1] + before) @ a.T @ b.T
    terms = [
        seen[k][1] @ seen[k][0].factor("lora_A", "default").detach().T for k in range(first, n)
    ]
    own = seen[n][1] @ seen[n][0].factor("lora_A", "default").detach().T
    return config.scaling * sum(terms, own) @ b.T


@ALL
@pytest.mark.parametrize("kind", ["up", "down"])
def test_forward_is_the_papers_sum(config: AdapterConfig, kind: str) -> None:
    model = attached_ladder(config)[0].eval()
    seen = layer_tensors(model, kind, ladder_input())
    assert len(seen) == 5
    for n, (layer, x, output) in enumerate(seen):
        first = {INPUT: max(0, n - 1), MIDDLE: 0, WINDOW: max(0, n - 2)}[config]
        base = layer.get_base_layer()(x).detach()
        expected = base + paper_branch(config, seen, n, first)
        # fan-in and rank additions for each of the terms, rounding at the size of the summands
        sizes = [
            config.scaling
            * s.abs()
            @ la.factor("lora_A", "default").detach().abs().T
            @ layer.factor("lora_B", "default").detach().abs().T
            for la, s, _ in seen[: n + 1]
        ]
        magnitude = float(max(size.max() for size in sizes)) + float(base.abs().max())
        bound = 4 * DOUBLE_EPS * (13 + RANK) * 6 * magnitude
        torch.testing.assert_close(output, expected, rtol=0, atol=bound)
        if n > 0:  # negative control: the farthest term left out
            short = base + paper_branch(config, seen, n, first + 1)
            assert float((output - short).abs().max()) > 1e6 * bound


def test_the_first_input_block_sees_its_input_twice() -> None:
    model = attached_ladder(INPUT)[0].eval()
    layer, x, output = layer_tensors(model, "up", ladder_input())[0]
    a, b = (layer.factor(side, "default").detach() for side in ("lora_A", "lora_B"))
    expected = layer.get_base_layer()(x).detach() + INPUT.scaling * (2 * x) @ a.T @ b.T
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)


@BOTH
def test_depth_zero_is_lora_to_the_bit(config: AdapterConfig) -> None:
    plain = attached_ladder(AdapterConfig(rank=RANK, alpha=5))[0]
    zero = attached_ladder(AdapterConfig(RANK, 5, structure=config.structure, depth=0))[0]
    deep = attached_ladder(config)[0]
    zero.load_state_dict(plain.state_dict())
    deep.load_state_dict(plain.state_dict())
    x = ladder_input()
    assert torch.equal(zero(x), plain(x))
    assert not torch.equal(deep(x), plain(x))


def test_an_input_shortcut_reaches_one_layer_whatever_the_depth() -> None:
    outputs = [
        attached_ladder(AdapterConfig(RANK, structure=Structure.INPUT, depth=depth))[0](
            ladder_input()
        )
        for depth in (-1, 1, 4)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


class Stub:
    """A block that is never asked for factors."""

    def factor(self, side: str, adapter_name: str) -> Tensor:
        raise AssertionError


@settings(deadline=None)
@given(length=st.integers(1, 7), reach=st.integers(-1, 8).filter(lambda reach: reach != 0))
def test_a_chain_hands_on_the_sum_of_its_window(length: int, reach: int) -> None:
    chain = Chain("k", tuple(f"l.{i}" for i in range(length)), (1, 1))
    link = LiveChain(chain, [Stub()] * length, reach)
    for _ in range(2):  # nothing of the first pass is in the second
        for position in range(length):
            got = link.earlier_sum(position, torch.tensor([10.0**position]).double())
            expected = sum(10.0**k for k in chain.window(position, reach)[1:])
            assert (0.0 if got is None else float(got)) == expected


def test_each_thread_has_a_pass_of_its_own() -> None:
    link = LiveChain(Chain("k", ("l.0", "l.1"), (1, 1)), [Stub()] * 2, -1)

    def run(first: float) -> Tensor | None:
        link.earlier_sum(0, torch.tensor([first]))
        barrier.wait(timeout=30)
        return link.earlier_sum(1, torch.zeros(1))

    barrier = Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(run, (1.0, 2.0))) == [torch.tensor([1.0]), torch.tensor([2.0])]


@ALL
def test_gradients_are_those_of_the_formula(config: AdapterConfig) -> None:
    model = attached_ladder(config, depth=4)[0].eval()
    x = ladder_input()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = [model.get_parameter(name) for name in names]
    got = torch.autograd.grad(model(x).square().sum(), weights)
    expected = torch.autograd.grad(written_out(model, config, x).square().sum(), weights)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    # negative control: the shortcut detached
    cut = torch.autograd.grad(written_out(model, config, x, cut=True).square().sum(), weights)
    assert max(float((a - b).abs().max()) for a, b in zip(got, cut, strict=True)) > 1e-2


def written_out(model: Any, config: AdapterConfig, x: Tensor, *, cut: bool = False) -> Tensor:
    """The ladder with its shortcuts as one expression, without any of our code."""
    earlier: dict[str, list[Tensor]] = {"up": [], "down": []}

    def linear(layer: Any, kind: str, x: Tensor) -> Tensor:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if config.structure is Structure.INPUT:
            before = [earlier[kind][-1] if earlier[kind] else x]
            own = x
        else:
            own = x @ a.T
            before = earlier[kind][-config.depth if config.depth > 0 else 0 :]
        before = [tensor.detach() if cut else tensor for tensor in before]
        total = sum(before, own)
        earlier[kind].append(own)
        inner = total @ a.T if config.structure is Structure.INPUT else total
        result: Tensor = layer.get_base_layer()(x) + config.scaling * inner @ b.T
        return result

    for block in model.get_base_model().blocks:
        x = x + linear(block["down"], "down", torch.tanh(linear(block["up"], "up", x)))
    return x


@ALL
def test_nothing_outlives_a_pass(config: AdapterConfig) -> None:
    model = attached_ladder(config)[0].train()
    alive: list[weakref.ref[Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: alive.append(weakref.ref(inputs[0])))
        for module in model.modules()
        if isinstance(module, ShortcutLinear)
    ]
    output = model(ladder_input())
    output.square().sum().backward()
    del output
    for handle in handles:
        handle.remove()
    gc.collect()
    assert len(alive) == 10
    assert [reference() for reference in alive] == [None] * 10


@ALL
def test_an_interrupted_pass_leaves_no_trace(config: AdapterConfig) -> None:
    model = attached_ladder(config)[0].eval()
    x = ladder_input()
    expected = model(x)
    last = model.get_base_model().blocks[3]["down"].get_base_layer()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(2 * x)
    handle.remove()
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


@BOTH
def test_layers_out_of_order_are_refused(config: AdapterConfig) -> None:
    model = attached_ladder(config)[0].eval()
    blocks = model.get_base_model().blocks
    with pytest.raises(ValueError, match=r"blocks.3.up: blocks.2.up did not run just before it"):
        blocks[3]["up"](ladder_input())
    blocks[0]["up"](ladder_input())
    with pytest.raises(ValueError, match=r"blocks.1.up: got \[3, .*\], earlier layers left \[7, "):
        blocks[1]["up"](ladder_input()[:3])
    blocks[0]["up"](ladder_input())
    blocks[1]["up"](ladder_input())
    with pytest.raises(ValueError, match=r"blocks.1.up: blocks.0.up did not run just before"):
        blocks[1]["up"](ladder_input())


@BOTH
def test_disabled_adapter_is_the_base_layer_and_peft_cannot_merge(config: AdapterConfig) -> None:
    model, original = attached_ladder(config)
    x = ladder_input()
    with model.disable_adapter():
        assert torch.equal(model(x), original(x))
    with pytest.raises(ValueError, match=r"blocks.0.up: the .* shortcut is no function"):
        model.merge_adapter()
    assert torch.equal(
        model.get_base_model().blocks[0]["up"].get_base_layer().weight,
        original.blocks[0]["up"].weight,
    )
    assert not torch.equal(model(x), original(x))


@BOTH
def test_a_chain_starts_anew_where_shapes_differ(
    llama: LlamaForCausalLM, config: AdapterConfig
) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    llama.model.layers[2].self_attn.q_proj = nn.Linear(20, 24)
    attach_adapters(llama, config, names)
    layers: Any = [llama.get_submodule(name) for name in names]
    assert [layer.position for layer in layers] == [0, 1, 0, 0]
    assert len({id(layer.link) for layer in layers}) == 3


@pytest.fixture(
    scope="module",
    params=[BLOCK, INPUT, MIDDLE, WINDOW],
    ids=["block", "input", "middle", "window"],
)
def attached_llama(request: pytest.FixtureRequest) -> tuple[Any, LlamaForCausalLM]:
    llama = build_llama().double()
    endings = ("q_proj", "v_proj", "down_proj")
    targets = [name for name, _ in llama.named_modules() if name.endswith(endings)]
    model = attach_adapters(llama, request.param, targets)
    draw_b(model)
    return model.eval(), llama


def test_decoding_with_a_cache_is_the_full_pass(
    attached_llama: tuple[Any, LlamaForCausalLM],
) -> None:
    model, _ = attached_llama
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :7], use_cache=True)
        pieces, cache = [first.logits], first.past_key_values
        for token in range(7, 12):
            step = model(ids[:, token : token + 1], past_key_values=cache, use_cache=True)
            pieces.append(step.logits)
        with model.disable_adapter():
            without = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert float((without - whole).abs().max()) > 1e-2
    told = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(
        model.generate(input_ids=ids, use_cache=True, **told),
        model.generate(input_ids=ids, use_cache=False, **told),
    )


def gradients(model: Any, *batches: Tensor, interleaved: bool = True) -> dict[str, Tensor]:
    """Accumulated gradients; not interleaved: all forward passes before any backward pass."""
    model.train()
    model.zero_grad()
    losses = []
    for ids in batches:
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        if interleaved:
            losses.pop().backward()
    for loss in losses:
        loss.backward()
    model.eval()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _zero(received: Tensor | None) -> Tensor | None:
    return None if received is None else 0 * received


def test_recomputed_activations_give_the_same_gradients(
    attached_llama: tuple[Any, LlamaForCausalLM],
) -> None:
    model, llama = attached_llama
    shares_activations = attached_config(model).structure is not Structure.BLOCK
    batches = torch.arange(9)[None], torch.arange(40, 54)[None]
    expected = gradients(model, *batches)
    llama.activation_checkpointing_enable(
        {"use_reentrant": False, "context_fn": recompute_contexts}
    )
    try:
        for interleaved in (True, False):
            recomputed = gradients(model, *batches, interleaved=interleaved)
            assert recomputed.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(recomputed[name], gradient, rtol=1e-10, atol=1e-12)
        if not shares_activations:
            return
        # negative control: the repetition receives nothing from earlier layers
        take = _Replay.take
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Replay, "take", lambda tape: _zero(take(tape)))
            wrong = gradients(model, *batches)
        differences = [float((wrong[name] - expected[name]).abs().max()) for name in expected]
        assert max(differences) > 1e-3
    finally:
        llama.activation_checkpointing_disable()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_without_the_contexts_is_refused(
    attached_llama: tuple[Any, LlamaForCausalLM], reentrant: bool
) -> None:
    model, llama = attached_llama
    if attached_config(model).structure is Structure.BLOCK:
        pytest.skip("block shares no activations")
    llama.activation_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    try:
        with pytest.raises(ValueError, match=r"layers.3.* 'context_fn': reslora.live_chain"):
            gradients(model, torch.arange(9)[None])
    finally:
        llama.disable_input_require_grads()
        llama.activation_checkpointing_disable()
        model.eval()


@BOTH
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks
def test_compiled_models_compute_and_learn_the_same(config: AdapterConfig) -> None:
    model = attached_ladder(config, depth=3)[0].eval()
    x = ladder_input()
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = model(x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), weights)
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(output.square().sum(), weights)
    for ours, theirs in zip(got, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
