"""Block-FP8 as DeepSeek-V3 publishes it (report, section 3.3; README_WEIGHTS.md): e4m3 values, a scale a 128 × 128 block.

weight = value · scale_inv[block]. The scale is amax / 448 of the block, 448 being the largest e4m3; V3.1's `ue8m0`
scales are the next power of two. A block at the edge is short, and its scale is that of the part that is there.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.interop import layout

BLOCK = (128, 128)
LARGEST = 448.0
_LEAST_AMAX = 1e-4  # as in the published quantisation, so that a block of zeros has a scale
_FAST = 2**20  # values from which decoding by XLA is worth a compilation

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def scale_shape(shape: tuple[int, int], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales of a matrix: blocks at the edge count whole."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def quantise(w: np.ndarray, *, power_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Float [out, in] -> values float8_e4m3fn [out, in] and scale_inv float32 [ceil(out / 128), ceil(in / 128)].

    Raises: ValueError where a value is not finite.
    """
    rows, cols = scale_shape((w.shape[0], w.shape[1]))
    values = np.empty(w.shape, FLOAT8)
    scales = np.empty((rows, cols), np.float32)
    for i in range(rows):  # a strip of blocks at a time, padded to whole ones: memory stays small
        strip = w[i * BLOCK[0] : (i + 1) * BLOCK[0]].astype(np.float32)
        padded = np.zeros((len(strip), cols * BLOCK[1]), np.float32)
        padded[:, : w.shape[1]] = strip
        blocks = padded.reshape(len(strip), cols, BLOCK[1])
        amax = np.maximum(np.abs(blocks).max(axis=(0, 2)), np.float32(_LEAST_AMAX))
        if not np.isfinite(amax).all():
            raise ValueError("a value is not finite: FP8 cannot hold it")
        scales[i] = amax / np.float32(LARGEST)
        if power_of_two:
            scales[i] = np.exp2(np.ceil(np.log2(scales[i])))
        scaled = np.clip(blocks / scales[i][:, None], -LARGEST, LARGEST)
        values[i * BLOCK[0] : (i + 1) * BLOCK[0]] = scaled.reshape(padded.shape)[:, : w.shape[1]].astype(FLOAT8)
    return values, scales


def dequantise(values: np.ndarray, scales: np.ndarray, dtype: Any, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """values · scale_inv of their blocks, multiplied in float32, in `dtype`: the meaning of a whole [out, in] matrix."""
    rows, cols = (np.arange(n) // b for n, b in zip(values.shape, block, strict=True))
    return (values.astype(np.float32) * scales[rows][:, cols]).astype(dtype)


class Decoder:
    """Decodes parts of matrices; each thread keeps the room of its last result, since fresh memory costs more than the
    work does."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self, values: np.ndarray, scales: np.ndarray, offset: int, block: int, out: np.ndarray) -> None:
        """Writes a part of a matrix, transposed and decoded, with scales that are already those of its rows.

        Args:
            values: float8_e4m3fn [n, c].
            scales: float32 [k, n]: row j is that of the values' columns whose place, `offset` added, lies in block j.
            offset: place of the first column in its block.
            block: columns of a block.
            out: [c, n].
        """
        cpu = layout.host_cpu() if values.size >= _FAST else None
        if cpu is None:
            places = (offset + np.arange(values.shape[1])) // block
            out[...] = (_VALUES.take(values.view(np.uint8).T) * scales[places]).astype(out.dtype)
            return
        bits, scales_there = jax.device_put((values.view(np.uint8).T, scales), cpu)
        room = getattr(self._local, "room", None)
        if room is None or room.shape != out.shape or room.dtype != out.dtype:
            with jax.default_device(cpu):
                room = jnp.zeros(out.shape, out.dtype)
        self._local.room = room = _decode(room, bits, scales_there, offset, block)
        layout.copy(out, np.asarray(room))


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True, static_argnums=(3, 4))
def _decode(room: jax.Array, bits: jax.Array, scales: jax.Array, offset: int, block: int) -> jax.Array:
    """Into the memory of `room`. By way of float16, into which e4m3 fits but for its exponent's bias, 8 less: shifts and
    the processor's own conversion, where XLA's from float8 is dozens of instructions."""
    sign_kept = jax.lax.bitcast_convert_type(bits, jnp.int8).astype(jnp.int16)
    halves = (sign_kept << 7) & jnp.int16(~0x4000)
    halves = jnp.where(bits & 0x7F == 0x7F, halves & jnp.int16(-0x8000) | jnp.int16(0x7E00), halves)  # NaN
    values = jax.lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32) * 2.0**8
    each = jnp.repeat(scales, block, axis=0)[offset : offset + len(bits)]
    return (values * each).astype(room.dtype)
