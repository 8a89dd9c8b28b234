"""An export in optimum-onnx, which knows nothing of this package: the same tokens as our runtime.

optimum-onnx 0.1.0 needs transformers 4, so it is installed into an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from deploy.export import Target
from deploy.kernels import Kernel
from deploy.run import Sampling, TextGenerator
from tests.deploy.test_kept_adapters import keep
from tests.deploy.tiny_artifacts import make_adapter, make_checkpoint, make_export, save_model

PACKAGES = (
    "optimum-onnx==0.1.0",
    "transformers<4.58",
    "torch==2.13.0",
    f"onnxruntime=={ort.__version__}",
)
PROMPTS = ("a longer prompt than the other", "hello world")
NEW_TOKENS = 12
END = 2
"""Ends an answer; our runtime does not return it."""
GENERATE = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

directory, prompts, together, bind, count = json.loads(sys.argv[1])
model = ORTModelForCausalLM.from_pretrained(directory, use_io_binding=bind)
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
found = []
for batch in [prompts] if together else [[prompt] for prompt in prompts]:
    given = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
    rows = model.generate(**given, max_new_tokens=count, do_sample=False)
    found += rows[:, given.input_ids.shape[1]:].tolist()
print(json.dumps(found))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return what generates in optimum-onnx; its environment is made once, with the network."""
    home = tmp_path_factory.mktemp("optimum")
    venv.create(home, with_pip=True)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"

    def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Neither our packages nor our settings reach it.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(python), *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=home,
            env=kept | environment,
        )

    installed = run("-m", "pip", "install", "--quiet", *PACKAGES)
    assert installed.returncode == 0, installed.stderr[-2000:]

    def generate(
        directory: Path, *, together: bool = False, bind: bool = True
    ) -> list[list[int]] | str:
        asked = json.dumps([str(directory), PROMPTS, together, bind, NEW_TOKENS])
        result = run("-c", GENERATE, asked, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        if result.returncode:
            return result.stderr
        rows: list[list[int]] = json.loads(result.stdout.splitlines()[-1])
        return [row[: row.index(END)] if END in row else row for row in rows]

    return generate


def ours(directory: Path) -> list[list[int]]:
    generator = TextGenerator(directory)
    sampling = Sampling(NEW_TOKENS)
    return [list(generator.generate(generator.encode(prompt), sampling)) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("exports")
    for family in ("llama", "qwen3", "phi3"):
        save_model(base / family, family, hidden_size=64, intermediate_size=96)
    for name, family, scheme, recipe in (
        ("w8a8", "llama", "W8A8", {}),
        ("w4a8", "llama", "W4A8", {}),
        ("static", "llama", "W8A8", {"static": "all"}),
        ("qwen3", "qwen3", "W8A8", {}),
        ("phi3", "phi3", "W8A8", {}),
    ):
        make_checkpoint(base / family, base / f"{name}-base", scheme, weights="rtn", **recipe)
    return base


@pytest.mark.parametrize(
    ("name", "kernel", "bind"),
    [
        ("w8a8", Kernel.AUTO, True),
        ("w8a8", Kernel.INTEGER, False),
        ("w4a8", Kernel.INTEGER, True),
        ("w4a8", Kernel.NBITS, True),
        ("qwen3", Kernel.AUTO, True),
    ],
)
def test_optimum_generates_the_tokens_of_our_runtime(
    name: str, kernel: Kernel, bind: bool, directory: Path, optimum: Callable[..., Any]
) -> None:
    export = directory / f"{name}-{kernel}"
    make_export(directory / f"{name}-base", export, kernel)
    expected = ours(export)
    assert optimum(export, bind=bind) == expected
    assert max(map(len, expected)) == NEW_TOKENS


def test_a_portable_graph_takes_padded_batches_and_the_others_do_not(
    directory: Path, optimum: Callable[..., Any]
) -> None:
    make_export(directory / "static-base", directory / "qdq", Kernel.QDQ, Target.QDQ)
    expected = ours(directory / "qdq")
    assert optimum(directory / "qdq", together=True) == expected
    make_export(directory / "w8a8-base", directory / "padded", Kernel.INTEGER)
    assert optimum(directory / "padded", together=True) != ours(directory / "padded")


def test_an_export_that_keeps_adapters_runs_without_them(
    directory: Path, optimum: Callable[..., Any]
) -> None:
    adapter = make_adapter(directory / "llama", directory / "adapter", "lora")
    keep(directory / "w8a8-base", directory / "kept", adapter)
    assert optimum(directory / "kept") == ours(directory / "kept")


def test_what_optimum_cannot_take_ends_with_its_error(
    directory: Path, optimum: Callable[..., Any]
) -> None:
    make_export(directory / "w4a8-base", directory / "phases", Kernel.AUTO)
    assert "use_cache=True" in optimum(directory / "phases"), "it loads one graph"
    make_export(directory / "phi3-base", directory / "grouped", Kernel.INTEGER)
    assert "invalid dimensions" in optimum(directory / "grouped"), "it takes as many key heads"
