from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.bench import bench_onnx
from deploy.bench_profile import PROFILE_COLUMNS, profile_onnx
from deploy.bench_report import BenchReport, BenchSettings
from deploy.errors import ArtifactError
from deploy.kernels import Kernel
from deploy.machine_limits import (
    MachineLimits,
    integer_products,
    last_cache_bytes,
    read_bandwidth,
)
from deploy.operator_trace import (
    GraphRun,
    NodeEvent,
    bits_by_node,
    multiply_adds,
    read_runs,
    split_phases,
    weight_bytes,
)
from deploy.session import SEQUENCES_FOR_PROMPT_GRAPH
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model


def shapes(*values: list[int]) -> list[dict[str, list[int]]]:
    return [{"float": value} for value in values]


def node(operator: str, inputs: list[int], output: list[int], name: str = "n") -> NodeEvent:
    return NodeEvent(name, operator, 1.0, shapes(inputs), shapes(output))


def run(number: float) -> GraphRun:
    return GraphRun(number, ())


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("profile")
    model = save_model(base / "model")
    result = {}
    for scheme in ("W8A8", "W4A8"):
        checkpoint = make_checkpoint(model, base / scheme, scheme, weights="rtn")
        result[scheme] = base / f"{scheme}-onnx"
        make_export(checkpoint, result[scheme], Kernel.AUTO)
    return result


def test_products_and_bytes_are_those_of_the_kernels() -> None:
    done = GraphRun(
        1.0,
        (
            node("MatMulIntegerToFloat", [1, 3, 64], [1, 3, 10]),
            node("MatMulNBits", [1, 3, 64], [1, 3, 10], "four"),
            node("MatMul", [1, 3, 64], [1, 3, 10]),
            node("Softmax", [1, 3, 64], [1, 3, 64]),
        ),
    )
    assert multiply_adds(done) == 3 * (3 * 64 * 10)
    scales = 4 * 10
    expected = (640 + scales) + (320 + 2 * scales) + 4 * 640
    assert weight_bytes(done, {"four": (4, 32)}) == expected
    assert weight_bytes(done, {"four": (8, 64)}) == (640 + scales) + (640 + scales) + 4 * 640
    with pytest.raises(ArtifactError, match="no MatMulNBits of the name four"):
        weight_bytes(done, {"other": (4, 32)})


def test_prompts_and_tokens_of_one_graph_are_told_apart_and_the_first_round_is_left_out() -> None:
    one_graph = [run(number) for number in range(12)]  # 3 repetitions: 2 pieces and 2 tokens
    prompts, tokens = split_phases(one_graph, one_graph, runs=2, steps=2)
    assert [[r.microseconds for r in prompt] for prompt in prompts] == [[4, 5], [8, 9]]
    assert [r.microseconds for r in tokens] == [6, 7, 10, 11]
    of_prompts, of_tokens = [run(n) for n in range(6)], [run(n) for n in range(9)]
    prompts, tokens = split_phases(of_prompts, of_tokens, runs=2, steps=3)
    assert [[r.microseconds for r in prompt] for prompt in prompts] == [[2, 3], [4, 5]]
    assert [r.microseconds for r in tokens] == [3, 4, 5, 6, 7, 8]
    with pytest.raises(ArtifactError, match="recorded 11 runs for prompts"):
        split_phases(one_graph[:11], one_graph, runs=2, steps=2)
    with pytest.raises(ArtifactError, match="expected 3 repetitions of 5 tokens"):
        split_phases(one_graph, one_graph, runs=2, steps=5)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_an_export_is_recorded(scheme: str, exports: dict[str, Path]) -> None:
    settings = BenchSettings(prompt_tokens=20, new_tokens=5, runs=2, threads=1, batch=2)
    measured = bench_onnx(exports[scheme], settings)
    profile = profile_onnx(exports[scheme], measured)
    kernels = {op.operator: op for op in profile.decode.operators}
    assert ("MatMulNBits" in kernels) == (scheme == "W4A8")
    assert kernels["GroupQueryAttention"].nodes == 2  # layers
    prompt = {op.operator: op for op in profile.prefill.operators}
    assert prompt["MatMulIntegerToFloat"].nodes == 2 * 5 + 1  # q, k, v packed; and the head
    assert not {"MatMulNBits", "If"} & set(prompt), "what is in a branch is counted once"
    for phase in (profile.prefill, profile.decode):
        assert sum(op.share for op in phase.operators) == pytest.approx(1.0)
        times = [op.microseconds for op in phase.operators]
        assert times == sorted(times, reverse=True)
        assert phase.share_of_limit == pytest.approx(phase.limit_s / phase.measured_s)
        assert {len(row) for row in phase.rows()} == {len(PROFILE_COLUMNS)}
    assert profile.decode.measured_s == pytest.approx(
        sum(run["decode"] for run in measured.runs) / 10
    )
    middle, layers, kv_heads, head_dim = 20 + 3, 2, 2, 16
    assert profile.cache_bytes == 2 * middle * (2 * layers * kv_heads * head_dim) * 4
    # A prompt's head sees the last token of each sequence only.
    body = profile.decode.multiply_adds - 2 * 32 * head_rows(profile)
    assert profile.prefill.multiply_adds == 20 * body + 2 * 32 * head_rows(profile)
    plain = json.loads(json.dumps(profile.to_dict()))
    assert plain["decode"]["share_of_limit"] == profile.decode.share_of_limit
    assert len(profile.rows()) == 4


