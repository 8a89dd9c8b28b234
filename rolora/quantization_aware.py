"""Train through the rounding of a quantized model, and keep exactly what was trained.

Every linear of a quantized checkpoint becomes a float one that rounds as the checkpoint does:

    y = Q_x(x) Q_w(V + dW)^T + bias            Q_w, Q_x: `fake_quant.fake_quantize`

dW is the change that an adapter makes (s B A for LoRA); V is the frozen latent weight. The scales
of weights and inputs are trained along with it, as s = s_0 exp(t) with t = 0 at the start, so that
a scale stays positive and moves in proportion (learned step sizes, arXiv:1902.08153).

**Latent weight.** With W the float weight, q and s_0 the checkpoint's integers and scales,

    V = s_0 q + clamp(W - s_0 q, -c s_0, c s_0),          c = LATENT_REACH < 1/2

is the point nearest to W that still rounds to q: training starts at the checkpoint, whatever made
its integers (GPTQ moves many of them away from the nearest), and yet knows which way each weight
leans. Source of the idea to train LoRA through fake quantization: LLM-QAT (arXiv:2305.17888) and
the outlook of RoLoRA (arXiv:2407.08044); the latent weight is ours.

Per-token scales depend on the input, s = clip * absmax / quant_max; there the clip ratio is trained
and absmax counts as a constant. Inputs in groups keep their scales, which a kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from rolora.affine import activation_range, quantize, token_magnitude, weight_range
from rolora.fake_quant import fake_quantize, fake_quantize_tokens
from rolora.linear import QuantizedLinear
from rolora.scheme import UNQUANTIZED_BITS, ActivationSpec, Granularity, WeightSpec

LATENT_REACH = 0.2
"""How far from an integer a latent weight may start, in steps; at 0.5 it would be undecided.

