"""Text files that grow by lines, where a file can grow and where it cannot."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from deepseek_jax.storage.files import AnyPath, is_local, path, upload, write_atomic


class LineFile:
    """A text file that grows by lines.

    On a local disk each line is handed to the system at once, so a killed program loses none. An object cannot grow,
    so a gs:// file is written anew from a local copy: at the first line after `SECONDS`, and after `PATIENCE` times as
    long as the last writing took, so that it costs about 1 / PATIENCE of the run's time at most, however long the
    file. A killed program loses the lines since; call `flush` where that must not be, such as before a checkpoint.
    """

    SECONDS = 15.0
    PATIENCE = 20.0

    def __init__(self, p: AnyPath, kept: Iterable[str] = ()):
        """
        Args:
            p: the file; what it held is replaced by `kept`.
            kept: lines, without their newlines, to begin with.
        """
        self.path = path(p)
        text = "".join(_line(line) for line in kept)
        write_atomic(self.path, text)
        self._local = is_local(self.path)
        if self._local:
            self._file = open(self.path, "ab")  # noqa: SIM115, closed in close()
        else:
            self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115, closed in close()
            self._file.write(text.encode())
            self._waiting, self._due = False, time.monotonic() + self.SECONDS

    def write(self, line: str) -> None:
        """Appends one line, given without its newline. Raises ValueError where it holds one."""
        self._file.write(_line(line).encode())
        self._file.flush()
        if not self._local:
            self._waiting = True
            if time.monotonic() >= self._due:
                try:
                    self._send()
                except OSError as error:  # the next line tries again; flush and close tell
                    logging.getLogger(__name__).warning("%s: not written (%s); trying again later", self.path, error)

    def flush(self) -> None:
        """Returns when every line is in the file: on the disk itself, or in the object. Raises OSError."""
        if self._local:
            os.fsync(self._file.fileno())
        elif self._waiting:
            self._send()

    def close(self) -> None:
        """Flushes and lets go of the file; a second call does nothing."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self) -> None:
        began = time.monotonic()
        try:
            upload(Path(self._file.name), self.path)
            self._waiting = False
        finally:
            now = time.monotonic()
            self._due = now + max(self.SECONDS, self.PATIENCE * (now - began))


def _line(text: str) -> str:
    if "\n" in text:
        raise ValueError(f"line={text[:80]!r}: a line holds no newline")
    return text + "\n"
