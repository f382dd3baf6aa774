"""Parts of files: memory-mapped on a local disk, read by range from gs://."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading

from etils import epath

from deepseek_jax.storage.files import is_local, read_bytes

_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: one call instead of a fault for every few pages
_AT_ONCE = 64 * 2**20  # bytes of a map up to which it is filled at once


class PartReader:
    """Reads parts of files; used by several threads at once, and closed at the end.

    A local part is a map of its own that goes when the part goes, so that pages of files larger than memory do not stay
    with the process.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, file: epath.Path, start: int, end: int, *, whole: bool = True) -> bytes | memoryview:
        """The bytes start:end, read-only. `whole` says that all of them will be looked at: a local map is filled at once.

        Raises: ValueError where the file ends before `end`.
        """
        if start == end:
            return b""
        if not is_local(file):
            data = read_bytes(file, start, end)
            if len(data) != end - start:
                raise ValueError(f"{file} ends before byte {end}: it has changed while it was being read")
            return data
        aligned = start - start % mmap.ALLOCATIONGRANULARITY
        flags = mmap.MAP_SHARED | (_POPULATE if whole and end - start <= _AT_ONCE else 0)
        try:
            mapped = mmap.mmap(self._descriptor(file), end - aligned, flags, mmap.PROT_READ, offset=aligned)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; it has changed while it was being read") from None
        return memoryview(mapped)[start - aligned :]

    def _descriptor(self, file: epath.Path) -> int:
        name = os.fspath(file)
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(name, os.O_RDONLY)
            return self._descriptors[name]

    def close(self) -> None:
        """Lets go of the files; parts that were given out stay readable."""
        with self._lock:
            for descriptor in self._descriptors.values():
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
