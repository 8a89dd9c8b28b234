"""The export stage: checkpoint -> ONNX directory for ONNX Runtime and onnxruntime-genai.

    prompt.onnx, token.onnx        a graph for prompts, and one for single tokens; or model.onnx
    head.onnx                      the prompt graph's head alone: logits of every position
    model.onnx.data                the weights of all graphs, once
    genai_config.json              what onnxruntime-genai reads
    tokenizer.json, ...            copied from the checkpoint
    NAME.onnx_adapter              an adapter to be swapped at run time, for each that is kept
    rolora_manifest.json           where it came from, and the parity that was measured

The directory appears only after the graphs have been run and compared with the torch reference.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from deploy.adapter_files import write_adapter_file
from deploy.adapter_ops import adapter_arrays
from deploy.artifact import (
    MANIFEST_NAME,
    ArtifactKind,
    Manifest,
    finished_artifact,
    library_versions,
    new_artifact,
    write_manifest,
)
from deploy.base_norms import base_norm_gains
from deploy.checkpoint import Checkpoint
from deploy.checkpoint_reader import WEIGHTS_NAME, AnyCheckpoint
from deploy.conventions import context_length
from deploy.cuda_operators import require_cuda_kernels
from deploy.decoder_graph import DecoderGraph, linear_products
from deploy.errors import ParityError, RoloraError
from deploy.genai_config import genai_config
from deploy.graph_builder import stored_initializers
from deploy.kept_adapters import (
    AdapterChoice,
    KeptAdapter,
    open_kept_adapter,
    require_base_without_adapter,
)
from deploy.kernels import (
    GraphForm,
    Kernel,
    graph_forms,
    require_adapters_fed,
    require_offered,
)
from deploy.layer_parity import compare_layers
from deploy.layer_report import LayerReport
from deploy.memory import peak_memory_bytes
from deploy.parity import HALF_PERTURBATION, check_parity, parity_tokens
from deploy.portable_graph import PortableGraph
from deploy.rotation_file import ROTATION_NAME
from deploy.session import CPU_PROVIDER, GENAI_CONFIG_NAME, GRAPH_NAME
from deploy.targets import Target as Target
from deploy.verification import saturation_hint, verify_on

DATA_NAME = f"{GRAPH_NAME}.data"
_NOT_COPIED = {WEIGHTS_NAME, ROTATION_NAME, MANIFEST_NAME}


class ExportFormat(StrEnum):
    """File formats of an export."""

    ONNX = "onnx"
    COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True)
class ExportReport:
    """What the stage did."""

    output: Path
    manifest: Manifest
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "output": str(self.output),
            "digest": self.manifest.digest,
            "parity": self.manifest.checks["parity"],
            "verified_on": self.manifest.checks.get("verified_on"),
            "adapters": self.manifest.checks.get("adapters"),
            "operators": self.manifest.details["operators"],
            "file_bytes": sum(record.bytes for record in self.manifest.files.values()),
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def export_onnx(
    checkpoint_directory: Path,
    output: Path,
    target: Target,
    kernel: Kernel = Kernel.AUTO,
    progress: Callable[[str], None] = lambda step: None,
    *,
    keep: Sequence[AdapterChoice] = (),
    model: str | None = None,
) -> ExportReport:
    """Export a checkpoint and check the result.

    Args:
        checkpoint_directory: From `merge-rotate-quantize`.
        output: The directory to make.
        target: Processor whose kernels the graph addresses.
        kernel: Kernels of the quantized linears.
        progress: Called with a line for each step.
        keep: Adapters to keep beside the base instead of merging them.
        model: Where the checkpoint's model lies, whose norm gains adapters may need; None is where
            it lay.

    Raises:
        ConfigError: The output exists, the target does not have the kernel, or no adapter can be
            fed to its graphs.
        StageOrderError: The directory is no checkpoint; or an adapter is to be kept that has
            shortcuts, or beside a checkpoint that has one merged in.
        ArtifactError: A file is missing or damaged, the disk is full, or an adapter is of another
            model or basis.
        UnsupportedModelError: ONNX Runtime cannot run the model's head size, or the kernel or the
            target not its scheme.
        ParityError: The graph does not compute what the checkpoint does; nothing is left behind.
    """
    require_offered(target, kernel)
    with Checkpoint(checkpoint_directory) as checkpoint:
        forms = graph_forms(checkpoint, kernel, target)
        adapters = _open_adapters(checkpoint, forms, keep, model, progress)
        parents = {"checkpoint": checkpoint.manifest.digest}
        parents |= {f"adapter {adapter.name}": adapter.digest for adapter in adapters}
        config = onnx_config(target, kernel)
        wanted = Manifest(ArtifactKind.ONNX, parents, config, library_versions())
        if done := finished_artifact(output, wanted, progress):
            return ExportReport(output, done, peak_memory_bytes())
        needed = (checkpoint_directory / WEIGHTS_NAME).stat().st_size
        with new_artifact(output, needed_bytes=needed) as directory:
            context = context_length(checkpoint.config)
            whole = checkpoint.config.max_position_embeddings
            if context < whole:
                progress(
                    f"the context is {context} tokens instead of {whole}: beyond that longrope "
                    f"turns all positions otherwise, and keys in a cache cannot follow"
                )
            adapted = frozenset(fqn for adapter in adapters for fqn in adapter.factors)
            operators, domains = write_graphs(checkpoint, forms, directory, progress, adapted)
            products = linear_products(checkpoint)
            for adapter in adapters:
                arrays = adapter_arrays(adapter.factors, products, checkpoint)
                write_adapter_file(directory / adapter.file, arrays)
            write_genai_config(checkpoint, forms, directory)
            copy_companions(checkpoint, directory)
            checks = check_export(checkpoint, directory, forms, progress)
            details = onnx_details(checkpoint.manifest, forms, operators, domains, context)
            if adapters:
                checks["adapters"] = _check_adapters(
                    checkpoint, directory, forms, adapters, progress
                )
                details["adapters"] = {each.name: each.to_details() for each in adapters}
            manifest = write_manifest(directory, replace(wanted, checks=checks, details=details))
    return ExportReport(output, manifest, peak_memory_bytes())


def onnx_config(target: Target, kernel: Kernel) -> dict[str, Any]:
    """Return what the manifest of an ONNX export says that it was asked for."""
    return {"format": str(ExportFormat.ONNX), "target": str(target), "kernel": str(kernel)}


def onnx_details(
    checkpoint: Manifest,
    forms: Sequence[GraphForm],
    operators: Mapping[str, int],
    domains: Mapping[str, int],
    context: int,
) -> dict[str, Any]:
    """Return what the manifest of an ONNX export says of its checkpoint and its graphs.

    Args:
        checkpoint: Its manifest.
        forms: The graphs, all for one target.
        operators: How often each operator occurs in them.
        domains: How many nodes each domain has in them.
        context: The most tokens that the graphs take.
    """
    return {
        "scheme": checkpoint.details.get("scheme"),
        "model": checkpoint.config.get("model"),
        "model_digest": checkpoint.parents.get("model"),
        "target": str(forms[0].target),
        "kernels": {form.file: str(form.kernel) for form in forms},
        "operators": operators,
        "operator_domains": domains,
        "context_length": context,
    }


def _open_adapters(
    checkpoint: Checkpoint,
    forms: Sequence[GraphForm],
    keep: Sequence[AdapterChoice],
    model: str | None,
    progress: Callable[[str], None],
) -> list[KeptAdapter]:
    """Read the adapters that are kept, in the checkpoint's basis."""
    if not keep:
        return []
    require_base_without_adapter(checkpoint)
    require_adapters_fed(forms)
    progress("reading adapters")
    gains = cache(partial(base_norm_gains, checkpoint, model))
    return [open_kept_adapter(choice, checkpoint, gains) for choice in keep]