def test_many_sequences_are_recorded_on_the_graph_that_they_go_on_in(
    exports: dict[str, Path],
) -> None:
    batch = SEQUENCES_FOR_PROMPT_GRAPH
    settings = BenchSettings(prompt_tokens=20, new_tokens=5, runs=2, threads=1, batch=batch)
    profile = profile_onnx(exports["W4A8"], bench_onnx(exports["W4A8"], settings))
    kernels = {op.operator: op.nodes for op in profile.decode.operators}
    assert kernels["MatMulIntegerToFloat"] == 2 * 5 + 1
    assert "MatMulNBits" not in kernels


def head_rows(profile: Any) -> int:
    from deploy.session import OnnxDecoder

    with OnnxDecoder(Path(profile.model)) as decoder:
        return decoder.vocab_size


def test_bits_are_read_of_the_graph(exports: dict[str, Path]) -> None:
    found = bits_by_node(exports["W4A8"] / "token.onnx")
    assert {bits for bits, _ in found.values()} == {4}
    assert bits_by_node(exports["W8A8"] / "model.onnx") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "not of the form"),
        ("[{}]", "not of the form"),
        ("[]", "recorded no run"),
        ('[{"name": "model_run", "cat": "Session"}]', "not of the form"),
    ],
)
def test_a_record_of_another_form_is_refused(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(content)
    with pytest.raises(ArtifactError, match=said):
        read_runs(file)


def test_operators_belong_to_the_run_that_they_lie_in(tmp_path: Path) -> None:
    def event(name: str, start: int, category: str = "Node") -> dict[str, Any]:
        arguments = {"op_name": "X", "input_type_shape": [], "output_type_shape": []}
        return {"name": name, "cat": category, "ts": start, "dur": 4, "args": arguments}

    events = [
        event("b_kernel_time", 21),
        event("a_kernel_time", 11),
        event("a_fence_before", 12),
        event("model_run", 20, "Session"),
        event("model_run", 10, "Session"),
    ]
    (tmp_path / "record.json").write_text(json.dumps(events))
    first, second = read_runs(tmp_path / "record.json")
    assert [n.name for n in first.nodes] == ["a"]
    assert [n.name for n in second.nodes] == ["b"]


def test_the_limits_are_measured_and_of_a_possible_size(tmp_path: Path) -> None:
    assert 1e8 < read_bandwidth(1, buffer_bytes=2**22) < 1e13
    assert 1e7 < integer_products(1, rows=32, columns=64) < 1e14
    (tmp_path / "index0").mkdir()
    (tmp_path / "index0" / "size").write_text("32K\n")
    (tmp_path / "index3").mkdir()
    (tmp_path / "index3" / "size").write_text("8M\n")
    assert last_cache_bytes(tmp_path) == 8 * 2**20
    assert last_cache_bytes(tmp_path / "absent") == 0


def test_the_limit_is_what_the_machine_needs_at_least(
    exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deploy.bench_profile.measure_limits", lambda threads: MachineLimits(threads, 1e3, 1e5)
    )
    settings = BenchSettings(prompt_tokens=4, new_tokens=1, runs=1, threads=1)
    report = BenchReport("m", settings, 0.1, ({"prefill": 2.0, "decode": 4.0},), 1, 1)
    profile = profile_onnx(exports["W8A8"], report)
    read = profile.decode.weight_bytes + profile.cache_bytes
    assert profile.decode.limit_s == pytest.approx(read / 1e3)
    assert profile.decode.share_of_limit == pytest.approx(read / 1e3 / 4.0)
    assert profile.prefill.limit_s == pytest.approx(profile.prefill.multiply_adds / 1e5)
    assert profile.prefill.measured_s == 2.0
