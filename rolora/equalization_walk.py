"""Measure the scales of an equalization on a float model, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rolora.block_stream import BlockStream, KnownRows, rows_of, rows_of_tokens, tokens_in
from rolora.decoder import BlockNames, DecoderNames
from rolora.equalization import FIELDS, INNER_FIELDS, Equalization, Equalized, Noise
from rolora.fold import norm_gain, row_chunks

SMALLEST_SHARE = 1e-6
"""Of the mean energy of a vector's channels, below which a channel counts as no quieter."""


class EqualizationWalk:
    """Measures a float model block by block; what is in memory need only be the part at hand.

    Args:
        model: Merged, neither folded nor rotated, its head untied.
        names: Its parts.
        batches: Forward-pass batches with `input_ids`, at least one.
        noise: What the scales make least.
        inputs: Which have scales; for `INNER` the head is not to be measured.

    Raises:
        ValueError: There are no batches, or no inputs are to have scales.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: DecoderNames,
        batches: Sequence[Mapping[str, Tensor]],
        noise: Noise = Noise.OF_INPUTS,
        inputs: Equalized = Equalized.ALL,
    ) -> None:
        if not batches:
            raise ValueError("equalization: expected calibration text, got none")
        if inputs is Equalized.NONE:
            raise ValueError("equalization: expected inputs to measure, got none")
        self._model, self._names, self._batches = model, names, batches
        self._noise = noise
        self._stream: BlockStream | None = None
        wanted = INNER_FIELDS if inputs is Equalized.INNER else FIELDS
        self._scales: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def begin(self, rows: Iterable[Tensor]) -> None:
        """Put the states in front of the first block.

        Args:
            rows: Of the embedding, in order, float32 [n, hidden_size] at a time.
        """
        tokens = tokens_in(self._batches)
        wanted = [known for _, known in rows_of_tokens(tokens, rows)]
        known = KnownRows(tokens, torch.cat(wanted))
        self._stream = BlockStream(self._model, self._names, self._batches, known)

    def measure(self, block: BlockNames) -> None:
        """Find the scales of a block, and move the states behind it.

        Raises:
            ValueError: An input or a weight is not finite; the message names the linear.
        """
        assert self._stream is not None
        norms = (block.attention_norm, None, block.mlp_norm, None)
        measured = [
            (name, readers, norm)
            for name, readers, norm in zip(FIELDS[:-1], block.shared_inputs(), norms, strict=True)
            if name in self._scales
        ]
        found = self._stream.advance(block, kept=[readers[0] for _, readers, _ in measured])
        for name, readers, norm in measured:
            inputs = _energy(found.pop(readers[0]))
            columns = torch.stack([self._columns(fqn) for fqn in readers]).sum(0)
            if name == "value":
                inputs, columns = (_by_value(each, self._names) for each in (inputs, columns))
            gain = None if norm is None else norm_gain(self._model, self._names, norm)
            self._scales[name].append(_scales(readers[0], inputs, columns, gain, self._noise))

    def measure_head(self, rows: Iterable[Tensor]) -> None:
        """Find the scales of the head.

        Args:
            rows: Its rows, float32 [n, hidden_size] at a time; the final norm must be in memory
                when the first is taken.
        """
        assert self._stream is not None
        columns = _energy(rows)
        norm = self._model.get_submodule(self._names.final_norm)
        with torch.inference_mode():
            inputs = _energy(rows_of(norm(state)) for state in self._stream.states)
        gain = norm_gain(self._model, self._names, self._names.final_norm)
        scales = _scales(self._names.head, inputs, columns, gain, self._noise)
        self._scales["head"].append(scales)

    def keep_head(self, rows: Iterable[Tensor]) -> None:
        """Let the head's weights be those of the embedding, without the gain of the final norm.

        The scales are then that gain, which stays where it is.

        Args:
            rows: See `measure_head`; the first are taken.

        Raises:
            ValueError: A gain is 0, which no scale is.
        """
        next(iter(rows))
        gain = norm_gain(self._model, self._names, self._names.final_norm)
        if not bool(gain.all()):
            raise ValueError(
                f"{self._names.final_norm}: expected gains other than 0, in front of a head that "
                f"shares the embedding's table; got one at channel {int(gain.eq(0).nonzero()[0])}"
            )
        self._scales["head"].append(gain)

    def result(self) -> Equalization:
        """Return the scales of all parts."""
        stacked = {name: torch.stack(found) for name, found in self._scales.items()}
        if "head" in stacked:
            stacked["head"] = stacked["head"][0]
        return Equalization(**stacked)

    def _columns(self, fqn: str) -> Tensor:
        """Return the squared norms of a weight's columns, float64 [in]."""
        weight = self._model.get_parameter(f"{fqn}.weight").detach()
        return _energy(weight[rows] for rows in row_chunks(weight))


def _energy(matrices: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of each column of matrices [n, K] below each other, float64 [K]."""
    return torch.stack([each.double().square().sum(0) for each in matrices]).sum(0)


def _scales(fqn: str, inputs: Tensor, columns: Tensor, gain: Tensor | None, noise: Noise) -> Tensor:
    """Return the powers of M_ii and C_ii of folded weights and inputs, their geometric mean 1.

    Args:
        fqn: For messages.
        inputs: Energy of each channel in front of the linear, float64 [K].
        columns: Of the weights' columns, float64 [K].
        gain: Of the norm in front, not folded yet.
        noise: Gives the powers.
    """
    for name, each in (("inputs", inputs), ("weights", columns)):
        if not bool(torch.isfinite(each).all()):
            raise ValueError(f"{fqn}: its {name} are not finite on the calibration text")
    if gain is not None:
        squares = gain.square()
        inputs = torch.where(squares > 0, inputs / squares, inputs.new_zeros(()))
        columns = columns * squares
    of_columns, of_inputs = noise.value
    scales = _floored(columns).pow(of_columns) / _floored(inputs).pow(of_inputs)
    return scales / scales.log().mean().exp()


def _floored(energy: Tensor) -> Tensor:
    """Keep dead channels from scales without bound."""
    mean = float(energy.mean())
    return energy.clamp(min=SMALLEST_SHARE * mean) if mean > 0 else torch.ones_like(energy)


def _by_value(channels: Tensor, names: DecoderNames) -> Tensor:
    """Add up what query heads that share a value head have: [heads * d] -> [kv_heads * d]."""
    return channels.reshape(names.num_key_value_heads, -1, names.head_dim).sum(1).flatten()
