"""Two 4-bit weights in a byte.

Layout: row by row, the even column in the low nibble, each value stored with an offset of 8 (so
0..15). This is also the block layout of ONNX Runtime's MatMulNBits, so that an export copies the
bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OFFSET = 8


def pack_int4(q: Tensor) -> Tensor:
    """Pack int8 values of -8..7.

    Args:
        q: int8 [out, in], in even.

    Returns:
        uint8 [out, in / 2].

    Raises:
        ValueError: The dtype is not int8, a value is out of range, or the number of columns is odd.
    """
    if q.dtype != torch.int8 or q.ndim != 2:
        raise ValueError(f"pack: expected int8 [out, in], got {q.dtype} {tuple(q.shape)}")
    if q.shape[1] % 2:
        raise ValueError(f"pack: expected an even number of columns, got {q.shape[1]}")
    if q.numel() and (int(q.min()) < -_OFFSET or int(q.max()) >= _OFFSET):
        raise ValueError(f"pack: expected values of -8..7, got {int(q.min())}..{int(q.max())}")
    unsigned = (q + _OFFSET).to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 [out, in] that `pack_int4` packed.

    Raises:
        ValueError: The dtype is not uint8 or the tensor is not 2-D.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(
            f"unpack: expected uint8 [out, in / 2], got {packed.dtype} {tuple(packed.shape)}"
        )
    low, high = packed & 0x0F, packed >> 4
    columns = 2 * packed.shape[1]
    unsigned = torch.stack((low, high), dim=-1).reshape(packed.shape[0], columns)
    return (unsigned.to(torch.int16) - _OFFSET).to(torch.int8)