def _check_adapters(
    checkpoint: Checkpoint,
    directory: Path,
    forms: Sequence[GraphForm],
    adapters: Sequence[KeptAdapter],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Compare an export with its checkpoint for each adapter, active on both sides."""
    ids, reports = parity_tokens(checkpoint), {}
    for adapter in adapters:
        progress(f"checking parity with adapter {adapter.name}")
        try:
            report = check_parity(checkpoint, directory, ids, forms, adapter=adapter)
        except ParityError as error:
            raise ParityError(f"adapter {adapter.name}: {error}") from error
        reports[adapter.name] = report.to_dict()
    return reports


def first_departure(compare: Callable[[], LayerReport]) -> str:
    """Say where graphs that failed their check depart, if comparing them can tell."""
    try:
        return compare().describe_first()
    except RoloraError as error:
        return f"its layers cannot be compared ({error})"


def write_graphs(
    checkpoint: Checkpoint,
    forms: Sequence[GraphForm],
    directory: Path,
    progress: Callable[[str], None] = lambda step: None,
    adapted: Container[str] = (),
) -> tuple[dict[str, int], dict[str, int]]:
    """Write the graphs and, once, the weights that they share.

    Args:
        checkpoint: What is exported; its weights are read while they are written.
        forms: The graphs; the first one brings the weights.
        directory: Receives the files.
        progress: Called with a line for each step.
        adapted: FQNs of linears that an adapter may change at run time.

    Returns:
        How often each operator occurs, over all graphs, and how many nodes each domain has.

    Raises:
        UnsupportedModelError: A graph for CUDA has a node that would run elsewhere.
    """
    stored: dict[str, ir.ExternalTensor] = {}
    operators: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    for form in forms:
        progress(f"writing {form.file}")
        builder = PortableGraph if form.kernel is Kernel.QDQ else DecoderGraph
        graph = builder(checkpoint, form, stored, adapted)
        model = graph.build_head() if form.head_only else graph.build()
        save_graph(model, directory / form.file, with_data=not stored)
        if form.half:
            require_cuda_kernels(model, f"{checkpoint.directory}: {form.file}")
        operators.update(count_operators(model))
        domains.update(count_domains(model))
        stored = stored or stored_initializers(ir.load(directory / form.file))
    return _most_frequent_first(operators), _most_frequent_first(domains)


def write_genai_config(checkpoint: Checkpoint, forms: Sequence[GraphForm], directory: Path) -> None:
    """Write what onnxruntime-genai, and `session`, read beside the graphs."""
    genai = genai_config(checkpoint.config, checkpoint.names, checkpoint.directory, forms)
    text = json.dumps(genai, indent=2) + "\n"
    (directory / GENAI_CONFIG_NAME).write_text(text, encoding="utf-8")


def check_export(
    checkpoint: Checkpoint,
    directory: Path,
    forms: Sequence[GraphForm],
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Compare an export with its checkpoint, and say where that was done.

    A graph of float16 is compared twice: with float32 in its place, and as it is.

    Args:
        checkpoint: What was exported.
        directory: The export.
        forms: Its graphs.
        progress: Called with a line for each step.

    Returns:
        `parity`, `verified_on`, and `half_parity` of a graph of float16.

    Raises:
        ParityError: See `check_parity`.
    """
    target, ids = forms[0].target, parity_tokens(checkpoint)
    verification = verify_on(target)
    progress("checking parity with the torch reference")
    checks: dict[str, Any] = {}
    try:
        if forms[0].half:
            checks["half_parity"] = check_parity(
                checkpoint,
                directory,
                ids,
                forms,
                provider=verification.provider,
                perturbation=HALF_PERTURBATION,
            ).to_dict()
            progress("checking parity with float32 in place of float16")
            with TemporaryDirectory(dir=directory.parent) as place:
                wide, in_float32 = Path(place), [replace(form, half=False) for form in forms]
                write_graphs(checkpoint, in_float32, wide)
                write_genai_config(checkpoint, in_float32, wide)
                parity = check_parity(checkpoint, wide, ids, in_float32, provider=CPU_PROVIDER)
        else:
            parity = check_parity(checkpoint, directory, ids, forms)
    except ParityError as error:
        if hint := saturation_hint(target, verification):
            raise ParityError(f"{error}{hint}") from error
        if target is not Target.CPU:
            raise
        progress("looking for the layer that departs")
        where = first_departure(lambda: compare_layers(checkpoint, directory, ids))
        raise ParityError(f"{error}; {where}") from error
    return {"parity": parity.to_dict(), **checks, "verified_on": verification.to_dict()}


def save_graph(model: ir.Model, path: Path, *, with_data: bool = True) -> None:
    """Write a graph, its weights beside it; `with_data` false: another graph has written them."""
    ir.save(
        model,
        path,
        external_data=DATA_NAME if with_data else None,
        size_threshold_bytes=1024,
        max_workers=1,
    )


def copy_companions(checkpoint: AnyCheckpoint, directory: Path) -> None:
    """Copy what an export takes over from its checkpoint: the tokenizer's files and configs.

    Whatever else lies in the checkpoint's directory, such as an export, is not its own.
    """
    for name in sorted(checkpoint.manifest.files):
        copy = directory / name
        if copy.name not in _NOT_COPIED:
            copy.parent.mkdir(parents=True, exist_ok=True)  # additional_chat_templates
            shutil.copyfile(checkpoint.directory / name, copy)


def _nodes_of_a_run(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the nodes of a graph, and of an If those of one branch."""
    for node in graph:
        yield node
        if node.op_type == "If":
            yield from _nodes_of_a_run(node.attributes["then_branch"].as_graph())


def count_operators(model: ir.Model) -> dict[str, int]:
    """Return how often each operator occurs in a run, the most frequent first."""
    return _most_frequent_first(Counter(node.op_type for node in _nodes_of_a_run(model.graph)))


def count_domains(model: ir.Model) -> dict[str, int]:
    """Return how many nodes of a run each domain has, the most frequent first."""
    domains = (node.domain or "ai.onnx" for node in _nodes_of_a_run(model.graph))
    return _most_frequent_first(Counter(domains))


def _most_frequent_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
