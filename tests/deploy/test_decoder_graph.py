"""The float graph against transformers' own model: what holds here holds for every kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deploy.attention_inputs import attention_inputs, rotary_tables
from deploy.checkpoint import Checkpoint
from deploy.decoder_graph import DecoderGraph
from deploy.errors import ConfigError, UnsupportedModelError
from deploy.graph_builder import GraphBuilder, graph_value, name_output
from deploy.parity import relative_error
from deploy.session import GRAPH_NAME, OnnxDecoder
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
PART_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
GEMMA = {
    "query_pre_attn_scalar": 40,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 30.0,
    "sliding_window": 16,
}
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", "none", {"attention_bias": True, "mlp_bias": True}),
    "llama rotated, tied": ("llama", None, {"tied": True}),
    "llama rotated, llama3 rope": ("llama", None, {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear rope": (
        "llama",
        "none",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, many heads": ("llama", "r1", {"num_key_value_heads": 4}),
    "mistral, full": ("mistral", "none", {"sliding_window": None}),
    "mistral rotated, window": ("mistral", None, {"sliding_window": 16}),
    "qwen2": ("qwen2", "none", {}),
    "qwen2 rotated, tied, upper window": (
        "qwen2",
        None,
        {
            "tied": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", "none", {"tied": True}),
    "qwen3 rotated": ("qwen3", "r1,r2,r4", {}),
    "gemma2": ("gemma2", "none", GEMMA | {"tied": True}),
    "gemma2 rotated": ("gemma2", None, GEMMA | {"tied": False}),
    "gemma3": (
        "gemma3_text",
        "none",
        {"query_pre_attn_scalar": 40, "sliding_window": 16, "tied": True},
    ),
    "gemma3 rotated, linear rope": (
        "gemma3_text",
        "r1,r2",
        {
            "sliding_window": 16,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 1.5,  # which transformers ignores
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3, window": ("phi3", "none", {"sliding_window": 16}),
    "phi3 rotated, longrope": (
        "phi3",
        None,
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48, "hidden_size": 64},
    ),
    "phi3 rotated, part of each head, tied": (
        "phi3",
        None,
        {"rope_parameters": PART_ROPE, "tied": True, "hidden_size": 128, "head_dim": 32},
    ),
}
BOUND = 1e-4
TOKENS = 40


class Case:
    """One model as transformers runs it, its FP32 checkpoint and its export."""

    def __init__(self, base: Path, model_type: str, rotate: str | None, options: Any) -> None:
        source = save_model(base / "model", model_type, **options)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source).eval()
        self.checkpoint = make_checkpoint(source, base / "checkpoint", "FP32", rotate=rotate)
        self.export = base / "onnx"
        self.report = make_export(self.checkpoint, self.export)
        self.ids = np.random.default_rng(0).integers(6, 262, (2, TOKENS))

    def expected(self, ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = self.model(input_ids=torch.from_numpy(ids)).logits.numpy()
        return logits


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    return Case(tmp_path_factory.mktemp("case"), *CASES[request.param])


def test_logits_of_a_batch_equal_transformers_own_at_prefill_and_over_the_cache(case: Case) -> None:
    expected = case.expected(case.ids)
    with OnnxDecoder(case.export, threads=1) as decoder:
        decoder.start(capacity=TOKENS, batch=2)
        found = [decoder.append(case.ids[:, :30])]
        found += [decoder.append(case.ids[:, i : i + 1]) for i in range(30, TOKENS)]
        decoder.start(capacity=TOKENS)
        alone = np.concatenate(
            [decoder.append(case.ids[1:, :30])[0], decoder.append(case.ids[1:, 30:])[0]]
        )
    logits = np.concatenate(found, axis=1)
    for row in range(2):
        assert relative_error(logits[row, :30], expected[row, :30]) < BOUND
        assert relative_error(logits[row, 30:], expected[row, 30:]) < BOUND
    assert relative_error(alone, expected[1]) < BOUND


def test_prompts_of_different_lengths_go_on_as_transformers_own(case: Case) -> None:
    """Padded on the left there, on the right here; a token of each follows over the cache."""
    lengths = np.array([30, 19])
    rows = [case.ids[row, : length + 1] for row, length in enumerate(lengths)]
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(2, longest, dtype=torch.int64) for _ in range(2))
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = torch.from_numpy(tokens)
        mask[row, longest - len(tokens) :] = 1
    with torch.inference_mode():
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        expected = case.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    with OnnxDecoder(case.export, threads=1) as decoder:
        decoder.start(capacity=TOKENS, batch=2)
        prompts = decoder.append(case.ids[:, :30], lengths, last_only=True)
        steps = decoder.append(np.stack([row[-1:] for row in rows]))
    found = np.concatenate([prompts, steps], axis=1)
    for row in range(2):
        assert relative_error(found[row], expected[row, -2:].numpy()) < BOUND


def test_a_token_changes_only_what_follows_it(case: Case) -> None:
    other = case.ids[0].copy()
    other[20] = 6 + (other[20] - 5) % 256
    with OnnxDecoder(case.export, threads=1) as decoder:
        a, b = decoder.logits(case.ids[0]), decoder.logits(other)
    np.testing.assert_array_equal(a[:20], b[:20])
    assert relative_error(b[20:], a[20:]) > 10 * BOUND


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama rotated, llama3 rope", {"rope_parameters": {"rope_theta": 1e4}}),
        ("mistral rotated, window", {"sliding_window": 15}),
        ("mistral rotated, window", {"sliding_window": 17}),
        ("qwen3", {"rms_norm_eps": 1e-3}),
    ],
)
def test_another_configuration_lies_outside_the_bound(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(tmp_path, *CASES[name])
    with Checkpoint(case.checkpoint) as checkpoint:
        for key, value in change.items():
            setattr(checkpoint.config, key, value)
        ir.save(DecoderGraph(checkpoint).build(), case.export / GRAPH_NAME)
    with OnnxDecoder(case.export, threads=1) as decoder:
        found = decoder.logits(case.ids[0])
    assert relative_error(found, case.expected(case.ids[:1])[0]) > BOUND


def test_the_graph_is_lean(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", None, {"num_hidden_layers": 3})
    operators = case.report.to_dict()["operators"]
    assert operators["GroupQueryAttention"] == operators["If"] == 3
    domains = case.report.manifest.details["operator_domains"]
    assert sum(domains.values()) == sum(operators.values())
    assert operators["SkipSimplifiedLayerNormalization"] == 2 * 3
    assert operators["SimplifiedLayerNormalization"] == 1
    # packed qkv, output, gate, up, down, and two for R4; the head
    assert operators["MatMul"] == 3 * 7 + 1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        LLAMA3_ROPE,
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_tables_equal_transformers_own(rope: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=rope
    )
    cos, sin = rotary_tables(config)
    assert cos.shape == sin.shape == (128, 8)
    assert cos.dtype == np.float32
    expected = LlamaRotaryEmbedding(config=config)(torch.zeros(1), torch.arange(128)[None])
    for found, reference in zip((cos, sin), expected, strict=True):
        np.testing.assert_allclose(found, reference[0, :, :8].numpy(), rtol=0, atol=1e-6)
    for computed, stored in zip(tables_at_load(config), (cos, sin), strict=True):
        np.testing.assert_allclose(computed, stored, rtol=0, atol=2e-7)


def tables_at_load(config: LlamaConfig, dtype: ir.DataType = ir.DataType.FLOAT) -> list[np.ndarray]:
    """Return cos and sin as ONNX Runtime computes them from what a graph says."""
    graph = GraphBuilder("tables")
    mask, ids = (graph_value(name, ir.DataType.INT64, (1, "length")) for name in ("mask", "ids"))
    tables = attention_inputs(graph, mask, config, ids, dtype).rotary[None]
    outputs = [
        name_output(table, name, dtype, ("context", "half"))
        for table, name in zip(tables, ("cos", "sin"), strict=True)
    ]
    model = ir.to_proto(graph.build([mask], outputs)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"mask": np.ones((1, 1), np.int64)})
    return found


def test_rotary_tables_of_a_long_context_are_computed_and_not_stored() -> None:
    config = LlamaConfig(
        hidden_size=2048, num_attention_heads=32, max_position_embeddings=131_072
    )  # the greatest angle is 131,071
    tables = rotary_tables(config)
    for computed, stored in zip(tables_at_load(config), tables, strict=True):
        np.testing.assert_allclose(computed, stored, rtol=0, atol=2e-7)
    for computed, stored in zip(tables_at_load(config, ir.DataType.FLOAT16), tables, strict=True):
        assert computed.dtype == np.float16
        np.testing.assert_allclose(computed, stored, rtol=0, atol=2**-11)
    graph = GraphBuilder("tables")
    mask, ids = (graph_value(name, ir.DataType.INT64, (1, "length")) for name in ("mask", "ids"))
    inputs = attention_inputs(graph, mask, config, ids)
    model = graph.build([mask], list(inputs.rotary[None]))
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < 1024


def test_longrope_is_exported_for_the_original_window_only(tmp_path: Path) -> None:
    case = Case(tmp_path, *CASES["phi3 rotated, longrope"])
    assert case.model.config.max_position_embeddings == 128
    assert case.report.manifest.details["context_length"] == 48
    ids = np.random.default_rng(1).integers(6, 262, 48)
    with OnnxDecoder(case.export, threads=1) as decoder:
        assert relative_error(decoder.logits(ids), case.expected(ids[None])[0]) < BOUND
        with pytest.raises(ConfigError, match="49 tokens do not fit the context length of 48"):
            decoder.start(capacity=49)
    # beyond it transformers turns even the first positions otherwise
    longer = case.expected(np.concatenate([ids, ids])[None])[0, :48]
    assert relative_error(longer, case.expected(ids[None])[0]) > BOUND


def test_a_head_size_that_attention_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source = save_model(tmp_path / "model", head_dim=8)
    checkpoint = make_checkpoint(source, tmp_path / "checkpoint", "FP32")
    with pytest.raises(UnsupportedModelError, match=r"turns 8 of the 8.*multiple of 16"):
        make_export(checkpoint, tmp_path / "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]
