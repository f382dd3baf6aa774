"""What a reward looks at, and what it makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from deepseek_jax.posttrain.tasks import Problem


@dataclass(frozen=True, kw_only=True)
class Item:
    """One completion of one problem."""

    problem: Problem
    completion: str
    """Its text, from the model's first token on; where the prompt opened the thoughts, with the opening tag."""
    tokens: int
    """Its length in tokens."""
    truncated: bool
    """Whether it was cut off at the limit instead of ending itself."""
    group: int = 0
    """The prompt it belongs to, within a batch: rewards that compare completions compare those of a group."""


@dataclass(frozen=True)
class Outcome:
    """One reward of one item."""

    score: float
    reason: str = ""
    """Why the score could not be worked out, of the technical kind; empty where it could. A wrong answer is no reason."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the score is made of, for the log."""
    steps: tuple[tuple[int, float], ...] = ()
    """Scores of the completion's steps, each with how many characters of the text it ends (`GRPO.advantages = "process"`)."""


class InThreads:
    """A reward whose items wait for something outside, each in a thread; a context manager."""

    _threads: ThreadPoolExecutor

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def __call__(self, items: Sequence[Item]) -> list[Outcome]:
        return list(self._threads.map(self._outcome, items))

    def _outcome(self, item: Item) -> Outcome:
        raise NotImplementedError


class Reward(Protocol):
    """A reward that is ready to be asked."""

    def __call__(self, items: Sequence[Item]) -> Sequence[Outcome]:
        """One outcome an item, in order. An exception fails every item."""
        ...
