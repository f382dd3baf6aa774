"""Where the steps of a completion end, in its tokens (DeepSeekMath, section 4.1.3)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from deepseek_jax.data.stream import TextStream
from deepseek_jax.posttrain.sampler import Completion, Sampler

Steps = tuple[tuple[int, float], ...]
"""Of one completion: how many characters of its text a step ends with, and the step's score."""


def flat_steps(
    sampler: Sampler, completions: Sequence[Completion], steps: Sequence[Steps]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `advantage.process_advantages` takes, of rows as `rollout.pack` makes them.

    Args:
        sampler: that made the completions.
        completions: a row each.
        steps: of each.

    Returns:
        Scores float32 [S], rows int32 [S], places int32 [S]. A step belongs to the first token with which its text is whole,
        one that ends behind the text to the last token.
    """
    scores, rows, places = [], [], []
    known = sampler.prompter.tokenizer.vocab_size
    for row, (completion, its) in enumerate(zip(completions, steps, strict=True)):
        stream, tokens = TextStream(sampler.prompter.tokenizer), completion.generation.tokens
        characters = [len(stream.push([t])) if t < known else 1 for t in (tokens if its else ())]
        lengths = list(accumulate(characters, initial=len(sampler.prompter.opened)))[1:]
        for end, score in its:
            scores.append(score)
            rows.append(row)
            places.append(len(completion.prompt) - 1 + min(bisect_left(lengths, end), len(tokens) - 1))
    return np.array(scores, np.float32), np.array(rows, np.int32), np.array(places, np.int32)
