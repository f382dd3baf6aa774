"""Rows of published tensors as arrays: memory-mapped on a local disk, read by range from gs://."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from typing import Any

import numpy as np

from deepseek_jax import storage
from deepseek_jax.interop.headers import DTYPES, TensorInfo

_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: one call instead of a fault for every few pages
_AHEAD = 64 * 2**20  # bytes of a map up to which it is filled at once


class Reader:
    """Reads parts of tensors; used by several threads at once, and closed at the end.

    A local part is a map of its own that goes when the array goes, so that pages of a checkpoint larger than memory
    do not stay with the process.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.nbytes = 0
        """Bytes asked for so far."""

    def rows(self, info: TensorInfo, index: np.ndarray, *, whole: bool = True) -> np.ndarray:
        """The rows `index` (ascending) of a matrix, or entries of a vector, in the file's dtype; read-only.

        On a local disk rows that follow each other are the map itself. From gs:// one request reads from the first
        row to the last: rows in between that are not asked for come along, and a part of the columns cannot be had.
        `whole` says that all columns will be looked at, so that a local map may read ahead.
        """
        row = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
        first, last = int(index[0]), int(index[-1]) + 1
        data = self._bytes(info, info.start + first * row, info.start + last * row, whole)
        span = np.frombuffer(data, DTYPES[info.dtype]).reshape(last - first, *info.shape[1:])
        return span if len(index) == last - first else span[index - first]

    def _bytes(self, info: TensorInfo, start: int, end: int, whole: bool) -> Any:
        with self._lock:
            self.nbytes += end - start
        if start == end:
            return b""
        if not storage.is_local(info.file):
            data = storage.read_bytes(info.file, start, end)
            if len(data) != end - start:
                raise ValueError(f"{info.file} ends before byte {end}: it has changed while it was being read")
            return data
        aligned = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            flags = mmap.MAP_SHARED | (_POPULATE if whole and end - start <= _AHEAD else 0)
            mapped = mmap.mmap(self._descriptor(info), end - aligned, flags, mmap.PROT_READ, offset=aligned)
        except ValueError as error:
            raise ValueError(f"{info.file}: {error}; it has changed while it was being read") from None
        return memoryview(mapped)[start - aligned :]

    def _descriptor(self, info: TensorInfo) -> int:
        name = os.fspath(info.file)
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(name, os.O_RDONLY)
            return self._descriptors[name]

    def close(self) -> None:
        """Lets go of the files; arrays that were given out stay readable."""
        with self._lock:
            for descriptor in self._descriptors.values():
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
