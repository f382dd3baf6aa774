"""How far reading or writing is, with bytes a second, for the person who waits."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

_LOG_SECONDS = 10.0


class Progress:
    """Bytes done: a bar on a terminal, a line now and then elsewhere; called with each increment, from any thread."""

    def __init__(self, label: str, total: int, shown: bool):
        """
        Args:
            label: what is being done.
            total: bytes in all.
            shown: False says nothing.
        """
        self._label, self._total, self._done, self._shown = label, total, 0, shown
        self._lock = threading.Lock()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True)

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        return self

    def __call__(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            if self._bar is not None:
                self._bar.update(n_bytes)
            elif time.monotonic() - self._last > _LOG_SECONDS:
                self._last = time.monotonic()
                self._say()

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif error[0] is None:
            self._say()

    def _say(self) -> None:
        if self._shown:
            rate = self._done / max(time.monotonic() - self._start, 1e-9)
            done, unit = (1e9, "GB") if self._total >= 1e8 else (1e6, "MB")
            of = f"{self._done / done:.2f} of {self._total / done:.2f} {unit}"
            print(f"{self._label}: {of}, {rate / 1e9:.2f} GB/s", file=sys.stderr, flush=True)
