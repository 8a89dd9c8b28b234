"""The structure a reader may rely on: arrows, no cycles, names in one place, a lean runtime."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("deploy", "reslora", "rolora")
ALLOWED = {
    "cli": {"cli", "deploy", "reslora", "rolora"},
    "deploy": {"deploy", "reslora", "rolora"},
    "reslora": {"reslora"},
    "rolora": {"rolora"},
}
TORCH_FREE = (
    "deploy.errors",
    "deploy.staging",
    "deploy.artifact",
    "deploy.session",
    "deploy.encoder_session",
    "deploy.run",
)
MODULE_NAMES = re.compile(
    r"\b([qkvo]_proj|qkv_proj|gate_proj|gate_up_proj|up_proj|down_proj|[qk]_norm|input_layernorm|post_attention_layernorm"
    r"|embed_tokens|lm_head|self_attn"
    r"|attention\.(self|output)|(intermediate|output)\.dense)\b"
)
NAMING_FILES = ("deploy/architecture.py", "deploy/encoder_architecture.py")
"""Of decoders and of encoders."""
DRAWERS = {"utils", "util", "helpers", "common", "misc"}


def source_files() -> list[Path]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [ROOT / "cli.py", *files]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Yield what a file imports anywhere, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    trees = {module_name(path): ast.parse(path.read_text()) for path in source_files()}
    return {
        name: {target for target in imported_modules(tree) if target in trees and target != name}
        for name, tree in trees.items()
    }


def test_imports_follow_the_arrow() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in import_graph().items()
        for target in targets
        if target.partition(".")[0] not in ALLOWED[name.partition(".")[0]]
    ]
    assert wrong == []


def test_imports_have_no_cycle() -> None:
    try:
        list(TopologicalSorter(import_graph()).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def text_constants(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the strings that are no docstrings or field descriptions."""
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node


def test_module_names_stand_in_one_file_of_each_kind_only() -> None:
    found = []
    for path in source_files():
        tree = ast.parse(path.read_text())
        names = [(node.lineno, str(node.value)) for node in text_constants(tree)]
        names += [(n.lineno, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        found += [
            f"{path.relative_to(ROOT)}:{line}: {match[0]}"
            for line, text in names
            if (match := MODULE_NAMES.search(text))
        ]
    for file in NAMING_FILES:
        assert any(entry.startswith(file) for entry in found)
    assert [entry for entry in found if not entry.startswith(NAMING_FILES)] == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_serves_an_exported_model_imports_no_torch(name: str) -> None:
    code = f"import sys, {name}; print({{'torch', 'transformers', 'peft'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout == "set()\n"


def test_init_files_are_empty_and_no_file_is_a_drawer() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").read_text() == ""
    assert [path for path in source_files() if DRAWERS & set(module_name(path).split("."))] == []


def test_the_wheel_holds_the_three_packages_and_cli_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py"):
        shutil.copy(ROOT / name, tree / name)
    for package in (*PACKAGES, "tests"):
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("rolora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if ".dist-info" not in name} == {"cli.py", *PACKAGES}
    assert b"rolora = cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in [*source_files(), *(ROOT / "deploy" / "samples").glob("*")]
    }
    assert expected <= set(names)
