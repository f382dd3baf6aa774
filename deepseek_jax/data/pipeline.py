"""Tokens to batches, through Grain: windows by index, shuffled, repeated, mixed, batched, and resumed at once.

The whole pipeline is a function from a batch number to a batch (random-access sources, an index permutation an epoch,
a fixed interleaving of sources, no buffer of shuffled examples), so an iterator's state is one number and restoring it
replays nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np


class TokenSource:
    """Windows of a flat token array by index: a Grain random-access source.

    Window i holds the seq_len + 1 tokens from i * seq_len on: one more than seq_len, because its last token is only
    a target. Neighbours share one token, so every token but the very first is a target exactly once.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        *,
        eos_id: int | None = None,
        cross_document_attention: bool = True,
        pad_last: bool = False,
        name: str = "tokens",
    ):
        """
        Args:
            tokens: ids [N], any integer dtype; may be a memory map.
            seq_len: tokens predicted in a window, T.
            eos_id: the id that ends a document; needed when cross_document_attention is False.
            cross_document_attention: False adds `segment_ids` that count the documents of a window from 1.
            pad_last: whether the tokens after the last whole window make a padded window of their own, so that an
                evaluation covers every token once; adds `segment_ids`, 0 at padding. False drops these tokens.
            name: what messages call these tokens.
        Raises: ValueError when there are fewer tokens than one window needs, or for an impossible combination.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: must be at least 1")
        if not cross_document_attention and eos_id is None:
            raise ValueError("eos_id=None: cross_document_attention=False finds documents by it; give the tokenizer's")
        needed = 2 if pad_last else seq_len + 1
        if len(tokens) < needed:
            raise ValueError(
                f"the {name} has {len(tokens)} tokens, one window of seq_len={seq_len} needs {needed}: "
                f"give more text or a shorter seq_len"
            )
        self._tokens = tokens
        self._eos_id = None if cross_document_attention else eos_id
        self._pad_last = pad_last
        self.seq_len = seq_len
        self._len = (len(tokens) - 1 + (seq_len - 1 if pad_last else 0)) // seq_len

    @property
    def has_segment_ids(self) -> bool:
        """Whether elements carry `segment_ids`."""
        return self._pad_last or self._eos_id is not None

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"tokens": int32 [T+1]} and, where asked for, {"segment_ids": int32 [T+1]}: documents from 1, padding 0."""
        if not 0 <= index < self._len:
            raise IndexError(f"window {index} of {self._len}")
        start = int(index) * self.seq_len
        real = self._tokens[start : start + self.seq_len + 1]
        tokens = np.zeros(self.seq_len + 1, np.int32)
        tokens[: len(real)] = real
        if not self.has_segment_ids:
            return {"tokens": tokens}
        segment_ids = np.zeros(self.seq_len + 1, np.int32)
        segment_ids[: len(real)] = 1
        if self._eos_id is not None:
            # EOS closes its own document, so the token after it opens the next one.
            segment_ids[1 : len(real)] += np.cumsum(real[:-1] == self._eos_id, dtype=np.int32)
        return {"tokens": tokens, "segment_ids": segment_ids}

    def __repr__(self) -> str:
        return f"TokenSource(windows={self._len}, seq_len={self.seq_len})"


