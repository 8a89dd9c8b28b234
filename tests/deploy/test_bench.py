from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from deploy.artifact import ArtifactKind, Manifest
from deploy.bench import bench_onnx, measure_prompt, measure_texts, settings_for
from deploy.bench_report import BenchReport, BenchSettings, fix_threads
from deploy.errors import ArtifactError, ConfigError, StageOrderError
from tests.deploy.tiny_artifacts import make_checkpoint, make_export, save_model
from tests.deploy.tiny_classifiers import save_encoder
from tests.deploy.tiny_encoder_artifacts import make_encoder_export


class FakeDecoder:
    vocab_size = 11

    def __init__(self) -> None:
        self.calls: list[np.ndarray] = []
        self.capacity = 0

    def start(self, capacity: int, batch: int) -> None:
        self.capacity, self.batch = capacity, batch

    def append(self, ids: np.ndarray, *, last_only: bool = False) -> None:
        self.calls.append(ids)


def test_a_run_is_one_prompt_and_its_tokens_one_by_one_and_always_the_same() -> None:
    first, second = FakeDecoder(), FakeDecoder()
    for decoder in (first, second):
        run = measure_prompt(decoder, BenchSettings(prompt_tokens=7, new_tokens=3))  # type: ignore[arg-type]
        assert list(run) == ["prefill", "decode"]
        assert min(run.values()) >= 0.0
        assert decoder.capacity == 10
        assert [call.shape for call in decoder.calls] == [(1, 7), (1, 1), (1, 1), (1, 1)]
    for a, b in zip(first.calls, second.calls, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.max() < 11


def test_each_phase_is_timed_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    class SlowDecoder(FakeDecoder):
        def append(self, ids: np.ndarray, *, last_only: bool = False) -> None:
            nonlocal now
            now += 5.0 if last_only else 2.0

    monkeypatch.setattr("time.perf_counter", lambda: now)
    run = measure_prompt(SlowDecoder(), BenchSettings(prompt_tokens=7, new_tokens=3))  # type: ignore[arg-type]
    assert run == {"prefill": 5.0, "decode": 6.0}


def test_the_first_run_warms_up_and_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([9.0, 1.0, 2.0])
    manifest = Manifest(ArtifactKind.ONNX)
    monkeypatch.setattr(
        "deploy.bench.open_export",
        lambda directory, settings: nullcontext(lambda: {"prefill": next(taken), "decode": 1.0}),
    )
    monkeypatch.setattr("deploy.bench.read_export", lambda directory, settings: manifest)
    report = bench_onnx(tmp_path, BenchSettings(runs=2))
    assert [run["prefill"] for run in report.runs] == [1.0, 2.0]


def test_sizes_are_in_millions_of_bytes() -> None:
    runs = ({"prefill": 2.0, "decode": 4.0},)
    rows = dict(BenchReport("m", BenchSettings(8, 4), 0.5, runs, 3_000_000, 20_500_000).rows())
    assert (rows["peak memory"], rows["files"]) == ("3.0 MB", "20.5 MB")


def test_a_batch_goes_on_together_and_counts_all_its_tokens() -> None:
    decoder = FakeDecoder()
    settings = BenchSettings(prompt_tokens=7, new_tokens=2, batch=4)
    measure_prompt(decoder, settings)  # type: ignore[arg-type]
    assert decoder.batch == 4
    assert [call.shape for call in decoder.calls] == [(4, 7), (4, 1), (4, 1)]
    report = BenchReport("m", settings, 0.5, ({"prefill": 2.0, "decode": 4.0},), 10, 20)
    assert report.medians["prefill_tokens_per_s"] == 14.0
    assert report.medians["decode_tokens_per_s"] == 2.0


def test_texts_of_an_encoder_are_one_batch_and_count_as_texts_and_tokens() -> None:
    found: list[np.ndarray] = []

    class FakeEncoder:
        def run(self, batch: dict[str, np.ndarray]) -> None:
            found.append(batch["input_ids"])

    settings = BenchSettings(prompt_tokens=7, new_tokens=None, runs=3, batch=4)
    for _ in range(2):
        assert list(measure_texts(FakeEncoder(), 11, settings)) == ["encode"]  # type: ignore[arg-type]
    assert found[0].shape == (4, 7)
    assert found[0].max() < 11
    np.testing.assert_array_equal(*found)
    runs = ({"encode": 2.0}, {"encode": 4.0}, {"encode": 0.5})
    plain = BenchReport("m", settings, 0.5, runs, 10, 20).to_dict()
    assert (plain["tokens_per_s"], plain["texts_per_s"], plain["batch_latency_s"]) == (14, 2, 2)
    assert plain["spread"]["texts_per_s"] == (1.0, 8.0)
    assert plain["runs"][1] == {"encode_s": 4.0}
    assert "decode_tokens_per_s" not in plain


def test_figures_are_medians() -> None:
    seconds = ((1.0, 2.0), (4.0, 8.0), (100.0, 100.0))
    runs = tuple({"prefill": prefill, "decode": decode} for prefill, decode in seconds)
    settings = BenchSettings(prompt_tokens=20, new_tokens=40, runs=3)
    report = BenchReport("m", settings, 0.5, runs, 10, 20)
    assert report.medians["prefill_tokens_per_s"] == 5.0
    assert report.medians["decode_tokens_per_s"] == 5.0
    assert report.to_dict()["time_to_first_token_s"] == 4.0
    assert report.spread["prefill_tokens_per_s"] == (0.2, 20.0)
    assert report.spread["decode_tokens_per_s"] == (0.4, 20.0)
    assert report.spread["time_to_first_token_s"] == (1.0, 100.0)
    assert report.to_dict()["runs"][2] == {"prefill_s": 100.0, "decode_s": 100.0}


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "runs", "batch"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="every count must be at least 1"):
        BenchSettings(**{field: 0})


