from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.bench_against import (
    Comparison,
    Ratio,
    Worker,
    bench_against,
    measure_in_turn,
)
from deploy.bench_peers import PeerSettings, Runtime, Subject
from deploy.bench_report import BenchReport, BenchSettings
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from deploy.torch_worker import open_float_model
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model
from tests.deploy.tiny_classifiers import save_encoder
from tests.deploy.tiny_encoder_artifacts import make_encoder_export

QUICK = BenchSettings(prompt_tokens=6, new_tokens=3, runs=2, threads=1, batch=2)

STUB = """
import ctypes, json, os

class Batch:
    def __init__(self, count):
        self.token, self.pos, self.n_seq_id, self.logits = ([None] * count for _ in range(4))
        self.seq_id = [[None] for _ in range(count)]
        self.n_tokens = 0

class Parameters:
    n_threads = n_threads_batch = None

llama_log_callback = lambda function: function
llama_log_set = lambda callback, data: None
llama_backend_init = lambda: None
llama_model_default_params = Parameters
llama_context_default_params = Parameters
llama_model_load_from_file = lambda path, parameters: b"bad" not in path
llama_model_get_vocab = lambda model: model
llama_vocab_n_tokens = lambda vocabulary: 11
llama_get_memory = lambda context: context
llama_batch_init = lambda count, embedding, sequences: Batch(count)
llama_synchronize = lambda context: None

def log(line):
    with open(os.environ["STUB_LOG"], "a") as file:
        file.write(json.dumps(line) + "\\n")

def llama_init_from_model(model, parameters):
    log(vars(parameters))
    return parameters

def llama_memory_clear(memory, data):
    log("clear")

def llama_decode(context, batch):
    count = batch.n_tokens
    log([batch.pos[:count], [s[0] for s in batch.seq_id[:count]], batch.logits[:count]])
    assert all(0 <= token < 11 for token in batch.token[:count])
    return 0
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("against")
    checkpoint = make_checkpoint(save_model(base / "model"), base / "checkpoint", "FP32")
    make_export(checkpoint, base / "onnx")
    return base / "onnx"


def report(runs: list[tuple[float, float]]) -> BenchReport:
    seconds = tuple({"prefill": prefill, "decode": decode} for prefill, decode in runs)
    return BenchReport("m", BenchSettings(8, 4, 3), 1.0, seconds, 2, 3)


def test_a_ratio_is_the_median_of_the_ratios_within_a_round() -> None:
    # The machine is slow in the second round: medians of the rates would say 2 for prefill.
    ours, peer = report([(1, 1), (50, 5), (2, 1)]), report([(3, 2), (100, 5), (4, 4)])
    found = Comparison("ours", BenchSettings(8, 4, 3), {"ours": ours, "peer": peer})
    assert found.ratios("peer") == {"prefill": Ratio(2.0, 2.0, 3.0), "decode": Ratio(2.0, 1.0, 4.0)}
    assert found.ratios("ours")["decode"] == Ratio(1.0, 1.0, 1.0)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["models"]["peer"]["ours_over_this"]["decode"]["greatest"] == 4.0
    assert list(plain["models"]) == ["ours", "peer"]
    for row in found.rows():
        assert len(row) == len(found.columns())
    assert found.rows()[1][-1] == "2.00"


def test_models_are_measured_in_turn_in_processes_of_their_own(export: Path) -> None:
    steps: list[str] = []
    settings = PeerSettings((f"genai:{export}",))
    found = bench_against(export, QUICK, settings, steps.append)
    ours, peer = found.reports.values()
    assert len(ours.runs) == len(peer.runs) == QUICK.runs
    assert min(ours.load_s, peer.load_s, *ours.medians.values(), *peer.medians.values()) > 0
    assert 10_000_000 < ours.peak_rss_bytes < 2_000_000_000
    order = [step.rpartition(" ")[2] for step in steps if step.startswith("round")]
    name = f"genai:{export}"
    assert order == ["ours", name, name, "ours", "ours", name]


def test_the_first_round_warms_up_and_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counter:
        load_s, peak_rss_bytes, taken = 1.0, 1, 0.0

        def __init__(self, subject: Subject, *_: object) -> None:
            self.subject = subject

        def run(self) -> dict[str, float]:
            self.taken += 1
            return {"prefill": self.taken, "decode": self.taken}

    monkeypatch.setattr("deploy.bench_against.Worker", lambda *given: nullcontext(Counter(*given)))
    found = measure_in_turn([Subject("ours", Runtime.ONNX, tmp_path)], QUICK)
    assert [run["prefill"] for run in found.reports["ours"].runs] == [2.0, 3.0]


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_float_model_runs_beside_its_export(kind: str, export: Path, tmp_path: Path) -> None:
    settings = QUICK
    if kind == "encoder":
        export = make_encoder_export(save_encoder(tmp_path / "bert"), tmp_path / "onnx", "W8A8")
        settings = replace(QUICK, new_tokens=None)
    found = bench_against(export, settings, PeerSettings(("torch",)))
    ours, peer = found.reports.values()
    assert len(ours.runs) == len(peer.runs) == QUICK.runs
    assert list(ours.medians) == list(peer.medians)
    assert min(*ours.medians.values(), *peer.medians.values(), peer.load_s) > 0
    assert list(found.ratios("torch")) == list(ours.runs[0]) == list(settings.phases)
    assert {len(row) for row in found.rows()} == {len(found.columns())}
    assert peer.file_bytes != ours.file_bytes
    if kind == "encoder":
        assert found.columns()[1:4] == ("tokens/s", "texts/s", "batch s")
        with pytest.raises(ConfigError, match="leave --new-tokens out"):
            bench_against(export, QUICK, PeerSettings(("torch",)))


def test_the_float_model_decodes_over_its_cache_as_a_caller_would(export: Path) -> None:
    calls: list[tuple[int, bool]] = []
    with open_float_model(export.parent / "model", QUICK) as run_once:
        forward = run_once.args[0].forward  # type: ignore[attr-defined]

        def record(**inputs: object) -> object:
            calls.append((inputs["input_ids"].shape[1], "past_key_values" in inputs))  # type: ignore[attr-defined]
            result = forward(**inputs)
            assert result.logits.shape[1] == 1
            return result

        run_once.args[0].forward = record  # type: ignore[attr-defined]
        assert list(run_once()) == ["prefill", "decode"]
    assert calls == [(6, False), (1, True), (1, True), (1, True)]


def test_llama_cpp_runs_the_same_shape_of_work(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "log"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    subject = Subject("llama", Runtime.LLAMA, file)
    found = measure_in_turn([subject], BenchSettings(3, 2, 1, threads=5, batch=2), sys.executable)
    assert found.reports["llama"].peak_rss_bytes > 1_000_000
    room, *runs = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert room == {"n_seq_max": 2, "n_ctx": 10, "n_batch": 6, "n_threads": 5, "n_threads_batch": 5}
    one_run = [
        "clear",
        [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1], [False, False, True, False, False, True]],
        [[3, 3], [0, 1], [True, True]],
        [[4, 4], [0, 1], [True, True]],
    ]
    assert runs == 2 * one_run  # the first one warms up
    bad = Subject("llama", Runtime.LLAMA, tmp_path / "bad.gguf")
    with pytest.raises(ArtifactError, match=r"bad.gguf: llama.cpp cannot load it"):
        Worker(bad, QUICK, sys.executable)
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('broken')")
    with pytest.raises(ArtifactError, match="has no llama-cpp-python"):
        Worker(subject, QUICK, sys.executable)
    with pytest.raises(ArtifactError, match="cannot start /no/python"):
        Worker(subject, QUICK, "/no/python")
    with pytest.raises(ConfigError, match="name a Python that has llama-cpp-python"):
        bench_against(export, QUICK, PeerSettings((f"llama.cpp:{file}",)))


def test_a_model_that_cannot_run_is_named_with_the_reason(export: Path, tmp_path: Path) -> None:
    for path in export.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    broken = Subject("peer", Runtime.ONNX, tmp_path)
    with pytest.raises(ArtifactError, match=r"^peer .*cannot load it"):
        Worker(broken, QUICK)
    whole = Subject("ours", Runtime.ONNX, export)
    long = BenchSettings(prompt_tokens=1000, new_tokens=1, runs=1, threads=1)
    with pytest.raises(ArtifactError, match="context length of 128"):
        measure_in_turn([whole], long)
    with pytest.raises(StageOrderError, match="kind onnx"):
        bench_against(export.parent / "checkpoint", QUICK, PeerSettings(()))
