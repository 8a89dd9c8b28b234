"""Memory for results that is used again once nobody reads what it held."""

from __future__ import annotations

import weakref

import numpy as np
import onnxruntime as ort

BUFFERS_KEPT = 2
"""One that a caller may still read while the next result is computed, and that one."""


class LentArrays:
    """Lends float32 arrays, and takes the memory of those again that are no longer alive.

    An array is alive as long as it or a view of it is. Fresh memory for each result, which the
    system hands out page by page, costs 3 % of the time of a token for 16 sequences of
    SmolLM2-135M.
    """

    def __init__(self) -> None:
        self._lent: list[tuple[ort.OrtValue, weakref.ref[np.ndarray]]] = []
        """Buffers and what was lent of each; others are the callers' alone."""

    def room(self, shape: tuple[int, ...]) -> ort.OrtValue:
        """Return a buffer of a shape, of any content: one that is free, or a new one.

        Free buffers of other shapes are given up.
        """
        free, alive = None, []
        for buffer, array in self._lent:
            if array() is not None:
                alive.append((buffer, array))
            elif tuple(buffer.shape()) == shape:
                free = buffer
        self._lent = alive
        return (
            ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32) if free is None else free
        )

    def lend(self, buffer: ort.OrtValue) -> np.ndarray:
        """Return the content of a buffer as an array in the same memory."""
        array: np.ndarray = buffer.numpy()
        self._lent = [*self._lent, (buffer, weakref.ref(array))][-BUFFERS_KEPT:]
        return array
