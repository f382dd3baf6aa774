"""A process that hangs should end, and say where it hung: a silent one costs days."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from deepseek_jax import storage
from deepseek_jax.parallel import hosts

EXIT_CODE = 124
"""Of a process that hung, as coreutils' `timeout` has it."""

_GRACE = 30.0  # seconds that the thread below gets before the C library ends a process whose interpreter is stuck


class Watchdog:
    """Ends the process when `beat` has not been called for `timeout` seconds after the first time, with all threads' stacks.

    Reading a corpus and restoring a checkpoint come before the first beat: they take as long as they take.

    They go to stderr and to `hang.txt` in the run folder (`hang.2.txt` of process 2, where there are several: one that
    hangs is waited for by all). Where the interpreter itself is stuck (an extension that
    keeps the lock), the C library's timer prints to stderr and ends the process with code 1.
    """

    def __init__(self, timeout: float, run_dir: Any):
        """
        Args:
            timeout: seconds; 0 watches nothing.
            run_dir: folder for hang.txt, local or not.
        """
        self._timeout, self._run_dir = timeout, run_dir
        self._pause = min(timeout / 10, 5.0)
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deepseek_jax watchdog", daemon=True)
        self._doing = ""
        self._started, self._armed = False, -1e9

    def beat(self, doing: str) -> None:
        """Something was done, or begins: `doing` names what comes next, for the message."""
        self._last, self._doing = time.monotonic(), doing
        if self._timeout and not self._started:
            self._started = True
            self._thread.start()
        if self._timeout and self._last - self._armed > 1:
            self._armed = self._last
            faulthandler.dump_traceback_later(self._timeout + _GRACE, exit=True, file=sys.__stderr__ or 2)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._started:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._pause):
            if time.monotonic() - self._last > self._timeout:
                self._end()

    def _end(self) -> None:
        who = f"{hosts.name()}: " if hosts.name() else ""
        head = f"{who}no progress for {self._timeout:g} s while {self._doing}; the stacks of all threads:\n"
        with tempfile.TemporaryFile("w+") as file:  # faulthandler wants a real file
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = head + file.read()
        stream = sys.__stderr__
        if stream is not None:
            stream.write(text)
            stream.flush()
        try:
            file = f"hang.{jax.process_index()}.txt" if who else "hang.txt"
            storage.write_atomic(os.fspath(storage.path(self._run_dir) / file), text)
            if who and hosts.leads():  # jax ends all others as soon as process 0 is gone: let them say theirs before
                time.sleep(2 * self._pause)
        finally:
            os._exit(EXIT_CODE)
