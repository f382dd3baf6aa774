"""From rows of a published matrix to a leaf's piece, and back: transposition, and decoding of FP8 on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.interop.rows import Axis, Row

_LARGE = 2**14  # values from which a call of XLA's is worth its while

Span = tuple[int, int]


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes: jax's CPU devices take such a one over without a copy."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """[n, c] -> [c, n], contiguous and read-only.

    Handing a transposed view to jax's CPU lays it out anew by XLA's blocked transposition, seven times as fast as numpy's
    copy, and without Python's lock.
    """
    device = host_cpu() if matrix.itemsize <= 4 and matrix.size >= _LARGE else None
    if device is None:
        return np.ascontiguousarray(matrix.T)
    bits = matrix.view(f"u{matrix.itemsize}").T
    return np.asarray(jax.device_put(bits, device)).view(matrix.dtype)


def copy(target: np.ndarray, values: np.ndarray) -> None:
    """`target[...] = values`; equal dtypes as plain bits, since numpy copies bfloat16 one value at a time."""
    if target.dtype == values.dtype:
        target, values = (array.view(f"u{array.itemsize}") for array in (target, values))
    target[...] = values


@functools.cache
def host_cpu() -> Any:
    """This process's CPU as a jax device, or None where jax was told to leave it out (JAX_PLATFORMS=tpu)."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def places(axes: tuple[Axis, ...], spans: Sequence[Span]) -> np.ndarray:
    """Ascending indices, in a dim of a tensor that consists of `axes`, of the parts `spans` of what a leaf takes."""
    grid = np.arange(math.prod(axis.size for axis in axes)).reshape([axis.size for axis in axes])
    return grid[tuple(slice(a.start + s, a.start + e) for a, (s, e) in zip(axes, spans, strict=True))].ravel()


def split_spans(row: Row, spans: Sequence[Span]) -> tuple[Sequence[Span], Sequence[Span], Sequence[Span]]:
    """Spans of a leaf's dims -> those of its stacking dims, of the tensor's first dim, of its second."""
    lead, rest = spans[: len(row.lead)], spans[len(row.lead) :]
    if row.swapped:
        return lead, rest[len(row.cols) :], rest[: len(row.cols)]
    return lead, rest[: len(row.rows)], rest[len(row.rows) :]


def as_slice(index: np.ndarray) -> Any:
    """Indices that follow each other as a slice, which copies nothing; others as they are."""
    following = len(index) > 0 and int(index[-1]) - int(index[0]) + 1 == len(index)
    return slice(int(index[0]), int(index[-1]) + 1) if following else index


def assemble(rows: list[Row], pieces: list[np.ndarray]) -> np.ndarray:
    """The published tensor that these leaves' pieces (without stacking dims) make up: the inverse of reading it."""
    first = rows[0]
    shape = first.tensor_shape
    if len(rows) == 1 and not first.swapped:
        return np.ascontiguousarray(pieces[0]).reshape(shape)
    out: np.ndarray | None = None
    for row, piece in zip(rows, pieces, strict=True):
        r = places(row.rows, [(0, a.stop - a.start) for a in row.rows])
        c = places(row.cols, [(0, a.stop - a.start) for a in row.cols])
        part = np.ascontiguousarray(piece)
        part = transposed(part.reshape(len(c), len(r))) if row.swapped else part.reshape(len(r), len(c))
        if part.shape == shape:
            return part
        assert len(c) == shape[1]  # parts are of rows alone in every table
        out = np.empty(shape, part.dtype) if out is None else out
        out[as_slice(r)] = part
    assert out is not None
    return out
