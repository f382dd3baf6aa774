"""Signals: a run that is told to stop saves within a step and says so, also in the middle of a compilation.

Python handles a signal between two bytecodes of the main thread. A compilation is one call that takes minutes, so it
runs in a thread beside (`Interrupt.run`), while the main thread stays awake to be told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The run was told to stop, and did, with all its progress on disk.

    Fields:
        step: the step that the run goes on from.
        exit_code: the command line's: EX_TEMPFAIL of sysexits.h, "try again".
    """

    exit_code = 75

    def __init__(self, reason: str, step: int | None = None, thread: threading.Thread | None = None):
        super().__init__(reason)
        self.step = step
        self.thread = thread

    @property
    def busy(self) -> bool:
        """Whether a thread still works: a compilation cannot be broken off, so the process has to end over it."""
        return self.thread is not None and self.thread.is_alive()


class Interrupt:
    """Takes SIGTERM and SIGINT while a run goes on, and gives them back afterwards.

    ```python
    with Interrupt() as interrupt:
        prepare()                        # a signal raises Stopped at once: there is nothing to save yet
        interrupt.deferred = True
        while not interrupt.requested:   # from here on it is noted; a second one raises at once
            step()
    ```
    Outside the main thread, where Python allows no handlers, it does nothing.

    Several processes stop together. There jax itself takes SIGTERM, from when they were joined, and agrees with the
    others on a step that none of them has begun (`multihost_utils.reached_preemption_sync_point`), behind the program's
    back; SIGINT is handed on as a SIGTERM. So a signal to any of them is noted at once and acted on by all in `check`,
    before the same step, never in the middle of something.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that came, such as "SIGTERM"."""
        self.deferred = False
        self._handed_on = False
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Interrupt:
        import jax

        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.distributed.is_initialized():
            self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._hand_on)}
        else:
            numbers = (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self, step: int) -> bool:
        """Whether to stop before step `step`: the same answer on every process."""
        import jax

        if jax.distributed.is_initialized():
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.requested = self.requested or "SIGTERM"
        return self.requested is not None

    def run(self, work: Callable[[], T]) -> T:
        """`work()`, in a thread beside the main one.

        Raises: Stopped as soon as a signal has come, while the thread goes on; whatever `work` raises.
        """
        if not self._before:
            return work()
        result: list[T] = []
        failure: list[BaseException] = []

        context = _contexts()

        def target() -> None:
            try:
                with context():
                    result.append(work())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=target, name="deepseek_jax work", daemon=True)
        self._thread = thread
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.05)
            if self.requested is not None and thread.is_alive():
                raise Stopped(f"{self.requested} came", thread=thread)
        self._thread = None
        if failure:
            raise failure[0]
        return result[0]

    def _hand_on(self, number: int, frame: Any) -> None:
        if self._handed_on:
            raise KeyboardInterrupt("SIGINT came again: stopped without another save")
        self._handed_on = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.requested = self.requested is not None, signal.Signals(number).name
        if again or not self.deferred:
            if again:
                raise KeyboardInterrupt(f"{self.requested} came again: stopped without another save")
            raise Stopped(f"{self.requested} came before there was anything to save", thread=self._thread)


def _contexts() -> Callable[[], Any]:
    """jax's settings of this thread, to be entered in another: they are local to a thread."""
    import jax

    read: Any = jax.config  # its settings are made at run time, unknown to a type checker
    settings = [
        (jax.enable_x64, read.jax_enable_x64),
        (jax.default_matmul_precision, read.jax_default_matmul_precision),
        (jax.debug_nans, read.jax_debug_nans),
        (jax.default_prng_impl, read.jax_default_prng_impl),
    ]

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for context, value in settings:
                stack.enter_context(context(value))
            yield

    return enter
