"""Preferences side by side: the order of examples, and batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import struct

from deepseek_jax.posttrain.preference_data import Example
from deepseek_jax.types import Array


class Order:
    """Numbers of examples without end, in a new order each epoch; the position is how many were taken."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed, self._next = count, seed, 0
        self._epoch: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self._count)
        if self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._count)
        return int(self._epoch[1][place])

    def take(self, count: int) -> list[int]:
        """The next ones."""
        self._next += count
        return [self[index] for index in range(self._next - count, self._next)]

    def get_state(self) -> dict[str, Any]:
        """The position."""
        return {"next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position."""
        self._next = int(state["next"])


@struct.dataclass
class Batch:
    """B examples of A answers: 2 of a pair, else 1."""

    tokens: Array
    """Int32 [B, A, T]: conversation, padding."""
    mask: Array
    """Bool [B, A, T]: tokens of the answer, its end included; never from ids, as padding may be the end token."""
    last: Array
    """Int32 [B, A]: where the token stands that ends the answer."""
    labels: Array
    """Float32 [B]."""


def collate(examples: Sequence[Example], max_tokens: int, pad_id: int) -> Batch:
    """Examples side by side, in one of few lengths, so that few programs are compiled; arrays of numpy."""
    answers = [answer for example in examples for answer in example.answers]
    longest = max(len(a.ids) for a in answers)
    quarter = -(-max_tokens // 4) if max_tokens > 64 else max_tokens
    T = min(-(-longest // quarter) * quarter, max_tokens)
    tokens, mask = np.full((len(answers), T), pad_id, np.int32), np.zeros((len(answers), T), bool)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer.ids)] = answer.ids
        mask[row, answer.start : len(answer.ids)] = True
    shape = (len(examples), -1)
    last = np.array([len(a.ids) - 1 for a in answers], np.int32)
    labels = np.array([example.label for example in examples], np.float32)
    return Batch(tokens.reshape(*shape, T), mask.reshape(*shape, T), last.reshape(shape), labels)  # type: ignore


def in_batches(
    examples: Sequence[Example], size: int, max_tokens: int, pad_id: int, beat: Callable[[], None]
) -> Iterator[tuple[Batch, int]]:
    """All examples in batches of `size`, and how many count: the last batch is filled up with its first example."""
    for first in range(0, len(examples), size):
        beat()
        part = examples[first : first + size]
        filled = [*part, *[part[0]] * (size - len(part))]
        yield collate(filled, max_tokens, pad_id), len(part)
