"""Answers compared by math-verify, in processes that are killed when they take too long.

A comparison may be a proof, or a tower of powers that a model has written, and no thread of this process could be stopped
in it. So each runs in a child with a time limit that this side keeps: SIGTERM, then SIGKILL. The children stay from one
comparison to the next, since importing sympy takes a second, and are replaced after some. They are started as programs,
not forked (this process has threads of XLA's), and not by `multiprocessing`, whose children import the main module again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepseek_jax.posttrain.rewards.item import Item, Outcome
from deepseek_jax.posttrain.rewards.rules import equal_answers, final_answer

_WORKER = Path(__file__).with_name("math_worker.py")
_START_SECONDS = 120.0  # to import sympy, also on a machine that is busy
_GRACE = 1.0  # seconds from SIGTERM to SIGKILL
_LONGEST = 1000  # characters of an answer that is no number and no text of the reference
_WORDS = re.compile(r"[^\W\d_]{3,}(\s+[^\W\d_]+)*")
_WRAPPED = (("\\boxed{", "}"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


class _Died(Exception):
    """A child has ended, or was ended; its text says how."""


class _Child:
    """One process of math_worker.py."""

    def __init__(self, seconds: float):
        self.asked = 0
        self._seconds = seconds
        self._unread = b""
        self._process = subprocess.Popen(
            # -P: without the script's folder on the path, whose code.py would be taken for the standard library's.
            [sys.executable, "-P", str(_WORKER), str(math.ceil(seconds) + 10)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"}, start_new_session=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Raises: _Died with what it said, where it cannot work."""
        said = self._line(_START_SECONDS)
        if not said.get("ready"):
            self.end()
            raise _Died(said.get("error", "it said nothing"))

    def ask(self, reference: str, found: str) -> bool | str:
        """Whether they are equal, or what went wrong. Raises: _Died where the process is gone afterwards."""
        self.asked += 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([reference, found]).encode() + b"\n")
        except OSError:
            self.end()
            raise _Died("its process had died") from None
        answer = self._line(self._seconds)
        return answer["equal"] if "equal" in answer else answer["error"]

    def _line(self, seconds: float) -> dict[str, Any]:
        """The next line that it writes. Raises: _Died, with the process ended, where there is none in time."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
            more = os.read(self._process.stdout.fileno(), 4096) if ready else b""
            if not more:
                self.end()
                raise _Died("its process died" if ready else f"over {seconds:g} s, its process was killed")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class MathPool:
    """Children that compare answers; a context manager.

    Args:
        workers: how many.
        seconds: of one comparison.
        recycle: comparisons after which a child is replaced: its caches grow.

    Raises, on entering: ValueError where math-verify is missing or does not work.
    """

    def __init__(self, workers: int, seconds: float, recycle: int = 200):
        self._workers, self._seconds, self._recycle = workers, seconds, recycle
        self._children: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()

    def __enter__(self) -> MathPool:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("Accuracy.verifier = 'math': pip install 'deepseek-jax[math]' brings math-verify")
        children = [_Child(self._seconds) for _ in range(self._workers)]
        try:
            for child in children:
                child.wait_until_ready()
        except BaseException as error:
            for child in children:
                child.end()
            if isinstance(error, _Died):
                raise ValueError(f"Accuracy.verifier = 'math': math-verify does not work here: {error}") from None
            raise
        for child in children:
            self._children.put(child)
        self._threads = ThreadPoolExecutor(self._workers, "math-verify")
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self._workers):
            if (child := self._children.get()) is not None:
                child.end()

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[bool | str]:
        """Whether each (reference, found) is equal; a text where that could not be worked out, which says why."""
        return list(self._threads.map(self._verify, pairs))

    def _verify(self, pair: tuple[str, str]) -> bool | str:
        child = self._children.get()  # there is one a thread
        try:
            if child is None:
                child = _Child(self._seconds)
                child.wait_until_ready()
            answer = child.ask(*pair)
            if child.asked >= self._recycle:
                child.end()
                child = None
            return answer
        except _Died as error:
            child = None  # the next comparison starts another
            return str(error)
        finally:
            self._children.put(child)


def math_accuracy(pool: MathPool, items: Sequence[Item]) -> list[Outcome]:
    """1 where an item's final answer equals its reference: by `rules.equal_answers`, else by math-verify."""
    outcomes: dict[int, Outcome] = {}
    asked: dict[int, tuple[str, str]] = {}
    for i, item in enumerate(items):
        reference, found = bare(item.problem.answer), final_answer(item.completion)
        found = None if found is None else bare(found)
        if reference is None or found is None:
            outcomes[i] = Outcome(
                0.0, "" if reference is not None else f"the reference is no answer: {item.problem.answer[:40]!r}"
            )
        elif equal_answers(found, reference):
            outcomes[i] = Outcome(1.0)
        elif len(found) > _LONGEST or _WORDS.fullmatch(reference):  # a word is no product: Paris is not "pairs"
            outcomes[i] = Outcome(0.0)
        else:
            asked[i] = (reference, found)
    for i, answer in zip(asked, pool.verify(list(asked.values())), strict=True):
        outcomes[i] = Outcome(0.0, answer) if isinstance(answer, str) else Outcome(float(answer))
    return [outcomes[i] for i in range(len(items))]


def bare(text: str) -> str | None:
    """An answer without what only wraps it ($…$, \\boxed{…}); None where it is empty, its braces do not match, or it holds
    several answers."""
    before = None
    while text != before:
        before = text = text.strip()
        for begin, end in _WRAPPED:
            if text.startswith(begin) and text.endswith(end) and len(text) >= len(begin) + len(end):
                text = text[len(begin) : len(text) - len(end)]
                break
    depth = 0
    for character in text.replace("\\{", "").replace("\\}", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return None
    return None if depth or not text or "$" in text or "\\boxed" in text else text
