"""Walk through a model and quantize it part by part, with little more than a part in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from rolora.block_stream import BlockStream, KnownRows, Moments, rows_of, rows_of_tokens, tokens_in
from rolora.blocks import Block, BlockStack
from rolora.calibrated_plan import CalibratedPlan, calibrate_plan, needs_whole_model
from rolora.calibration import RangeObserver
from rolora.fold import row_chunks
from rolora.gptq import Gptq, GptqResult, aims_elsewhere
from rolora.kronecker import Rotation
from rolora.layer_plan import LayerPlan, plan_layers
from rolora.linear import QuantizedEmbedding, QuantizedLinear
from rolora.naming import naming
from rolora.online import rotated_input
from rolora.quantize import (
    LayerError,
    float_linear,
    quantize_linear,
    relative_error,
    replace_module,
    squared_norms,
    static_scale,
)
from rolora.rtn import quantize_weight
from rolora.scheme import (
    FLOAT_BITS,
    UNQUANTIZED_BITS,
    Granularity,
    QuantizationRecipe,
    WeightMethod,
    WeightSpec,
)

FLOAT, QUANTIZED = "float", "quantized"
"""Names of the two hidden states that walk through the model."""


class QuantizationWalk:
    """Quantizes a model part by part: the embedding, each block in depth order, the head if any.

    Only the part at hand needs its weights in memory; the others may lie on the meta device. What
    goes from one part to the next are hidden states of the calibration text, which `state` gives
    out and `restore` takes back:

    - of the float model, whose ranges become the static scales that are not known yet (no forward
      pass of the whole model is needed, and the scales are those that one would give);
    - of the quantized model, for GPTQ; and of the float one where the weights make up for what the
      layers before were rounded by.

    Args:
        model: A float32 decoder with an untied head, norms folded or not, or an encoder. Online
            rotations are pre-hooks on the linears and stay in force.
        names: Its parts.
        recipe: Bit widths and granularities.
        batches: Forward-pass batches with `input_ids`; used if an input is quantized per tensor,
            and by GPTQ.
        progress: Called with the FQN of each finished linear.
        planned: How each linear is quantized, and the ranges that are known; default is the recipe
            alone, which then must leave nothing to choose (`needs_whole_model`).
        table_rotation: R1 in front of the head, if the head shares the embedding's table.
    """

    def __init__(
        self,
        model: nn.Module,
        names: BlockStack,
        recipe: QuantizationRecipe,
        batches: Sequence[Mapping[str, Tensor]],
        progress: Callable[[str], None] = lambda fqn: None,
        planned: CalibratedPlan | None = None,
        table_rotation: Rotation | None = None,
    ) -> None:
        self._model = model
        self._table_rotation = table_rotation
        self._names = names
        self._recipe = recipe
        self._batches = batches
        self._progress = progress
        planned = planned or CalibratedPlan(plan_layers(names, recipe), {})
        self._plans = {plan.fqn: plan for plan in planned.plans}
        self._known = planned.observers
        self._static = {
            plan.observed
            for plan in self._plans.values()
            if plan.activation.granularity is Granularity.TENSOR
            and plan.observed not in self._known
        }
        self._streams: dict[str, BlockStream] = {}

    def quantizes(self, fqn: str) -> bool:
        """Return whether the embedding or a linear becomes integers."""
        if fqn == self._names.embedding:
            return self._recipe.embedding_bits != FLOAT_BITS
        return fqn in self._plans and self._plans[fqn].weight.bits != UNQUANTIZED_BITS

    def quantize_embedding(self, rows: Iterable[Tensor]) -> None:
        """Quantize the embedding, and put the states in front of the first block.

        Args:
            rows: Its rows in order, float32 [n, hidden_size] at a time (`chunk_rows`).

        Raises:
            ValueError: A row is not finite (the message names the embedding), or too narrow for the
                groups of its bits.
        """
        fqn = self._names.embedding
        integers = self.quantizes(fqn)
        spec = self._recipe.embedding_weight(self._names.hidden_size)
        tokens = tokens_in(self._batches)
        known: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor]] = []
        for chunk, wanted in rows_of_tokens(tokens, rows):
            known.append(wanted)
            if integers:
                parts.append(self._round(fqn, self._as_head_reads(chunk), spec))
        float_rows = seen_rows = torch.cat(known)
        if integers:
            q, scale = (torch.cat(each) for each in zip(*parts, strict=True))
            table = QuantizedEmbedding(q, scale, spec, self._table_rotation)
            replace_module(self._model, fqn, table)
            seen_rows = table(tokens)
        self._open_streams(tokens, float_rows, seen_rows)

    def quantize_block(self, block: Block) -> list[LayerError]:
        """Quantize the linears of a block, and move the states behind it.

        Raises:
            ValueError: See `quantize_model`.
        """
        observers = {fqn: RangeObserver() for fqn in block.linears() if fqn in self._static}
        stream = self._streams.get(QUANTIZED)
        float_inputs: dict[str, list[Tensor]] = {}
        if FLOAT in self._streams:
            aimed = self._aimed_inputs(block)
            float_inputs = self._streams[FLOAT].advance(block, observers, aimed)
        known = {**self._known, **observers}
        errors: list[LayerError] = []
        for readers in block.shared_inputs():
            plans = [self._plans[fqn] for fqn in readers if fqn in self._plans]
            gptq = None
            if stream is not None and any(map(self.quantizes, readers)):
                moments = stream.moments(block, readers[0], float_inputs.pop(readers[0], None))
                gptq = self._factorized(moments, readers[0])
            for plan in plans:
                errors.append(quantize_linear(self._model, plan, self._recipe, gptq, known))
                self._progress(plan.fqn)
        if stream is not None:
            stream.advance(block)
        return errors

    def quantize_head(
        self, rows: Iterable[Tensor], table: tuple[Tensor, Tensor] | None = None
    ) -> list[LayerError]:
        """Quantize the head, if the recipe does.

        Args:
            rows: Its rows in order, float32 [n, hidden_size] at a time (`chunk_rows`); the final
                norm must be in memory when the first is taken. Not touched if they stay float.
            table: Integers and scales of the embedding, which the head shares.

        Raises:
            ValueError: See `quantize_model`.
        """
        fqn = self._names.head
        plan = None if fqn is None else self._plans.get(fqn)
        if fqn is None or plan is None:
            return []
        if not self.quantizes(fqn):
            known = self._head_observers(plan)
            kept = quantize_linear(self._model, plan, self._recipe, None, known)
            self._progress(fqn)
            return [kept]
        linear = float_linear(self._model, fqn)
        parts: list[tuple[Tensor, Tensor]] = []
        squares: list[tuple[float, float]] = []
        results: list[GptqResult] = []
        gptq: Gptq | None = None
        for chunk in rows:
            if table is not None:
                start = sum(len(part) for part, _ in parts)
                q, scale = (each[start : start + len(chunk)] for each in table)
            elif QUANTIZED not in self._streams:
                q, scale = self._round(fqn, chunk, plan.weight)
            else:
                gptq = gptq or self._factorized(self._head_moments(fqn), fqn)
                results.append(self._round_gptq(fqn, gptq, chunk, plan.weight))
                q, scale = results[-1].q, results[-1].scale
            squares += squared_norms(chunk, q, scale, plan.weight)
            parts.append((q, scale))
        q, scale = (torch.cat(each) for each in zip(*parts, strict=True))
        bias = None if linear.bias is None else linear.bias.detach().float()
        static = plan.activation.granularity is Granularity.TENSOR
        input_scale = static_scale(plan, self._head_observers(plan)) if static else None
        quantized = QuantizedLinear(q, scale, bias, plan.weight, plan.activation, input_scale)
        replace_module(self._model, fqn, quantized)
        self._progress(fqn)
        return [LayerError(fqn, relative_error(squares), *_joined_errors(results))]

    def state(self) -> dict[str, Tensor]:
        """Return the hidden states between the last finished part and the next."""
        return {
            f"{name}.{i}": state
            for name, stream in self._streams.items()
            for i, state in enumerate(stream.states)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, with the same model, recipe and batches.

        Args:
            state: It, among other tensors by other names.

        Raises:
            ValueError: The states are those of another calibration.
        """
        tokens = tokens_in(self._batches)
        nothing = torch.zeros(len(tokens), self._names.hidden_size)
        self._open_streams(tokens, nothing, nothing)
        expected = {key: tuple(value.shape) for key, value in self.state().items()}
        found = {
            key: tuple(value.shape)
            for key, value in state.items()
            if key.startswith((f"{FLOAT}.", f"{QUANTIZED}."))
        }
        if found != expected:
            raise ValueError(
                f"hidden states: expected those of {len(self._batches)} calibration batches, got "
                f"others"
            )
        for name, stream in self._streams.items():
            stream.states = [state[f"{name}.{i}"] for i in range(len(stream.states))]

    def _open_streams(self, tokens: Tensor, float_rows: Tensor, seen_rows: Tensor) -> None:
        with_gptq = self._recipe.weights is WeightMethod.GPTQ
        if self._static or any(map(self._aims, self._plans)):
            self._streams[FLOAT] = self._stream(tokens, float_rows)
        if with_gptq:
            self._streams[QUANTIZED] = self._stream(tokens, seen_rows)

    def _stream(self, tokens: Tensor, rows: Tensor) -> BlockStream:
        return BlockStream(self._model, self._names, self._batches, KnownRows(tokens, rows))

    def _as_head_reads(self, rows: Tensor) -> Tensor:
        """Return rows of the embedding in the basis that a head with the same table is in."""
        rotation = self._table_rotation
        return rows if rotation is None else rotation.rotate(rows.double()).float()

    def _round(self, fqn: str, rows: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
        with naming(fqn):
            return quantize_weight(rows.detach(), spec, clip_search=self._recipe.clip_search)

    def _round_gptq(self, fqn: str, gptq: Gptq, rows: Tensor, spec: WeightSpec) -> GptqResult:
        with naming(fqn):
            return gptq.round(rows.detach(), spec, clip_search=self._recipe.clip_search)

    def _factorized(self, moments: Moments, fqn: str) -> Gptq:
        with naming(fqn):
            return Gptq(moments.hessian, moments.cross, self._recipe.aim_share)

    def _aims(self, fqn: str) -> bool:
        """Return whether GPTQ needs to know the float model's input of a linear."""
        with_gptq = self._recipe.weights is WeightMethod.GPTQ
        return with_gptq and fqn in self._plans and aims_elsewhere(self._plans[fqn].weight)

    def _aimed_inputs(self, block: Block) -> list[str]:
        """Return the linears that stand for inputs of which GPTQ needs the float model's too."""
        return [readers[0] for readers in block.shared_inputs() if any(map(self._aims, readers))]

    def _head_moments(self, fqn: str) -> Moments:
        """Return the second moments of what the head reads."""
        moments = Moments()
        others: Iterable[Tensor | None] = repeat(None, len(self._streams[QUANTIZED].states))
        if self._aims(fqn):
            others = self._head_inputs(fqn, FLOAT)
        for own, other in zip(self._head_inputs(fqn, QUANTIZED), others, strict=True):
            moments.add(rows_of(own), None if other is None else rows_of(other))
        moments.require_any(fqn)
        return moments

    def _head_observers(self, plan: LayerPlan) -> Mapping[str, RangeObserver]:
        """Return what knows the head's input: with ranges of the float model's final norm."""
        if plan.observed not in self._static:
            return self._known
        observer = RangeObserver()
        for x in self._head_inputs(plan.fqn, FLOAT):
            observer.update_from(plan.fqn, x)
        return {plan.observed: observer}

    def _head_inputs(self, fqn: str, stream: str) -> Iterator[Tensor]:
        """Yield what the head reads of each batch, behind the final norm and an R1 at run time."""
        final_norm, head = self._names.final_norm, self._model.get_submodule(fqn)
        norm = nn.Identity() if final_norm is None else self._model.get_submodule(final_norm)
        for state in self._streams[stream].states:
            with torch.inference_mode():
                x = rotated_input(head, norm(state))
            yield x


def _joined_errors(results: Sequence[GptqResult]) -> tuple[float, float] | tuple[None, None]:
    """Return the relative output errors, GPTQ's and to nearest, of rows rounded in parts."""
    if not results:
        return None, None
    energy = sum(result.energy for result in results) or 1.0  # outputs of zeros have no error
    return (
        sum(result.error * result.energy for result in results) / energy,
        sum(result.rtn_error * result.energy for result in results) / energy,
    )


def quantize_model(
    model: nn.Module,
    names: BlockStack,
    recipe: QuantizationRecipe,
    calibration: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str], None] = lambda fqn: None,
    planned: CalibratedPlan | None = None,
) -> list[LayerError]:
    """Replace the linears, the embedding and the head by integer modules.

    Args:
        model: See `QuantizationWalk`; all of it is in memory.
        names: Its parts.
        recipe: Bit widths and granularities.
        calibration: Forward-pass batches; used if an input is quantized per tensor, and by GPTQ.
        progress: Called with the FQN of each finished linear.
        planned: How each linear is quantized; default is `calibrate_plan` of the recipe alone.

    Returns:
        The rounding error of each layer.

    Raises:
        ValueError: A weight is not finite, a group size does not fit (the message names the layer),
            or the calibration is empty although the recipe needs it.
    """
    batches = list(calibration)
    if planned is None and needs_whole_model(recipe):
        planned = calibrate_plan(model, names, recipe, batches)
    walk = QuantizationWalk(model, names, recipe, batches, progress, planned)
    walk.quantize_embedding(rows_in_memory(model, names.embedding))
    errors = [error for block in names.blocks for error in walk.quantize_block(block)]
    head = [] if names.head is None else walk.quantize_head(rows_in_memory(model, names.head))
    return errors + head


def rows_in_memory(model: nn.Module, fqn: str) -> Iterator[Tensor]:
    """Yield the rows of a float embedding or linear, a chunk at a time."""
    weight = model.get_parameter(f"{fqn}.weight").detach()
    for rows in row_chunks(weight):
        yield weight[rows]
