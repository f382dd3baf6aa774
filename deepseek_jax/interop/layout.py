"""From rows of a published matrix to a leaf's piece, and back: transposition, and decoding of FP8 on the way."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.interop.rows import Axis, Row

_STRIP = 128  # rows transposed at once, so that they stay in the cache

Span = tuple[int, int]


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes: jax's CPU devices take such a one over without a copy."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def transposed(matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """[n, c] -> [c, n] in `out`, whose rows are contiguous, or in a new array.

    Values of 1, 2 and 4 bytes are first laid side by side in words of 8, which then move in one piece: three times as
    fast as numpy's own copy of `matrix.T`.
    """
    n, c = matrix.shape
    out = np.empty((c, n), matrix.dtype) if out is None else out
    together = 8 // matrix.itemsize if matrix.itemsize in (1, 2, 4) else 1
    contiguous = matrix.strides[1] == matrix.itemsize and out.strides[1] == out.itemsize
    if together == 1 or n % together or matrix.size < 2**14 or not contiguous:
        out[...] = matrix.T
        return out
    kind = f"u{matrix.itemsize}"
    bits, wide = matrix.view(kind), out.view(np.uint64)
    room = scratch("words", _STRIP * c * matrix.itemsize)
    for start in range(0, n, _STRIP):
        strip = bits[start : start + _STRIP]
        words = room[: strip.nbytes].view(kind).reshape(len(strip) // together, c, together)
        for k in range(together):
            words[:, :, k] = strip[k::together]
        wide[:, start // together : (start + len(strip)) // together] = words.view(np.uint64)[..., 0].T
    return out


_scratch = threading.local()


def scratch(name: str, n_bytes: int) -> np.ndarray:
    """Bytes of this thread's own, for the caller alone until it asks again: fresh memory costs more than the work."""
    held = getattr(_scratch, name, None)
    if held is None or len(held) < n_bytes:
        held = aligned_empty((n_bytes,), np.uint8)
        setattr(_scratch, name, held)
    return held[:n_bytes]


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
