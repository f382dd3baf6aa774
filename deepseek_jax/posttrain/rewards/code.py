"""The reward of code: a completion's program against the test cases of its problem.

A program gets a test's input and prints; what it should print never leaves this process, and is compared as a whole. A test
passes where the program ends by itself without an error and printed what was expected, up to white space at the ends of
lines and of the whole. Whatever else a program does is its own failure, and scores 0. `sandbox.py` says what the isolation
is and is not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deepseek_jax.posttrain.rewards.item import InThreads, Item, Outcome
from deepseek_jax.posttrain.rewards.kinds import Code
from deepseek_jax.posttrain.rewards.rules import THINK
from deepseek_jax.posttrain.rewards.sandbox import Limits, Sandbox, SandboxFailed

_LONGEST = 65_536  # characters of a program


def last_program(text: str) -> str | None:
    """The last fenced block of Python after the thoughts; None without one that is closed, or where it is too long."""
    after = text.split(THINK[1], 1)[-1]
    if THINK[0] in after:
        return None
    program: str | None = None
    block: list[str] | None = None
    python = False
    for line in after.split("\n"):
        mark = line.strip()
        if block is None and mark.startswith("```"):
            block, python = [], mark[3:].strip().lower() in ("python", "python3", "py")
        elif block is not None and mark == "```":
            program, block = "\n".join(block) if python else program, None
        elif block is not None:
            block.append(line)
    return program if program and program.strip() and len(program) <= _LONGEST else None


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs are the same as wholes, up to white space at the ends of lines and at the end."""
    return _lines(printed) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def tests_of(extra: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """The (input, expected output) pairs of a problem's `extra`; empty where it has none.

    Raises: ValueError for what is no list of pairs of text.
    """
    tests = dict(extra).get("tests", ())
    if not all(isinstance(t, tuple | list) and len(t) == 2 and all(isinstance(text, str) for text in t) for t in tests):
        raise ValueError("the problem's tests must be pairs of text: (input, expected output)")
    return [(stdin, expected) for stdin, expected in tests]


class CodeReward(InThreads):
    """The reward of `kind` in an open sandbox; a context manager, whose threads each wait for one program."""

    def __init__(self, kind: Code, sandbox: Sandbox, workers: int):
        self._kind, self._sandbox = kind, sandbox
        self._threads = ThreadPoolExecutor(workers, "code-reward")

    def __enter__(self) -> CodeReward:
        return self

    def _outcome(self, item: Item) -> Outcome:
        try:
            tests = tests_of(item.problem.extra)
            if not tests:
                return Outcome(0.0, "the problem has no tests" if self._kind.required else "")
            program = last_program(item.completion)
            passed = self._passed(program, tests) if program else 0
        except (SandboxFailed, ValueError, OSError) as error:  # OSError: no process, no pipe, no folder to be had
            return Outcome(0.0, str(error)[:200])
        share = passed / len(tests)
        return Outcome(share if self._kind.score == "share" else float(passed == len(tests)), parts={"passed": share})

    def _passed(self, program: str, tests: Sequence[tuple[str, str]]) -> int:
        """How many tests a program passes; those after a failed one are left out where all have to pass."""
        passed, end = 0, time.monotonic() + self._kind.budget
        for stdin, expected in tests:
            if time.monotonic() >= end:
                break
            ended = self._sandbox.run(program, stdin)
            right = ended.how == "exit 0" and same_output(ended.output.decode("utf-8", "replace"), expected)
            if not right and self._kind.score == "all":
                break
            passed += right
        return passed


def limits_of(kind: Code) -> Limits:
    """The limits of one program."""
    return Limits(
        seconds=kind.seconds, cpu_seconds=kind.cpu_seconds, memory_mb=kind.memory_mb, processes=kind.processes,
        files_mb=kind.files_mb, output_kb=kind.output_kb,
    )  # fmt: skip
