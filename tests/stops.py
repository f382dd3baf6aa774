"""Runs that are told to stop in the middle of something."""

import os
import signal

import pytest

from deepseek_jax.training import Stopped


def stopped_at(monkeypatch, owner, name: str, call: int, run) -> int:
    """Sends SIGTERM to this process at call number `call` of `owner.name` within `run()`; the step that it stopped at."""
    inner, calls = getattr(owner, name), []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(Stopped) as stopped:
            run()
        if stopped.value.thread is not None:
            stopped.value.thread.join()
    return stopped.value.step
