from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rolora.decoder import DecoderNames
from rolora.equalization import FIELDS, Equalization
from rolora.rotation import (
    DEFAULT_ROTATIONS,
    RotationKind,
    RotationName,
    RotationPlan,
)
from rolora.rotation_table import Application, Side, applications

R1, R2, R3, R4 = RotationName
ALL = tuple(RotationName)
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(params=RotationKind)
def plan(request: pytest.FixtureRequest, names: DecoderNames) -> RotationPlan:
    return RotationPlan.draw(names, ALL, request.param, seed=5)


def rotations_of(plan: RotationPlan) -> list[Tensor]:
    return [plan.find(name, layer).dense() for name in ALL for layer in (0, 1, 2)]


# --- drawing


def test_all_drawn_matrices_are_orthogonal_and_of_the_models_sizes(
    plan: RotationPlan, names: DecoderNames
) -> None:
    sizes = [names.hidden_size] * 3 + [names.head_dim] * 6 + [names.intermediate_size] * 3
    for dense, size in zip(rotations_of(plan), sizes, strict=True):
        identity = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(dense @ dense.T, identity, rtol=0, atol=32 * size * EPS)


def test_layers_differ_in_r2_only(plan: RotationPlan) -> None:
    r1, _, other_r1, *r2, r3, _, other_r3, r4, _, other_r4 = rotations_of(plan)
    assert torch.equal(r1, other_r1)
    assert torch.equal(r3, other_r3)
    assert torch.equal(r4, other_r4)
    assert not torch.equal(r2[0], r2[1])
    assert not torch.equal(r2[1], r2[2])


def test_all_layers_can_have_the_r2_of_the_first(plan: RotationPlan, names: DecoderNames) -> None:
    shared = RotationPlan.draw(names, ALL, plan.kind, seed=5, one_r2=True)
    for layer in (0, 1, 2):
        assert torch.equal(shared.find(R2, layer).dense(), plan.find(R2, 0).dense())


def test_a_seed_names_one_plan(plan: RotationPlan, names: DecoderNames) -> None:
    assert RotationPlan.draw(names, ALL, plan.kind, seed=5).digest == plan.digest
    assert RotationPlan.draw(names, ALL, plan.kind, seed=6).digest != plan.digest


def test_a_rotation_does_not_depend_on_which_others_are_drawn(
    plan: RotationPlan, names: DecoderNames
) -> None:
    for name in ALL:
        alone = RotationPlan.draw(names, [name], plan.kind, seed=5)
        assert alone.names == {name}
        assert torch.equal(alone.find(name, 1).dense(), plan.find(name, 1).dense())