def test_threads_below_one_are_refused() -> None:
    for threads in (0, -1):
        with pytest.raises(ConfigError, match="at least 1"):
            BenchSettings(threads=threads)


def test_threads_that_are_not_given_are_the_processors_at_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    assert fix_threads(BenchSettings(9)) == BenchSettings(9, threads=3)
    assert fix_threads(BenchSettings(threads=1)).threads == 1


def test_an_export_is_measured_and_nothing_else(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(save_model(tmp_path / "m"), tmp_path / "c", "FP32")
    export = make_export(checkpoint, tmp_path / "onnx")
    done: list[int] = []
    report = bench_onnx(tmp_path / "onnx", BenchSettings(16, 4, 2, threads=1), done.append)
    assert done == [0, 1, 2]
    assert len(report.runs) == 2
    assert report.file_bytes == export.to_dict()["file_bytes"]
    assert min(*report.medians.values(), report.load_s) > 0
    with pytest.raises(ConfigError, match="context length of 128"):
        bench_onnx(tmp_path / "onnx", BenchSettings(128, 1, 1))
    with pytest.raises(StageOrderError, match="expected an artifact of kind onnx"):
        bench_onnx(checkpoint, BenchSettings())
    assert settings_for(tmp_path / "onnx", 16, None, 2, 1, 1) == BenchSettings(16, 128, 2, 1)
    with pytest.raises(ConfigError, match="holds a decoder; give --new-tokens"):
        bench_onnx(tmp_path / "onnx", BenchSettings(16, None))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_exported_encoder_is_measured(kind: str, tmp_path: Path) -> None:
    export = make_encoder_export(save_encoder(tmp_path / kind, kind), tmp_path / "onnx", "W8A8")
    settings = settings_for(export, 12, None, 2, 1, 3)
    assert settings.new_tokens is None
    report = bench_onnx(export, settings)
    assert len(report.runs) == 2
    assert report.medians["tokens_per_s"] == pytest.approx(12 * report.medians["texts_per_s"])
    assert [name for name, _ in report.rows()][:3] == ["speed", "texts", "latency of a batch"]
    with pytest.raises(ConfigError, match="encoder, which decodes no tokens; leave --new-tokens"):
        settings_for(export, 12, 4, 2, 1, 3)
    with pytest.raises(ConfigError, match=r"of 9999 tokens exceed the model's context length of"):
        bench_onnx(export, BenchSettings(9999, None))
    (export / "config.json").unlink()
    with pytest.raises(ArtifactError, match="does not say the size of the vocabulary"):
        bench_onnx(export, settings)
