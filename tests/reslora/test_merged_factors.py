"""Approximate merges and their statistics, against the formulas written out on captured tensors."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from reslora.adapter import Adapter, load_adapter, save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import delta_weights, merge_adapter
from reslora.merge_error import merge_errors
from reslora.merged_factors import MergeMethod, merged_factors
from reslora.shortcut_statistics import ShortcutStatistics, collect_statistics
from tests.reslora.tiny import build_llama, draw_b

INPUT = AdapterConfig(rank=3, alpha=2, structure=Structure.INPUT)
MIDDLE = AdapterConfig(rank=3, alpha=2, structure=Structure.MIDDLE, depth=2)
ESTIMATES = [
    MergeMethod.INPUT_NORM,
    MergeMethod.WEIGHT_NORM,
    MergeMethod.LEAST_SQUARES,
    MergeMethod.LEAST_SQUARES_SCALAR,
]
LAYERS = 4
KIND = "model.layers.{}.self_attn.q_proj"


def make_batches(seed: int, count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of different lengths, padded on either side."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for index in range(count):
        ids = torch.randint(1, 300, (3, 20 + index), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        mask[1, :3] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@dataclasses.dataclass
class Case:
    """A float64 model with a trained-looking adapter, its statistics, and what its layers saw."""

    attached: PeftModel
    plain: LlamaForCausalLM
    adapter: Adapter
    statistics: ShortcutStatistics
    inputs: dict[str, list[Tensor]]
    """Unmasked tokens of each batch, by FQN."""

    def factor(self, layer: int, side: int) -> Tensor:
        return self.adapter.factors[KIND.format(layer)][side].double()

    def stacked(self, layer: int) -> Tensor:
        return torch.cat(self.inputs[KIND.format(layer)])


def build_case(config: AdapterConfig, directory: Path) -> Case:
    plain = build_llama(LAYERS).double()
    llama = copy.deepcopy(plain)
    targets = [
        name for name, _ in llama.named_modules() if name.endswith(("q_proj", "v_proj", "up_proj"))
    ]
    attached = attach_adapters(llama, config, targets)
    draw_b(attached)
    save_adapter(attached, config, directory)
    batches = make_batches(1)
    seen: dict[str, list[Tensor]] = {name: [] for name in targets}
    current: dict[str, Tensor] = {}
    handles = [
        llama.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen[name].append(
                inputs[0].detach()[current["mask"].bool()]
            )
        )
        for name in targets
    ]
    attached.train()  # collecting must not leave it in evaluation mode
    statistics = collect_statistics(attached, Recorder(batches, current), window=3)
    assert attached.training
    for handle in handles:
        handle.remove()
    return Case(attached.eval(), plain, load_adapter(directory), statistics, seen)


class Recorder:
    """Batches that tell which of them is running."""

    def __init__(self, batches: list[dict[str, Tensor]], current: dict[str, Tensor]) -> None:
        self.batches, self.current = batches, current

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            self.current["mask"] = batch["attention_mask"]
            yield batch


@pytest.fixture(scope="module")
def input_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(INPUT, tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def middle_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build_case(MIDDLE, tmp_path_factory.mktemp("middle"))


@pytest.fixture(params=["input", "middle"])
def case(request: pytest.FixtureRequest) -> Case:
    result: Case = request.getfixturevalue(f"{request.param}_case")
    return result


def merged_a(case: Case, method: MergeMethod) -> list[Tensor]:
    factors = dict(merged_factors(case.adapter, method, case.statistics))
    return [factors[KIND.format(n)][0] for n in range(LAYERS)]


def close(got: Tensor, expected: Tensor) -> None:
    # sums of at most 260 tokens x 48 features, each term rounded at the size of the sum
    bound = 4 * torch.finfo(torch.float64).eps * 260 * 48 * float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def mean_norm(values: list[Tensor]) -> Tensor:
    return torch.stack([value.norm() for value in values[-3:]]).mean()  # the window


def test_input_norm_on_inputs(input_case: Case) -> None:
    case = input_case
    f = [mean_norm(case.inputs[KIND.format(n)]) for n in range(LAYERS)]
    alphas = [torch.tensor(1.0), *(f[n - 1] / f[n] for n in range(1, LAYERS))]
    for n, got in enumerate(merged_a(case, MergeMethod.INPUT_NORM)):
        close(got, (1 + alphas[n]) * case.factor(n, 0))
    assert abs(float(alphas[1]) - 1) > 1e-3  # the first ratio is not the fallback


def test_input_norm_on_intermediates(middle_case: Case) -> None:
    case = middle_case
    f = [
        mean_norm([x @ case.factor(n, 0).T for x in case.inputs[KIND.format(n)]])
        for n in range(LAYERS)
    ]
    for n, got in enumerate(merged_a(case, MergeMethod.INPUT_NORM)):
        alpha = sum(float(f[k] / f[n]) for k in range(max(0, n - 2), n))
        close(got, (1 + alpha) * case.factor(n, 0))


def test_weight_norm(case: Case) -> None:
    norms: list[Tensor] = []  # of the merged weights, computed on the weights themselves
    for n, got in enumerate(merged_a(case, MergeMethod.WEIGHT_NORM)):
        a = case.factor(n, 0)
        if case.adapter.config.structure is Structure.INPUT:
            expected = a * (2 if n < 2 else 1 + norms[n - 2] / norms[n - 1])
        else:
            expected = a
            for k in range(max(0, n - 2), n):
                ratio = norms[k - 1] / norms[n - 1] if k > 0 else 1.0
                expected = expected + ratio * case.factor(k, 0)
        close(got, expected)
        weight = case.plain.get_submodule(KIND.format(n)).weight.detach()
        norms.append((weight + INPUT.scaling * case.factor(n, 1) @ expected).norm())
        wrong = (weight + INPUT.scaling * (case.factor(n, 1) @ expected).T).norm()
        assert abs(float(wrong - norms[n])) > 1e-4  # negative control: the other orientation


def earlier(case: Case, n: int) -> Tensor:
    """e_n of every token."""
    if case.adapter.config.structure is Structure.INPUT:
        return case.stacked(max(0, n - 1)) @ case.factor(n, 0).T
    terms = [case.stacked(k) @ case.factor(k, 0).T for k in range(max(0, n - 2), n)]
    return sum(terms, torch.zeros(case.stacked(n).shape[0], 3, dtype=torch.float64))


def test_least_squares_scalar_is_the_best_multiple(case: Case) -> None:
    for n, got in enumerate(merged_a(case, MergeMethod.LEAST_SQUARES_SCALAR)):
        a, b = case.factor(n, 0), case.factor(n, 1)
        own, before = case.stacked(n) @ a.T @ b.T, earlier(case, n) @ b.T
        alpha = (own * before).sum() / own.square().sum()
        close(got, (1 + alpha) * a)

        def missed(multiple: Tensor, own: Tensor = own, before: Tensor = before) -> float:
            return float((multiple * own - own - before).square().sum())

        assert missed(1 + alpha) < missed(1.01 + alpha)
        assert missed(1 + alpha) < missed(0.99 + alpha)


def test_undamped_least_squares_is_the_best_linear_map(case: Case) -> None:
    undamped = dataclasses.replace(case.statistics, damping=0.0)
    factors = dict(merged_factors(case.adapter, MergeMethod.LEAST_SQUARES, undamped))
    for n in range(LAYERS):
        x, a = case.stacked(n), case.factor(n, 0)
        expected = torch.linalg.lstsq(x, x @ a.T + earlier(case, n)).solution.T
        got = factors[KIND.format(n)][0]
        # the normal equations square the condition number
        condition = float(torch.linalg.cond(x)) ** 2
        bound = 4 * torch.finfo(torch.float64).eps * 260 * condition * float(expected.abs().max())
        assert bound < 1e-4
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)
        # negative control: without the own term, and with neighbouring layers confused
        assert float((got + a - expected).abs().max()) > 10 * bound


def test_damping_leads_from_the_best_map_to_the_best_multiple(case: Case) -> None:
    scalar = merged_a(case, MergeMethod.LEAST_SQUARES_SCALAR)
    for n in range(LAYERS):
        x, target = case.stacked(n), case.stacked(n) @ case.factor(n, 0).T + earlier(case, n)
        misses = []
        for damping in (0.0, 0.01, 1.0, 1e3):
            statistics = dataclasses.replace(case.statistics, damping=damping)
            factors = dict(merged_factors(case.adapter, MergeMethod.LEAST_SQUARES, statistics))
            misses.append(float((x @ factors[KIND.format(n)][0].T - target).square().sum()))
        misses.append(float((x @ scalar[n].T - target).square().sum()))
        floor = 1e-20 * float(target.square().sum())
        assert all(a <= b * (1 + 1e-9) + floor for a, b in itertools.pairwise(misses))


def test_the_first_layers_of_a_chain(input_case: Case, middle_case: Case) -> None:
    for method in ESTIMATES:
        close(merged_a(input_case, method)[0], 2 * input_case.factor(0, 0))
        close(merged_a(middle_case, method)[0], middle_case.factor(0, 0))
    close(merged_a(input_case, MergeMethod.DROP)[0], input_case.factor(0, 0))


def test_padding_and_base_weights_are_left_alone(case: Case) -> None:
    before = {name: p.clone() for name, p in case.attached.named_parameters()}
    batches = make_batches(1)
    for batch in batches:
        batch["input_ids"][batch["attention_mask"] == 0] = 7  # other padding, same text
    again = collect_statistics(case.attached, batches, window=3)
    for fqn, layer in case.statistics.layers.items():
        close(again.layers[fqn].cross_moment, layer.cross_moment)
        assert again.layers[fqn].mean_norm == pytest.approx(layer.mean_norm, rel=1e-10)
    assert again.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    unmasked = [{"input_ids": batch["input_ids"]} for batch in batches]
    other = collect_statistics(case.attached, unmasked, window=3)
    fqn = KIND.format(2)
    assert other.layers[fqn].mean_norm != pytest.approx(again.layers[fqn].mean_norm, rel=1e-3)
    assert all(torch.equal(p, before[name]) for name, p in case.attached.named_parameters())


def test_layers_with_one_input_share_its_second_moment(case: Case) -> None:
    layers = case.statistics.layers
    q, v, up = (
        layers[f"model.layers.1.{kind}"].second_moment
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    )
    assert q is not None
    assert q is v
    assert q is not up
    x = case.stacked(1)
    close(q, x.T @ x / x.shape[0])


@pytest.mark.parametrize("method", [*ESTIMATES, MergeMethod.DROP])
def test_reported_errors_are_those_of_the_merged_layers(case: Case, method: MergeMethod) -> None:
    held_out = make_batches(2, count=1)
    errors = {
        error.fqn: error
        for error in merge_errors(case.attached, case.adapter, method, held_out, case.statistics)
    }
    merged = copy.deepcopy(case.plain)
    report = merge_adapter(merged, case.adapter, method, case.statistics)
    assert {layer.blocks for layer in report.layers} == {1}
    keep = held_out[0]["attention_mask"].bool()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        case.attached.get_base_model()
        .get_submodule(fqn)
        .register_forward_hook(
            lambda _, inputs, output, fqn=fqn: seen.update({fqn: (inputs[0], output)})
        )
        for fqn in errors
    ]
    with torch.no_grad():
        case.attached(**held_out[0])
        for fqn, (x, output) in seen.items():
            base: Any = case.plain.get_submodule(fqn)
            missed = (merged.get_submodule(fqn)(x) - output)[keep].norm()
            assert errors[fqn].output_error == pytest.approx(
                float(missed / output[keep].norm()), rel=1e-8, abs=1e-13
            )
            assert errors[fqn].branch_error == pytest.approx(
                float(missed / (output - base(x))[keep].norm()), rel=1e-8, abs=1e-12
            )
    for handle in handles:
        handle.remove()


def test_better_fits_have_smaller_errors_on_what_they_were_fitted_to(case: Case) -> None:
    def branch_errors(method: MergeMethod) -> dict[str, float]:
        statistics = dataclasses.replace(case.statistics, damping=0.0)
        errors = merge_errors(case.attached, case.adapter, method, make_batches(1), statistics)
        return {error.fqn: error.branch_error for error in errors}

    best, scalar, by_input, by_weight = (
        branch_errors(method)
        for method in (
            MergeMethod.LEAST_SQUARES,
            MergeMethod.LEAST_SQUARES_SCALAR,
            MergeMethod.INPUT_NORM,
            MergeMethod.WEIGHT_NORM,
        )
    )
    for fqn in best:
        assert best[fqn] <= scalar[fqn] * (1 + 1e-9) + 1e-9
        assert scalar[fqn] <= by_input[fqn] * (1 + 1e-9) + 1e-9
        if case.adapter.config.structure is Structure.INPUT:  # else it is no multiple of A_n
            assert scalar[fqn] <= by_weight[fqn] * (1 + 1e-9) + 1e-9
    assert sum(best.values()) < 0.9 * sum(scalar.values())


@pytest.mark.parametrize("structure", [Structure.BLOCK, None])
def test_exact_merges_have_no_error(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path, structure: Structure | None
) -> None:
    config = AdapterConfig(rank=3, structure=structure)
    attached = attach_adapters(llama.double(), config, targets)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_adapter(attached, config, tmp_path)
    adapter = load_adapter(tmp_path)
    batches = make_batches(2, count=1)
    for error in merge_errors(attached, adapter, MergeMethod.EXACT, batches):
        assert error.output_error < 1e-13
    if structure is not None:
        dropped = merge_errors(attached, adapter, MergeMethod.DROP, batches)
        assert max(error.output_error for error in dropped) > 1e-2


@pytest.mark.parametrize("method", ESTIMATES)
def test_methods_that_need_statistics_say_so(case: Case, method: MergeMethod) -> None:
    with pytest.raises(ValueError, match=f"'{method}' needs statistics .*collect_statistics"):
        delta_weights(case.adapter, method)
    model = copy.deepcopy(case.plain)
    with pytest.raises(ValueError, match="needs statistics"):
        merge_adapter(model, case.adapter, method)
    before = case.plain.state_dict()
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_statistics_of_something_else_are_refused(case: Case) -> None:
    method = MergeMethod.LEAST_SQUARES
    light = collect_statistics(case.attached, make_batches(1), second_moments=False)
    merged_factors(case.adapter, MergeMethod.INPUT_NORM, light)
    with pytest.raises(ValueError, match="with second_moments=True"):
        merged_factors(case.adapter, method, light)
    factors = {
        fqn: (a + (fqn == KIND.format(3)), b) for fqn, (a, b) in case.adapter.factors.items()
    }
    with pytest.raises(ValueError, match="of other factors"):
        merged_factors(Adapter(case.adapter.config, factors), method, case.statistics)
    del factors[KIND.format(3)]
    with pytest.raises(ValueError, match=r"differ in layers: model.layers.3.self_attn.q_proj"):
        merged_factors(Adapter(case.adapter.config, factors), method, case.statistics)
    config = dataclasses.replace(case.adapter.config, alpha=3.0)
    with pytest.raises(ValueError, match="statistics are of an adapter with"):
        merged_factors(Adapter(config, case.adapter.factors), method, case.statistics)
    wild = dataclasses.replace(case.statistics, damping=-1.0)
    with pytest.raises(ValueError, match="damping must be a number >= 0"):
        merged_factors(case.adapter, method, wild)


def test_too_few_tokens_ask_for_damping(case: Case) -> None:
    few = [{"input_ids": torch.tensor([[5, 6, 7]])}]
    statistics = collect_statistics(case.attached, few)
    undamped = dataclasses.replace(statistics, damping=0.0)
    with pytest.raises(ValueError, match=r"do not span the layer's inputs; use a damping above 0"):
        list(merged_factors(case.adapter, MergeMethod.LEAST_SQUARES, undamped))
    list(merged_factors(case.adapter, MergeMethod.LEAST_SQUARES, statistics))


def test_bad_batches_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="no calibration token reached"):
        collect_statistics(case.attached, [])
    ids = torch.ones(1, 4, dtype=torch.long)
    hidden = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match="no calibration token reached"):
        collect_statistics(case.attached, [hidden])
    whole = {"input_ids": ids, "attention_mask": torch.ones(1, 1, 4, 4)}
    with pytest.raises(ValueError, match=r"attention_mask: expected a tensor \[batch, tokens\]"):
        collect_statistics(case.attached, [whole])
    with pytest.raises(ValueError, match="no token"):
        merge_errors(case.attached, case.adapter, MergeMethod.DROP, [])


def test_an_estimate_of_what_merges_exactly_is_refused(
    llama: LlamaForCausalLM, targets: list[str]
) -> None:
    adapter = Adapter(
        AdapterConfig(rank=2, structure=Structure.BLOCK),
        {"l.0.q": (torch.ones(2, 4), torch.ones(4, 2))},
    )
    with pytest.raises(ValueError, match="merges exactly; use 'exact'"):
        merged_factors(adapter, MergeMethod.INPUT_NORM)
    flat = AdapterConfig(rank=2, structure=Structure.MIDDLE, depth=0)
    with pytest.raises(ValueError, match="merges exactly: it needs no statistics"):
        collect_statistics(attach_adapters(llama, flat, targets), [])
    ((_, (a, _)),) = merged_factors(Adapter(flat, adapter.factors), MergeMethod.EXACT)
    assert torch.equal(a, torch.ones(2, 4).double())