Near 0.5 the first updates turn many integers and undo what GPTQ had arranged: with 0.45 the loss of
a W4A8 SmolLM2-135M rises in the first 20 steps, with 0.2 it falls.
"""


class InputQuantizer(nn.Module):
    """Rounds the input of one or several linears, with a trained scale.

    Args:
        spec: How the input is quantized.
        input_scale: float32 scalar; needed by, and only by, TENSOR granularity.

    Raises:
        ValueError: The input has a zero point.
    """

    start: Tensor

    def __init__(self, spec: ActivationSpec, input_scale: Tensor | None) -> None:
        super().__init__()
        if not (spec.is_float or spec.symmetric):
            raise ValueError(
                "inputs with a zero point are not trained through their rounding; quantize with "
                "symmetric activations"
            )
        self.spec = spec
        start = torch.tensor(spec.clip_ratio) if input_scale is None else input_scale
        self.register_buffer("start", start.detach().float().clone())
        # the kernel for grouped inputs covers the whole range of each group
        trained = not spec.is_float and spec.granularity is not Granularity.GROUP
        self.log_factor = nn.Parameter(torch.zeros_like(self.start), requires_grad=trained)

    @property
    def static(self) -> bool:
        """Whether one scale serves all tokens."""
        return not self.spec.is_float and self.spec.granularity is Granularity.TENSOR

    def value(self) -> Tensor:
        """Return the trained scale (TENSOR) or clip ratio, float32 scalar."""
        return self.start * torch.exp(self.log_factor)

    def trained_spec(self) -> ActivationSpec:
        """Return the format with the trained clip ratio in it."""
        return self.spec if self.static else replace(self.spec, clip_ratio=float(self.value()))

    def forward(self, x: Tensor) -> Tensor:
        """Round x [..., K] and return it as float32."""
        x = x.float()
        if self.spec.is_float:
            return x
        quant_min, quant_max = activation_range(self.spec.bits)
        if self.static:
            return fake_quantize(x, self.value(), quant_min, quant_max)
        width = self.spec.group_size or x.shape[-1]
        groups = x.reshape(*x.shape[:-1], -1, width)
        largest = token_magnitude(groups.detach())
        factor = (self.value().double() / quant_max).float()  # as `quantize_tokens` rounds it
        return fake_quantize_tokens(groups, largest, factor, self.spec.bits).reshape(x.shape)


class QuantizationAwareLinear(nn.Module):
    """A linear that rounds its input and its weight in the forward pass.

    Args:
        weight: The float weight W [out, in], in the basis of the quantized model.
        quantized: The linear of the checkpoint: integers, scales, bias and formats.
        input_quantizer: Rounds the input; may be shared by linears that read the same.
        change: Returns dW [out, in], with a gradient; None where nothing is trained but scales.

    Raises:
        ValueError: The weight has another shape than the integers, or the checkpoint leaves it in
            float.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        quantized: QuantizedLinear,
        input_quantizer: InputQuantizer,
        change: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        spec = quantized.weight_spec
        if spec.bits == UNQUANTIZED_BITS:
            raise ValueError(
                f"a weight of {spec.bits} bits is not rounded; override its input to 16 bits too"
            )
        self.weight_spec = spec
        self.input_quantizer = input_quantizer
        self.change = change
        latent = latent_weight(weight, quantized.weight, quantized.weight_scale, spec)
        # parameters, not buffers: several processes would send each other buffers in every step
        self.latent = nn.Parameter(latent, requires_grad=False)
        start_scale = quantized.weight_scale.detach().float().clone()
        self.start_scale = nn.Parameter(start_scale, requires_grad=False)
        self.register_buffer("bias", quantized.bias)
        self.log_factor = nn.Parameter(torch.zeros_like(self.start_scale))

    def scale(self) -> Tensor:
        """Return the trained weight scales, float32 [out] or [out, groups]."""
        return self.start_scale * torch.exp(self.log_factor)

    def float_weight(self) -> Tensor:
        """Return V + dW, float32 [out, in], computed without mixed precision."""
        if self.change is None:
            return self.latent
        with torch.autocast(self.latent.device.type, enabled=False):
            return self.latent + self.change()

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] for x [..., in]."""
        weight = _grouped(self.float_weight(), self.weight_spec)
        scale = self.scale().unsqueeze(-1)
        rounded = fake_quantize(weight, scale, *weight_range(self.weight_spec.bits))
        return functional.linear(
            self.input_quantizer(x), rounded.reshape(self.latent.shape), self.bias
        )

    @torch.no_grad()
    def integers(self) -> Tensor:
        """Return what the forward pass rounds the weight to, int8 [out, in]."""
        return round_weight(self.float_weight(), self.scale(), self.weight_spec)


def latent_weight(weight: Tensor, q: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """Return the point nearest to a weight that rounds to given integers, float32 [out, in].

    Args:
        weight: float [out, in].
        q: int8 [out, in].
        scale: float32 [out] or [out, groups].
        spec: Bits and group size.

    Raises:
        ValueError: Weight and integers differ in shape.
    """
    if weight.shape != q.shape:
        raise ValueError(
            f"expected a weight of shape {list(q.shape)}, got {list(weight.shape)}: the quantized "
            "model is of another model"
        )
    step = scale.float().unsqueeze(-1)
    centre = _grouped(q.float(), spec) * step
    lean = _grouped(weight.detach().float(), spec) - centre
    reach = LATENT_REACH * step
    return (centre + torch.minimum(torch.maximum(lean, -reach), reach)).reshape(weight.shape)


def round_weight(weight: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """Round a weight to nearest with given scales, int8 [out, in].

    Args:
        weight: float32 [out, in].
        scale: float32 [out] or [out, groups].
        spec: Bits and group size.
    """
    q = quantize(_grouped(weight, spec), scale.unsqueeze(-1), *weight_range(spec.bits))
    return q.reshape(weight.shape)


def _grouped(weight: Tensor, spec: WeightSpec) -> Tensor:
    """View [out, in] as [out, groups, columns], or leave it where scales are per channel."""
    return weight if spec.group_size is None else weight.unflatten(1, (-1, spec.group_size))
