"""The online halves of R4 and, in some decoders, R1: rotate the input of a linear at run time.

The other half, the inverse in the weight, is in the same table (`applications`) and fused by
`fuse_rotations`. With R = left (x) right a vector x, read as a matrix X [l, r], becomes
left^T X right: two small products, l + r multiply-adds per element, instead of one with n = l r.
A rotation of blocks of channels is one small product per block.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rolora.blocks import readers_by_linear
from rolora.decoder import DecoderNames
from rolora.kronecker import Rotation
from rolora.rotation import RotationPlan
from rolora.rotation_table import Side, applications


class OnlineRotation(nn.Module):
    """Rotate the last dimension, or each block of it, by R = left (x) right.

    Args:
        rotation: R4, or R1 where it is online.
        dtype: Of the two matrices and of the computation, float32 or float64.
        device: Where the matrices are kept.

    Equivalent to:
        `(x.unflatten(-1, (-1, rotation.size)) @ rotation.dense()).flatten(-2)`
    """

    left: Tensor
    right: Tensor
    signs: Tensor | None
    """Floating [l, r], for a rotation that has signs in front of the two matrices."""

    def __init__(
        self,
        rotation: Rotation,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.register_buffer("left", rotation.left.to(device, dtype), persistent=False)
        self.register_buffer("right", rotation.right.to(device, dtype), persistent=False)
        signs = rotation.signs
        if signs is not None:
            signs = signs.to(device, dtype).reshape(rotation.left.shape[0], -1)
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate x [..., m * l * r], in the dtype of the matrices; returns the dtype of x."""
        groups = x.reshape(*x.shape[:-1], -1, self.right.shape[0]).to(self.left)
        if self.left.shape[0] > 1:
            groups = groups.unflatten(-2, (-1, self.left.shape[0]))
        if self.signs is not None:
            groups = groups * self.signs
        groups = groups @ self.right  # [..., l, r] x [r, r]
        if self.left.shape[0] > 1:
            groups = self.left.T @ groups
        return groups.reshape(x.shape).to(x)


def install_online_rotations(
    model: nn.Module, plan: RotationPlan, names: DecoderNames
) -> list[RemovableHandle]:
    """Rotate the input of every module that the table marks as online (R4, R1; R3 is elsewhere).

    The hook goes on the outermost module under the name. So attach adapters first: then both the
    base weight and `lora_A` see the rotated input. A hook on a linear that is wrapped later would
    rotate the base branch alone; installing a second one there is refused.

    Args:
        model: A decoder, or a PEFT model around it, already fused.
        plan: The rotation it was fused with; without one of these nothing is installed.
        names: Parts of the decoder.

    Returns:
        One handle per module; `handle.remove()` takes the rotation out again.

    Raises:
        ValueError: The plan is for other sizes, or a module already has an online rotation.

    Invariant:
        The matrices are float64 for a float64 module and float32 for all others.
    """
    unwrap = getattr(model, "get_base_model", None)
    decoder: nn.Module = unwrap() if callable(unwrap) else model
    table = applications(plan, names)
    entries = [entry for entry in table if entry.online and entry.side is Side.INPUT]
    for entry in entries:
        for inner in decoder.get_submodule(entry.fqn).modules():
            if any(isinstance(hook, _RotateInput) for hook in inner._forward_pre_hooks.values()):
                raise ValueError(
                    f"{entry.fqn}: expected no online rotation, got one already installed; remove "
                    f"its handle first, and attach adapters before installing"
                )
    readers_of = readers_by_linear(names)
    hooks: dict[str, _RotateInput] = {}
    handles = []
    for entry in entries:
        module = decoder.get_submodule(entry.fqn)
        readers = readers_of.get(entry.fqn, (entry.fqn,))
        if readers[0] not in hooks:
            online = _match_module(plan.find(entry.rotation, entry.layer), module)
            hooks[readers[0]] = _RotateInput(online, len(readers))
        handles.append(module.register_forward_pre_hook(hooks[readers[0]]))
    return handles


def rotated_input(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module's online rotation makes of an input; the input where it has none."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _RotateInput):
            x = hook.rotation(x)
    return x


class _RotateInput:
    """Forward pre-hook of the linears that read one input, which is rotated once for all of them.

    Args:
        rotation: What rotates it; it follows the input to its device.
        readers: How many linears read it.
    """

    _input: weakref.ReferenceType[Tensor] | None
    _rotated: Tensor | None
    _with_gradient: bool
    _seen: set[int]

    def __init__(self, rotation: OnlineRotation, readers: int) -> None:
        self.rotation = rotation
        self._readers = readers
        self._forget()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, with_gradient = inputs[0], torch.is_grad_enabled()
        known = self._input is not None and self._input() is x
        # A module that comes again is in another pass, where x may have other values.
        if not known or self._with_gradient != with_gradient or id(module) in self._seen:
            self._forget()
            if self.rotation.left.device != x.device:
                self.rotation.to(x.device)
            self._input, self._with_gradient = weakref.ref(x), with_gradient
            self._rotated = self.rotation(x)
        rotated = self._rotated
        self._seen.add(id(module))
        if len(self._seen) == self._readers:
            self._forget()
        return (rotated, *inputs[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"rotation": self.rotation, "_readers": self._readers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        """Keep nothing of an input that all have read."""
        self._input = self._rotated = None
        self._with_gradient = False
        self._seen = set()


def _match_module(rotation: Rotation, module: nn.Module) -> OnlineRotation:
    """Build the rotation on the module's device, in float64 only if the module computes in it.

    A module without memory yet ("meta") gets a rotation on the CPU, where its weights will be.
    """
    tensors = [*module.parameters(), *module.buffers()]
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    device = torch.device("cpu") if device.type == "meta" else device
    return OnlineRotation(rotation, torch.float64 if double else torch.float32, device)
