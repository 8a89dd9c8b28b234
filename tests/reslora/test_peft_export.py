"""Adapters that leave: what PEFT, on its own, makes of the files."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from reslora.adapter import Adapter, load_adapter, restore_adapter, save_adapter
from reslora.attach import attach_adapters
from reslora.config import AdapterConfig, Structure
from reslora.merge import delta_weights, merge_adapter
from reslora.merged_factors import MergeMethod, needs_statistics
from reslora.peft_export import recompress, to_peft_adapter, write_peft_adapter
from reslora.shortcut_statistics import ShortcutStatistics, collect_statistics

DOUBLE_EPS = torch.finfo(torch.float64).eps
IDS = torch.arange(5, 17)[None]
LOAD_WITHOUT_US = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
model, adapter, output = sys.argv[1:]
model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64)
model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().eval()
assert not [name for name in sys.modules if name.split(".")[0] in ("reslora", "deploy", "rolora")]
with torch.no_grad():
    torch.save(model(torch.arange(5, 17)[None]).logits, output)
"""


def trained(
    model: LlamaForCausalLM, targets: list[str], config: AdapterConfig, directory: Path
) -> tuple[Adapter, ShortcutStatistics | None]:
    attached = attach_adapters(model, config, targets)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(attached, config, directory)
    adapter = load_adapter(directory)
    if not needs_statistics(adapter, MergeMethod.LEAST_SQUARES):
        return adapter, None
    ids = torch.randint(0, 300, (4, 30), generator=generator)
    return adapter, collect_statistics(attached, [{"input_ids": ids}])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("structure", "method", "rank"),
    [
        (None, MergeMethod.EXACT, 3),
        (Structure.BLOCK, MergeMethod.EXACT, 9),
        (Structure.BLOCK, MergeMethod.DROP, 3),
        (Structure.INPUT, MergeMethod.LEAST_SQUARES, 3),
        (Structure.INPUT, MergeMethod.WEIGHT_NORM, 3),
        (Structure.MIDDLE, MergeMethod.LEAST_SQUARES_SCALAR, 3),
        (Structure.MIDDLE, MergeMethod.INPUT_NORM, 3),
    ],
)
def test_peft_loads_what_the_merge_computes(
    llama: LlamaForCausalLM,
    targets: list[str],
    tmp_path: Path,
    structure: Structure | None,
    method: MergeMethod,
    rank: int,
    rslora: bool,
) -> None:
    base, merged, fresh = (copy.deepcopy(llama).double() for _ in range(3))
    config = AdapterConfig(rank=3, alpha=4.5, structure=structure, depth=2, rslora=rslora)
    assert config.scaling == (4.5 / 3**0.5 if rslora else 1.5)
    adapter, statistics = trained(llama.double(), targets, config, tmp_path / "trained")
    plain = to_peft_adapter(adapter, method, statistics, dtype=torch.float64)
    assert (plain.config.rank, plain.config.structure) == (rank, None)
    assert plain.config.scaling == pytest.approx(config.scaling, rel=4 * DOUBLE_EPS)
    write_peft_adapter(plain, tmp_path / "plain")
    loaded: Any = PeftModel.from_pretrained(
        base, str(tmp_path / "plain"), autocast_adapter_dtype=False
    ).eval()
    smallest = float("inf")
    for fqn, delta in delta_weights(adapter, method, statistics):
        layer = loaded.get_base_model().get_submodule(fqn)
        bound = 4 * DOUBLE_EPS * rank * float(delta.abs().max())
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=0, atol=bound)
        # negative control: the scale that PEFT would use had alpha been left as it was
        wrong = layer.get_delta_weight("default") * (config.rank / rank) ** (0.5 if rslora else 1)
        if rank != 3:
            smallest = min(smallest, float((wrong - delta).abs().max()) / bound)
    assert smallest > 1e6
    merge_adapter(merged, adapter, method, statistics)
    torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits, rtol=1e-10, atol=1e-10)
    assert load_adapter(tmp_path / "plain").config == plain.config
    if method is MergeMethod.EXACT:  # what the layers that were trained compute
        attached = attach_adapters(fresh, adapter.config, targets)
        restore_adapter(attached, tmp_path / "trained")
        expected = attached.eval()(IDS).logits
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-10, atol=1e-10)


def test_a_process_without_this_package_reproduces_the_logits(
    llama: LlamaForCausalLM, targets: list[str], tmp_path: Path
) -> None:
    llama = llama.double()
    merged = copy.deepcopy(llama)
    llama.save_pretrained(tmp_path / "model")
    config = AdapterConfig(rank=3, alpha=5, structure=Structure.MIDDLE)
    adapter, statistics = trained(llama, targets, config, tmp_path / "trained")
    plain = to_peft_adapter(adapter, MergeMethod.LEAST_SQUARES, statistics)
    write_peft_adapter(plain, tmp_path / "plain", base_model=str(tmp_path / "model"))
    paths = [str(tmp_path / name) for name in ("model", "plain", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_US, *paths], cwd=tmp_path, check=True)
    before = merged(IDS).logits.detach()
    merge_adapter(merged, adapter, MergeMethod.LEAST_SQUARES, statistics)
    expected = merged(IDS).logits.detach()
    got = torch.load(paths[2])
    assert float((got - expected).norm() / expected.norm()) < 1e-5  # float32 factors
    assert float((before - expected).norm() / expected.norm()) > 1e-2


def random_adapter(rank: int, rows: int, columns: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rank, columns), (rows, rank))
    )
    return Adapter(AdapterConfig(rank=rank, alpha=3), {"l.0.q": (a, b)})


@settings(deadline=None)
@given(
    rank=st.integers(1, 7), rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0)
)
def test_recompression_is_the_best_approximation_and_says_its_error(
    rank: int, rows: int, columns: int, seed: int
) -> None:
    adapter = random_adapter(rank, rows, columns, seed % 2**32)
    (a, b) = adapter.factors["l.0.q"]
    delta: Tensor = adapter.config.scaling * b @ a
    sizes = torch.linalg.svdvals(delta)
    for lower in range(1, rank + 1):
        result = recompress(adapter, lower)
        assert result.adapter.config.rank == lower
        small_a, small_b = result.adapter.factors["l.0.q"]
        assert (small_a.shape, small_b.shape) == ((lower, columns), (rows, lower))
        approximation = result.adapter.config.scaling * small_b @ small_a
        error = float((delta - approximation).norm() / delta.norm())
        bound = 8 * DOUBLE_EPS * (rank + rows + columns)
        assert abs(error - float(sizes[lower:].norm() / sizes.norm())) < bound
        assert abs(error - result.errors["l.0.q"]) < bound


def test_misuse_is_refused(tmp_path: Path) -> None:
    adapter = random_adapter(2, 4, 4, 0)
    for rank in (0, 3):
        with pytest.raises(ValueError, match=f"rank must be from 1 to 2, got {rank}"):
            recompress(adapter, rank)
    linked = Adapter(AdapterConfig(rank=2, structure=Structure.BLOCK), adapter.factors)
    with pytest.raises(ValueError, match="call to_peft_adapter first"):
        recompress(linked, 1)
    with pytest.raises(ValueError, match="call to_peft_adapter first"):
        write_peft_adapter(linked, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    adapter.factors["l.0.q"][0].fill_(1e300)
    with pytest.raises(ValueError, match=r"l.0.q: merged factors are not finite in torch.float32"):
        to_peft_adapter(adapter, MergeMethod.EXACT)
