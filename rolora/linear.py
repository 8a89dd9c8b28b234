"""A linear and an embedding of integers: the reference of the exported graph.

With activation scale s_x and zero point z (per tensor or token) and weight scales s_w[out]

    y = s_x * (q_x @ q_w^T - z * sum_k q_w) * s_w + bias      the bracket in exact int32

and with groups g of input columns the sum of that over g, each with its own s_x, z and s_w, or with
its own s_w alone where s_x is static. Where
only the weight is quantized, or only the input, the product is one of float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from rolora.activation import QuantizedActivation, quantize_activation, rounded_activation
from rolora.affine import dequantize
from rolora.kronecker import Rotation
from rolora.scheme import UNQUANTIZED_BITS, ActivationSpec, Granularity, WeightSpec

_EXACT_COLUMNS = 1024
"""Columns whose int8 products sum exactly in float32: 1024 * 128 * 128 = 2^24."""


def integer_matmul(q_x: Tensor, q_w: Tensor) -> Tensor:
    """Multiply int8 matrices exactly.

    Args:
        q_x: int8 [T, K].
        q_w: int8 [N, K].

    Returns:
        int32 [T, N], equal to the product in exact arithmetic.
    """
    columns = q_x.shape[1]
    # torch 2.13 returns memory that it never wrote for one column.
    if columns > 1 and _native_product_is_exact():
        return torch._int_mm(q_x.contiguous(), q_w.t())
    product = torch.zeros(q_x.shape[0], q_w.shape[0], dtype=torch.int32)
    for start in range(0, columns, _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        product += (q_x[:, part].float() @ q_w[:, part].float().t()).int()
    return product


@cache
def _native_product_is_exact() -> bool:
    """Return whether this CPU multiplies int8 exactly.

    Without VNNI instructions the kernel adds pairs of products in 16 bits, which saturate.
    """
    extremes = torch.tensor([[-128], [127]], dtype=torch.int8)
    product = torch._int_mm(extremes.repeat(1, 64), extremes.repeat(1, 64).t())
    return torch.equal(product, 64 * extremes.int() * extremes.int().t())


def dequantized_weight(q: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """Return the weight that integers stand for.

    Args:
        q: int8 [out, in].
        scale: float32 [out] or [out, groups].
        spec: How the weight is stored.

    Returns:
        float32 [out, in].
    """
    if spec.group_size is None:
        return dequantize(q, scale[:, None])
    grouped = q.reshape(q.shape[0], q.shape[1] // spec.group_size, spec.group_size)
    return dequantize(grouped, scale[:, :, None]).reshape(q.shape)


class QuantizedLinear(nn.Module):
    """A linear with integer weights whose input is quantized before the product.

    Args:
        weight: int8 [out, in].
        weight_scale: float32 [out] or [out, groups].
        bias: float32 [out] or None.
        weight_spec: How the weight is stored.
        activation: How the input is quantized.
        input_scale: float32 scalar; needed by, and only by, TENSOR granularity.

    Raises:
        ValueError: `input_scale` and the granularity contradict each other, or the weight's groups
            are not those of an input that is quantized at run time.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        weight_spec: WeightSpec,
        activation: ActivationSpec,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        _require_scale(activation, input_scale)
        # Grouped scales of the weight on a product over all groups would broadcast into nonsense.
        groups = activation.group_size if activation.granularity is Granularity.GROUP else None
        static = activation.granularity is Granularity.TENSOR
        if not (activation.is_float or static) and weight_spec.group_size not in (None, groups):
            raise ValueError(
                f"groups: expected the same for weight and input, got {weight_spec.group_size} and "
                f"{groups}"
            )
        self.weight_spec = weight_spec
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    @property
    def in_features(self) -> int:
        """Number of input columns K."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Number of output channels N."""
        return self.weight.shape[0]

    def quantize_input(self, x: Tensor) -> QuantizedActivation:
        """Quantize an input, float32 [T, K]."""
        return quantize_activation(x, self.activation, self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 [..., out] for float32 [..., in]."""
        if self.activation.is_float:
            return nn.functional.linear(x.float(), self.dequantized_weight(), self.bias)
        flat = x.reshape(-1, x.shape[-1]).float()
        quantized = self.quantize_input(flat)
        if Granularity.GROUP in (self.activation.granularity, self.weight_spec.granularity):
            y = self._grouped_product(quantized)
        else:
            product = integer_matmul(quantized.q, self.weight)
            if quantized.zero_point is not None:
                product -= quantized.zero_point * self.weight.sum(dim=1, dtype=torch.int32)
            y = product.float() * self.weight_scale * quantized.scale
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _grouped_product(self, x: QuantizedActivation) -> Tensor:
        """Sum the exact products of the groups, weighted by both scales; float32 [T, N]."""
        width = self.activation.group_size or self.weight_spec.group_size or self.in_features
        static = self.activation.granularity is Granularity.TENSOR
        y = torch.zeros(x.q.shape[0], self.out_features)
        for group, start in enumerate(range(0, self.in_features, width)):
            columns = slice(start, start + width)
            weight = self.weight[:, columns].contiguous()
            product = integer_matmul(x.q[:, columns], weight)
            if x.zero_point is not None:
                product -= x.zero_point[:, group] * weight.sum(dim=1, dtype=torch.int32)
            scale = self.weight_scale
            input_scale = x.scale if static else x.scale[:, group]
            y += product.float() * input_scale * (scale[:, group] if scale.ndim > 1 else scale)
        return y

    def dequantized_weight(self) -> Tensor:
        """Return the weight that the integers stand for, float32 [out, in]."""
        return dequantized_weight(self.weight, self.weight_scale, self.weight_spec)

    def extra_repr(self) -> str:
        """Describe bits and granularity."""
        return (
            f"in={self.in_features}, out={self.out_features}, weight={self.weight_spec.bits} bits "
            f"per "
            f"{self.weight_spec.granularity}, input={self.activation}"
        )


class InputQuantizedLinear(nn.Module):
    """A linear with a float weight whose input is rounded to the values its bits can express.

    Args:
        weight: float32 [out, in].
        bias: float32 [out] or None.
        activation: How the input is quantized.
        input_scale: float32 scalar; needed by, and only by, TENSOR granularity.

    Raises:
        ValueError: `input_scale` and the granularity contradict each other.
    """

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    weight_spec = WeightSpec(UNQUANTIZED_BITS)

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: ActivationSpec,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        _require_scale(activation, input_scale)
        self.activation = activation
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 [..., out] for float32 [..., in]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        rounded = rounded_activation(flat, self.activation, self.input_scale)
        y: Tensor = nn.functional.linear(rounded, self.weight, self.bias)
        return y.reshape(*x.shape[:-1], self.weight.shape[0])

    def extra_repr(self) -> str:
        """Describe bits and granularity."""
        rows, columns = self.weight.shape
        return f"in={columns}, out={rows}, weight=float, input={self.activation}"


def _require_scale(activation: ActivationSpec, input_scale: Tensor | None) -> None:
    """Refuse a static scale where the granularity has none, and none where it needs one."""
    if (activation.granularity is Granularity.TENSOR) != (input_scale is not None):
        raise ValueError(
            f"input scale: {activation.granularity} granularity "
            + ("needs one, got none" if input_scale is None else "takes none, got one")
        )


class QuantizedEmbedding(nn.Module):
    """An embedding table of integers, with a scale a row or a group of its columns.

    Args:
        weight: int8 [V, D].
        weight_scale: float32 [V] or [V, groups].
        weight_spec: How the table is stored.
        rotation: R of rows that are stored as e R, for a head that reads x R; undone in the lookup.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        weight_spec: WeightSpec,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__()
        self.weight_spec = weight_spec
        self.rotation = rotation
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 [..., D] for token ids int64 [...]."""
        flat = ids.reshape(-1)
        rows = dequantized_weight(self.weight[flat], self.weight_scale[flat], self.weight_spec)
        if self.rotation is not None:
            rows = self.rotation.unrotate(rows)
        return rows.reshape(*ids.shape, self.weight.shape[1])
