"""Preferences side by side, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flax import struct

from deepseek_jax.posttrain.preference_data import Example
from deepseek_jax.posttrain.rows import few_lengths
from deepseek_jax.types import Array


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
    T = few_lengths(max(len(a.ids) for a in answers), max_tokens)
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
