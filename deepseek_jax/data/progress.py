"""Progress on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

_LOG_SECONDS = 10.0


class Report:
    """Bytes done: a bar on a terminal, a plain line now and then elsewhere. Called with each increment."""

    def __init__(self, label: str, total: int | None, shown: bool):
        """
        Args:
            label: what is being done.
            total: bytes in all, where that is known.
            shown: False says nothing.
        """
        self._label, self._total, self._done, self._shown = label, total, 0, shown
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True)

    def __enter__(self) -> Report:
        self._start = self._last = time.monotonic()
        return self

    def __call__(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._bar is not None:
            self._bar.update(n_bytes)
        elif self._shown and time.monotonic() - self._last > _LOG_SECONDS:
            self._last = time.monotonic()
            of = "" if self._total is None else f" of {self._total / 1e6:.1f}"
            self._say(f"{self._label}: {self._done / 1e6:.1f}{of} MB")

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._say(f"{self._label}: {self._done / 1e6:.1f} MB in {time.monotonic() - self._start:.1f} s")

    def _say(self, line: str) -> None:
        if self._shown:
            print(line, file=sys.stderr, flush=True)