class Mixture:
    """Windows of several sources in fixed proportions, without end.

    The sources are interleaved evenly rather than drawn: of the first n windows each source has its share, up to the
    number of sources. Which window of which source stands at an index is arithmetic, so the mixture is random access
    too. (Grain's `MapDataset.mix` does the same with weights rounded to a hundredth of the smallest; here they are
    exact.)
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float]):
        """
        Args:
            sources: `TokenSource`s, or others with `__len__` and `__getitem__`.
            weights: of each, greater than 0; taken as the decimal numbers that they print as.
        Raises: ValueError where the numbers differ, or a weight is not above 0.
        """
        if len(sources) != len(weights) or not sources or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights={list(weights)}: give each of the {len(sources)} sources one greater than 0")
        self.sources = tuple(sources)
        exact = [Fraction(str(weight)) for weight in weights]
        self._parts = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]

    @property
    def shares(self) -> tuple[float, ...]:
        """Each source's share of the windows; they add up to 1."""
        return tuple(part / sum(self._parts) for part in self._parts)

    def place(self, index: int) -> tuple[int, int]:
        """(number of the source, how many of its windows came before) at one index of the mixture."""
        rest, before, after = sum(self._parts), index, index + 1
        for number, part in enumerate(self._parts):
            # The sources from here on have `before` of the first `index` windows; this one all but the others' share.
            others_before, others_after = before * (rest - part) // rest, after * (rest - part) // rest
            if after - others_after > before - others_before:
                return number, before - others_before
            rest, before, after = rest - part, others_before, others_after
        raise AssertionError("some source has every index")

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The window at an index, not shuffled; sources begin anew when they end."""
        number, i = self.place(index)
        return self.sources[number][i % len(self.sources[number])]

    def __repr__(self) -> str:
        return f"Mixture({self.sources}, shares={self.shares})"


class _Places:
    """A mixture as what Grain calls a selection map."""

    def __init__(self, mixture: Mixture):
        self._mixture = mixture

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._mixture.place(index)


class _Share:
    """The windows that one process reads, as what Grain calls a selection map."""

    def __init__(self, share: Callable[[int], Sequence[int] | np.ndarray]):
        self._share, self._size = share, len(share(0))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        number, row = divmod(index, self._size)
        return 0, int(self._share(number)[row])


def batches(
    source: Any,
    batch_size: int,
    seed: int,
    *,
    share: Callable[[int], Sequence[int] | np.ndarray] | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> Any:
    """An endless Grain iterator of shuffled batches, each source in a new order each of its epochs; where an epoch ends
    within a batch, the next one fills it.

    Args:
        source: a `Mixture`; or a `TokenSource`, or anything with `__len__` and `__getitem__` that gives dicts of arrays.
        batch_size: windows in the global batch, B.
        seed: of the shuffle, in [0, 2**32).
        share: where several processes read: from the number of a batch to the numbers of the windows, counted from the
            run's first, that this process reads in its place; of one length b for every batch. What the window of a
            number holds depends on neither, nor does the state. None: all of them, b = B.
        threads, prefetch: background threads, and batches they read ahead; neither changes the batches.
    Returns: an iterator of {name: array [b, ...]} with `get_state()` (a small dict that JSON holds) and
        `set_state(state)`, after which it goes on with exactly the batches that would have come.
    Raises: ValueError for a bad size or seed, or an empty source.
    """
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be in [0, 2**32)")
    parts = source.sources if isinstance(source, Mixture) else (source,)
    for part in parts:
        if not 0 < len(part) < 2**32:
            raise ValueError(f"{part} has {len(part)} windows: the shuffle takes from 1 to 2**32 - 1")
    # Seeds far apart, since Grain adds the number of the epoch to them.
    seeds = [(seed + number * 0x9E3779B1) % 2**32 for number in range(len(parts))]
    datasets = [
        grain.MapDataset.source(part).shuffle(seed=its_seed).repeat()
        for part, its_seed in zip(parts, seeds, strict=True)
    ]
    dataset = datasets[0]
    if len(parts) > 1:
        places: Any = _Places(source)
        dataset = grain.MapDataset.select_from_datasets(datasets, places)
    if share is not None:
        ours: Any = _Share(share)
        dataset, batch_size = grain.MapDataset.select_from_datasets([dataset], ours), len(share(0))
    dataset = dataset.batch(batch_size)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    return iter(dataset.to_iter_dataset(options))


def held_out_batches(
    source: Any,
    batch_size: int,
    *,
    max_batches: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every window once and in order, all batches of one shape: the last is filled with windows of padding, whose
    `segment_ids` are 0.

    Args:
        source: a `TokenSource` with `pad_last=True`.
        batch_size: windows in the global batch, B.
        max_batches: stops after that many; None for all.
    Returns: an iterator of {"tokens", "segment_ids"}: int32 [B, T+1].
    Raises: ValueError, at the call, for a source without segment_ids.
    """
    if "segment_ids" not in source[0]:
        raise ValueError("the source gives no segment_ids, so padding would count: build it with pad_last=True")
    total = -(-len(source) // batch_size)
    total = total if max_batches is None else min(total, max_batches)
    padding = {name: np.zeros_like(array) for name, array in source[0].items()}

    def generate() -> Iterator[dict[str, np.ndarray]]:
        for number in range(total):
            first = number * batch_size
            rows = [source[i] if i < len(source) else padding for i in range(first, first + batch_size)]
            yield {name: np.stack([row[name] for row in rows]) for name in padding}

    return generate()
