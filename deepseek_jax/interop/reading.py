"""Rows of published tensors as arrays."""

from __future__ import annotations

import numpy as np

from deepseek_jax import storage
from deepseek_jax.interop.headers import DTYPES, TensorInfo


def read_rows(
    parts: storage.PartReader, info: TensorInfo, index: np.ndarray | None = None, *, whole: bool = True
) -> np.ndarray:
    """The rows `index` (ascending; None: all) of a matrix, or entries of a vector, in the file's dtype; read-only.

    On a local disk rows that follow each other are the file's own pages. From gs:// one request reads from the first row
    to the last: rows in between that are not asked for come along, and a part of the columns cannot be had. `whole` says
    that all columns will be looked at.
    """
    if index is None:
        return np.frombuffer(parts.read(info.file, info.start, info.end), DTYPES[info.dtype]).reshape(info.shape)
    row = info.nbytes // info.shape[0]
    first, last = int(index[0]), int(index[-1]) + 1
    data = parts.read(info.file, info.start + first * row, info.start + last * row, whole=whole)
    span = np.frombuffer(data, DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])
    return span if len(index) == last - first else span[index - first]
