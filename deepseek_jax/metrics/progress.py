"""Progress for the person who waits: a bar on a terminal, plain lines in a log or a notebook."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

_RECENT = 32  # counts from which the time left is told


class Progress:
    """Shows how far a loop is. Nothing it shows is kept: metrics go to the `JsonlWriter`.

    ```python
    with Progress(total=steps, initial=step) as progress:
        progress.update(step, {"loss": loss})
    ```
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        *,
        label: str = "train",
        unit: str = "step",
        log_seconds: float = 10.0,
        shown: bool = True,
        stream: TextIO | None = None,
    ):
        """
        Args:
            total: the count at which the loop is done.
            initial: the count at which it starts; a resumed run's step.
            label, unit: what is counted.
            log_seconds: least time between two plain lines, seconds.
            shown: False shows nothing (every process but the first).
            stream: where it goes; None is stderr.
        """
        self._total, self._initial, self._count = total, initial, initial
        self._label, self._unit, self._log_seconds = label, unit, log_seconds
        self._stream: TextIO = stream or sys.stderr
        self._shown = shown
        self._bar: Any = None
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), initial)], maxlen=_RECENT)
        """When the latest counts were reached."""
        self._last_line = -float("inf")

    def update(self, count: int, values: Mapping[str, float | int | str] | None = None) -> None:
        """Shows that the loop has reached `count`. `values` are shown beside it, numbers to four digits.

        The first and the last count of a loop are always shown.
        """
        self._count = count
        if not self._shown:
            return
        self._begin()
        text = "  ".join(f"{name} {_short(value)}" for name, value in (values or {}).items())
        if self._bar is not None:
            if text:
                self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count - self._bar.n)
            return
        now = time.monotonic()
        self._mark(now)
        if now - self._last_line >= self._log_seconds or count >= self._total:
            self._last_line = now
            self._print(f"{self._label} {self._unit} {count}/{self._total}  {text}{self._eta(now)}")

    def message(self, text: str) -> None:
        """Prints a line that stays, above the bar where there is one."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Draws the bar where there is a terminal; not before the loop begins, so that messages may come first."""
        if self._bar is None and self._shown and self._stream.isatty():
            from tqdm import tqdm

            total, initial = self._total, self._initial
            self._bar = tqdm(
                total=total, initial=initial, desc=self._label, unit=self._unit, file=self._stream, dynamic_ncols=True
            )

    def _mark(self, now: float) -> None:
        self._marks.append((now, self._count))
        if len(self._marks) == 3 and self._marks[0][1] == self._initial:
            self._marks.popleft()  # the first stretch holds the compilation, which says nothing of what is left

    def _eta(self, now: float) -> str:
        """Time left at the speed of the latest counts: steps grow slower along a batch ramp."""
        then, count = self._marks[0]
        done, left = self._count - count, self._total - self._count
        if done <= 0 or left <= 0:
            return ""
        return f"  left {_duration((now - then) / done * left)}"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours < 100 else f"{hours // 24} d {hours % 24} h"


def _short(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"
