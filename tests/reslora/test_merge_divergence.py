"""A merge's figure for the model is that of the model it would give."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from reslora.adapter import Adapter, load_adapter, save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import merge_adapter
from reslora.merge_divergence import CHUNK_TOKENS, Divergence, merge_divergences
from reslora.merged_factors import MergeMethod
from reslora.shortcut_statistics import ShortcutStatistics, collect_statistics
from tests.reslora.tiny import build_llama, draw_b

APPROXIMATIONS = [method for method in MergeMethod if method is not MergeMethod.EXACT]


@dataclass
class Case:
    """A float64 model with an adapter whose B is not zero."""

    plain: LlamaForCausalLM
    attached: PeftModel
    adapter: Adapter
    statistics: ShortcutStatistics | None

    def divergences(
        self, methods: list[MergeMethod], batches: list[dict[str, Tensor]]
    ) -> dict[MergeMethod, Divergence]:
        return merge_divergences(self.attached, self.adapter, methods, batches, self.statistics)


def make_batches(seed: int) -> list[dict[str, Tensor]]:
    """Two padded batches, each of more tokens than a chunk has."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for length in (33, 40):
        ids = torch.randint(1, 300, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        mask[1, :3] = 0
        assert int(mask.sum()) > CHUNK_TOKENS
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def make_case(directory: Path, structure: Structure | None) -> Case:
    plain = build_llama(3).double()
    targets = [name for name, _ in plain.named_modules() if name.endswith(("q_proj", "up_proj"))]
    config = AdapterConfig(rank=3, alpha=2, structure=structure)
    attached = attach_adapters(copy.deepcopy(plain), config, targets)
    draw_b(attached)
    save_adapter(attached, config, directory)
    approximate = structure in (Structure.INPUT, Structure.MIDDLE)
    statistics = collect_statistics(attached, make_batches(1)) if approximate else None
    return Case(plain, attached.eval(), load_adapter(directory), statistics)


def tokens(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return log-probabilities of all unmasked tokens."""
    with torch.no_grad():
        rows = [model(**batch).logits[batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(rows).log_softmax(dim=-1)


@pytest.mark.parametrize("structure", [Structure.INPUT, Structure.MIDDLE])
def test_the_figures_are_those_of_the_merged_model(tmp_path: Path, structure: Structure) -> None:
    case, held_out = make_case(tmp_path, structure), make_batches(2)
    found = case.divergences(APPROXIMATIONS, held_out)
    assert list(found) == APPROXIMATIONS
    log_p = tokens(case.attached, held_out)
    for method, figures in found.items():
        merged = copy.deepcopy(case.plain)
        merge_adapter(merged, case.adapter, method, case.statistics)
        log_q = tokens(merged, held_out)
        kl = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
        reversed_kl = float((log_q.exp() * (log_q - log_p)).sum(dim=-1).mean())
        agreements = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double()
        assert figures.kl_mean == pytest.approx(kl, rel=1e-8)
        assert figures.kl_mean != pytest.approx(reversed_kl, rel=1e-8)
        assert figures.top1_agreement == pytest.approx(float(agreements.mean()), rel=1e-12)
        assert figures.kl_mean > 1e-6
        assert figures.top1_agreement < 1


@pytest.mark.parametrize("structure", [Structure.BLOCK, None])
def test_exact_merges_do_not_diverge(tmp_path: Path, structure: Structure | None) -> None:
    case = make_case(tmp_path, structure)
    found = case.divergences([MergeMethod.EXACT, MergeMethod.DROP], make_batches(2))
    assert abs(found[MergeMethod.EXACT].kl_mean) < 1e-13
    assert found[MergeMethod.EXACT].top1_agreement == 1
    if structure is not None:
        assert found[MergeMethod.DROP].kl_mean > 1e-4


def test_measuring_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    case, held_out = make_case(tmp_path, Structure.INPUT), make_batches(2)
    before = tokens(case.attached, held_out)
    case.attached.train()
    case.divergences([MergeMethod.DROP], held_out)
    assert case.attached.training
    assert torch.equal(tokens(case.attached.eval(), held_out), before)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path, Structure.MIDDLE)
    with pytest.raises(ValueError, match="no held-out token"):
        case.divergences([MergeMethod.DROP], [])
    with torch.no_grad():
        case.attached.get_base_model().get_submodule("lm_head").weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="'drop': logits are not finite"):
        case.divergences([MergeMethod.DROP], make_batches(2))