def test_drawing_leaves_the_global_random_state_alone(names: DecoderNames) -> None:
    before = torch.get_rng_state()
    for kind in RotationKind:
        RotationPlan.draw(names, ALL, kind, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_size_without_hadamard_names_rotation_size_and_way_out(names: DecoderNames) -> None:
    odd = dataclasses.replace(names, intermediate_size=172)
    message = "R4 over intermediate_size = 172: .*--rotation-kind orthogonal"
    with pytest.raises(ValueError, match=message):
        RotationPlan.draw(odd, ALL, RotationKind.HADAMARD, seed=0)
    plan = RotationPlan.draw(odd, ALL, RotationKind.ORTHOGONAL, seed=0)
    assert plan.r4 is not None
    assert (plan.r4.left.shape[0], plan.r4.right.shape[0]) == (4, 43)


def test_a_prime_size_gets_one_dense_matrix(names: DecoderNames) -> None:
    prime = dataclasses.replace(names, intermediate_size=43)
    plan = RotationPlan.draw(prime, [R4], RotationKind.ORTHOGONAL, seed=0)
    assert plan.r4 is not None
    assert (plan.r4.left.shape[0], plan.r4.right.shape[0]) == (1, 43)


def test_a_plan_can_be_given_the_r3_of_its_kind_and_seed(
    plan: RotationPlan, names: DecoderNames
) -> None:
    without = RotationPlan.draw(names, DEFAULT_ROTATIONS, plan.kind, seed=5)
    assert without.names == {R1, R2, R4}
    assert without.r3 is None
    assert without.digest != plan.digest
    assert without.with_r3(names).digest == plan.digest
    assert plan.with_r3(names) is plan


def test_no_rotation_is_a_plan_without_applications(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, [], RotationKind.HADAMARD, seed=0)
    assert plan.names == frozenset()
    assert applications(plan, names) == []
    with pytest.raises(ValueError, match="expected R1 in it"):
        plan.find(R1, 0)


def test_r2_of_a_layer_that_is_not_there_is_refused(plan: RotationPlan) -> None:
    for layer in (None, -1, 3):
        with pytest.raises(ValueError, match="from 0 to 2"):
            plan.find(R2, layer)


# --- saving and loading


def test_saved_plan_is_the_same_plan(plan: RotationPlan, tmp_path: Path) -> None:
    save_file(plan.to_tensors(), tmp_path / "rotation.safetensors")
    metadata = json.loads(json.dumps(plan.to_metadata()))
    loaded = RotationPlan.from_saved(metadata, load_file(tmp_path / "rotation.safetensors"))
    assert (loaded.kind, loaded.seed, loaded.digest) == (plan.kind, plan.seed, plan.digest)
    for ours, theirs in zip(rotations_of(loaded), rotations_of(plan), strict=True):
        assert torch.equal(ours, theirs)


def test_a_hadamard_plan_saves_signs_alone(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, ALL, RotationKind.HADAMARD, seed=0)
    saved = {name: (tensor.dtype, *tensor.shape) for name, tensor in plan.to_tensors().items()}
    assert saved == {
        "R1.signs": (torch.int8, 36),
        "R2.signs": (torch.int8, 3, 12),
        "R3.signs": (torch.int8, 12),
        "R4.left_signs": (torch.int8, 1),
        "R4.right_signs": (torch.int8, 44),
    }
    assert plan.to_metadata()["rotations"]["R4"]["construction"] == "paley1(44) x sylvester(1)"


def test_the_digest_pins_the_hadamard_construction(names: DecoderNames) -> None:
    # A golden value: if it changes, saved rotations of earlier versions are refused. It stands for
    # all signs +1 at sizes 36, 12, 44, and depends on no random generator. It is older than R3.
    plan = RotationPlan.draw(names, DEFAULT_ROTATIONS, RotationKind.HADAMARD, seed=0)
    ones = {name: torch.ones_like(tensor) for name, tensor in plan.to_tensors().items()}
    digest = "4fe0dcb240b740824f421736e2d59353833f77936cccb1923cea2cbeb61525fd"
    saved = plan.to_metadata() | {"digest": digest}
    assert RotationPlan.from_saved(saved, ones).digest == digest


def test_another_hadamard_construction_is_refused(
    names: DecoderNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RotationPlan.draw(names, [R1], RotationKind.HADAMARD, seed=0)
    saved, tensors = plan.to_metadata(), plan.to_tensors()
    original = torch.kron
    monkeypatch.setattr(torch, "kron", lambda a, b: original(a, b).flip(0))
    with pytest.raises(ValueError, match="other Hadamard matrices"):
        RotationPlan.from_saved(saved, tensors)


def test_changed_content_is_refused(plan: RotationPlan) -> None:
    for name, tensor in plan.to_tensors().items():
        changed = tensor.clone()
        changed.flatten()[-1:].neg_() if tensor.dtype == torch.int8 else changed[..., -1, :].neg_()
        with pytest.raises(ValueError, match=f"digest {plan.digest}, got"):
            RotationPlan.from_saved(plan.to_metadata(), plan.to_tensors() | {name: changed})


def test_the_other_plans_tensors_are_refused(plan: RotationPlan, names: DecoderNames) -> None:
    other = RotationPlan.draw(names, ALL, plan.kind, seed=6)
    with pytest.raises(ValueError, match="digest"):
        RotationPlan.from_saved(plan.to_metadata(), other.to_tensors())


def test_a_matrix_that_is_not_orthogonal_is_refused(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, ALL, RotationKind.ORTHOGONAL, seed=0)
    for name, tensor in plan.to_tensors().items():
        for broken in (tensor * (1 + 1e-9), tensor * torch.nan):
            with pytest.raises(ValueError, match=f"{name}: expected an orthogonal matrix"):
                RotationPlan.from_saved(plan.to_metadata(), plan.to_tensors() | {name: broken})
        with pytest.raises(ValueError, match=f"{name}: .*float64 matrices, got torch.float32"):
            RotationPlan.from_saved(plan.to_metadata(), plan.to_tensors() | {name: tensor.float()})
        with pytest.raises(ValueError, match=f"{name}: expected . dimensions"):
            RotationPlan.from_saved(plan.to_metadata(), plan.to_tensors() | {name: tensor[None]})


def test_signs_that_are_no_signs_are_refused(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, ALL, RotationKind.HADAMARD, seed=0)
    for name, tensor in plan.to_tensors().items():
        for value in (0, 2, -128):
            broken = torch.full_like(tensor, value)
            with pytest.raises(ValueError, match=f"{name}: expected signs of"):
                RotationPlan.from_saved(plan.to_metadata(), plan.to_tensors() | {name: broken})
        with pytest.raises(ValueError, match=f"{name}: expected signs in int8"):
            RotationPlan.from_saved(plan.to_metadata(), plan.to_tensors() | {name: tensor.float()})


def test_missing_and_unknown_tensors_are_refused(plan: RotationPlan) -> None:
    tensors = plan.to_tensors()
    with pytest.raises(ValueError, match=r"unknown tensors \['R5.signs'\]"):
        RotationPlan.from_saved(plan.to_metadata(), tensors | {"R5.signs": torch.ones(3)})
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(ValueError, match=f"{name}|digest"):
            RotationPlan.from_saved(plan.to_metadata(), rest)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "magic", "kind: expected one of .*got 'magic'"),
        ("kind", None, "kind: expected one of"),
        ("seed", "5", "seed: expected an integer"),
        ("digest", None, "digest None"),
    ],
)
def test_bad_metadata_is_refused(
    plan: RotationPlan, field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RotationPlan.from_saved(plan.to_metadata() | {field: value}, plan.to_tensors())


def test_a_plan_of_the_other_kind_is_refused(plan: RotationPlan) -> None:
    for other in set(RotationKind) - {plan.kind}:
        with pytest.raises(ValueError, match="unknown tensors"):
            RotationPlan.from_saved(plan.to_metadata() | {"kind": other}, plan.to_tensors())


# --- learned


def test_learning_starts_at_the_random_hadamard_of_the_seed(names: DecoderNames) -> None:
    drawn, start = (
        RotationPlan.draw(names, ALL, kind, seed=5)
        for kind in (RotationKind.HADAMARD, RotationKind.LEARNED)
    )
    for ours, theirs in zip(rotations_of(start), rotations_of(drawn), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * EPS)
    assert start.digest != drawn.digest
    saved = {name: (tensor.dtype, *tensor.shape) for name, tensor in start.to_tensors().items()}
    assert saved == {
        "R1.matrix": (torch.float64, 36, 36),
        "R2.matrix": (torch.float64, 3, 12, 12),
        "R3.signs": (torch.int8, 12),
        "R4.left_signs": (torch.int8, 1),
        "R4.right_signs": (torch.int8, 44),
    }
    constructions = {
        name: "construction" in entry for name, entry in start.to_metadata()["rotations"].items()
    }
    assert constructions == {"R1": False, "R2": False, "R3": True, "R4": True}


def test_learned_matrices_are_put_in_and_checked(names: DecoderNames) -> None:
    start = RotationPlan.draw(names, ALL, RotationKind.LEARNED, seed=0)
    r1, r2 = start.to_tensors()["R1.matrix"], start.to_tensors()["R2.matrix"]
    learned = start.with_matrices(r1.flip(0), r2.flip(1))
    assert torch.equal(learned.find(R1, 0).dense(), r1.flip(0))
    assert torch.equal(learned.find(R2, 2).dense(), r2[2].flip(0))
    assert torch.equal(learned.find(R4, 0).dense(), start.find(R4, 0).dense())
    assert learned.digest != start.digest
    assert start.with_matrices(r1, r2).digest == start.digest
    with pytest.raises(ValueError, match=r"R1.matrix: expected an orthogonal matrix"):
        start.with_matrices(r1 * (1 + 1e-9), r2)
    with pytest.raises(
        ValueError, match=r"R2.matrix: expected shape \(3, 12, 12\), got \(12, 12\)"
    ):
        start.with_matrices(r1, r2[0])
    hadamard = RotationPlan.draw(names, ALL, RotationKind.HADAMARD, seed=0)
    with pytest.raises(ValueError, match="expected one of kind learned, got hadamard"):
        hadamard.with_matrices(r1, r2)


def test_the_digest_pins_the_hadamard_matrix_of_a_learned_plan(
    names: DecoderNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RotationPlan.draw(names, ALL, RotationKind.LEARNED, seed=0)
    saved, tensors = plan.to_metadata(), plan.to_tensors()
    original = torch.kron
    monkeypatch.setattr(torch, "kron", lambda a, b: original(a, b).flip(0))
    with pytest.raises(ValueError, match="other Hadamard matrices"):
        RotationPlan.from_saved(saved, tensors)


# --- the table


def test_every_rotation_that_is_put_on_is_undone(plan: RotationPlan, names: DecoderNames) -> None:
    table = applications(plan, names)
    block = names.blocks[1]
    readers = [
        fqn
        for b in names.blocks
        for fqn in (b.query, b.key, b.value, b.gate, b.up)
    ]  # fmt: skip
    writers = [fqn for b in names.blocks for fqn in (b.output, b.down)]

    def fqns(name: RotationName, *, inverse: bool) -> list[str]:
        return [a.fqn for a in table if a.rotation is name and a.inverse is inverse]

    assert fqns(R1, inverse=False) == [names.embedding, *writers]
    assert fqns(R1, inverse=True) == [*readers, names.head]
    assert [a for a in table if a.rotation is R2 and a.layer == 1] == [
        Application(block.value, Side.OUTPUT, R2, 1, inverse=False, online=False),
        Application(block.output, Side.INPUT, R2, 1, inverse=True, online=False),
    ]
    assert [a for a in table if a.rotation is R3 and a.layer == 1] == [  # undone by q k^T
        Application(block.query, Side.OUTPUT, R3, 1, inverse=False, online=True),
        Application(block.key, Side.OUTPUT, R3, 1, inverse=False, online=True),
    ]
    assert [a for a in table if a.rotation is R4 and a.layer == 1] == [
        Application(block.down, Side.INPUT, R4, 1, inverse=False, online=True),
        Application(block.down, Side.INPUT, R4, 1, inverse=True, online=False),
    ]
    assert all(a.inverse == (a.side is Side.INPUT) for a in table if not a.online)


@pytest.mark.parametrize(
    ("size", "value", "message"),
    [
        ("hidden_size", 40, "R1, hidden_size: expected 40 as in the model, got .* 36"),
        ("head_dim", 8, "R2, head_dim: expected 8"),
        ("intermediate_size", 40, "R4, intermediate_size: expected 40"),
        ("blocks", (), "R2, number of layers: expected 0 .* got .* 3"),
    ],
)
def test_a_plan_for_another_model_is_refused(
    plan: RotationPlan, names: DecoderNames, size: str, value: object, message: str
) -> None:
    other = dataclasses.replace(names, **{size: value})
    with pytest.raises(ValueError, match=message):
        applications(plan, other)


def test_r1_acts_at_run_time_where_a_norm_writes_the_residual_stream(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, [RotationName.R1], RotationKind.ORTHOGONAL, 0)
    assert not any(entry.online for entry in applications(plan, names))
    blocks = [dataclasses.replace(block, mlp_post_norm="norm") for block in names.blocks]
    table = applications(plan, dataclasses.replace(names, blocks=tuple(blocks)))
    readers = [fqn for b in blocks for fqn in (b.query, b.key, b.value, b.gate, b.up)]
    readers.append(names.head)
    for online in (True, False):
        entries = [entry for entry in table if entry.online is online]
        assert [entry.fqn for entry in entries] == readers
        assert all(entry.side is Side.INPUT and entry.inverse is not online for entry in entries)


# --- blocks of channels


def equalized(plan: RotationPlan, names: DecoderNames) -> RotationPlan:
    layers = len(names.blocks)
    values = names.num_key_value_heads * names.head_dim
    widths = (names.hidden_size, values, names.hidden_size, names.intermediate_size)
    scales = [torch.ones(layers, width, dtype=torch.float64) for width in widths]
    head = torch.ones(names.hidden_size, dtype=torch.float64)
    named = dict(zip(FIELDS, (*scales, head), strict=True))
    return plan.with_equalization(Equalization(**named))


DRAWN = pytest.mark.parametrize("kind", [RotationKind.HADAMARD, RotationKind.ORTHOGONAL])


@DRAWN
@pytest.mark.parametrize("scaled", [False, True])
def test_what_acts_at_run_time_can_act_on_blocks(
    names: DecoderNames, kind: RotationKind, scaled: bool, tmp_path: Path
) -> None:
    whole = RotationPlan.draw(names, ALL, kind, seed=5)
    whole = equalized(whole, names) if scaled else whole
    plan = whole.in_blocks(names, 4)
    for name in ALL:
        old, new = whole.find(name, 0), plan.find(name, 0)
        at_run_time = name is R4 or (name is R1 and scaled)
        assert new.size == (4 if at_run_time else old.size)
        if at_run_time:
            assert new.left.tolist() == [[1.0]]
            identity = torch.eye(4, dtype=torch.float64)
            torch.testing.assert_close(new.dense() @ new.dense().T, identity, rtol=0, atol=1e-14)
        else:
            assert torch.equal(new.dense(), old.dense())
    assert applications(plan, names) == applications(whole, names)
    assert plan.digest != whole.digest
    tensors = {key: tensor.contiguous() for key, tensor in plan.to_tensors().items()}
    save_file(tensors, tmp_path / "r.safetensors")
    again = RotationPlan.from_saved(plan.to_metadata(), load_file(tmp_path / "r.safetensors"))
    assert again.digest == plan.digest
    assert again.in_blocks(names, 4).digest == plan.digest
    assert plan.to_metadata()["rotations"]["R4"]["factors"] == [1, 4]


def test_blocks_fit_multiples_of_their_size_and_no_other_width(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, [R4], RotationKind.HADAMARD, 0).in_blocks(names, 4)
    wider = dataclasses.replace(names, intermediate_size=names.intermediate_size + 4)
    assert len(applications(plan, wider)) == len(applications(plan, names))
    odd = dataclasses.replace(names, intermediate_size=names.intermediate_size + 2)
    with pytest.raises(ValueError, match=r"R4, intermediate_size: expected .* got .* with 4"):
        applications(plan, odd)


def test_a_residual_stream_has_no_r1_on_blocks(names: DecoderNames) -> None:
    plan = equalized(RotationPlan.draw(names, [R1], RotationKind.HADAMARD, 0), names)
    stored = plan.in_blocks(names, 4).to_tensors()
    alone = {key: tensor for key, tensor in stored.items() if key.startswith("R1")}
    in_stream = RotationPlan._build(RotationKind.HADAMARD, 0, alone)
    with pytest.raises(ValueError, match=r"R1, hidden_size: expected 36 .* with 4"):
        applications(in_stream, names)


@DRAWN
@pytest.mark.parametrize("size", [-4, 0, 1, 5, 512])
def test_blocks_of_other_sizes_are_refused(
    names: DecoderNames, kind: RotationKind, size: int
) -> None:
    plan = RotationPlan.draw(names, ALL, kind, 0)
    with pytest.raises(ValueError, match=rf"R4 in blocks: .* from 2 to 256 .* got {size}"):
        plan.in_blocks(names, size)


def test_blocks_without_a_hadamard_matrix_are_refused(names: DecoderNames) -> None:
    wide = dataclasses.replace(names, intermediate_size=36)
    plan = RotationPlan.draw(wide, [R4], RotationKind.HADAMARD, 0)
    with pytest.raises(ValueError, match="no construction reaches order 6"):
        plan.in_blocks(wide, 6)
    orthogonal = RotationPlan.draw(wide, [R4], RotationKind.ORTHOGONAL, 0)
    assert orthogonal.in_blocks(wide, 6).find(R4, None).size == 6


def test_a_learned_rotation_keeps_its_matrices(names: DecoderNames) -> None:
    plan = RotationPlan.draw(names, ALL, RotationKind.LEARNED, 0)
    with pytest.raises(ValueError, match="expected one that is drawn, got a learned one"):
        plan.in_blocks(names, 4)
