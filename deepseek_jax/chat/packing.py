"""Encoded conversations in memory, and windows of them by index."""

from __future__ import annotations

import array
import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np


class Encodings:
    """Conversations as ids and masks, end to end: five bytes a token, so that V3's 1.5M instances are some GB."""

    def __init__(self) -> None:
        self._ids, self._trained, self._ends = array.array("i"), bytearray(), array.array("q", [0])

    def append(self, ids: Sequence[int], trained: Sequence[bool]) -> None:
        """Adds one; both of the same length."""
        self._ids.extend(ids)
        self._trained.extend(trained)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int32 [n], and which of them are learned, bool [n]."""
        start, end = self._ends[index], self._ends[index + 1]
        return self.ids[start:end], self.trained[start:end]

    @property
    def ids(self) -> np.ndarray:
        """Of all, int32: a view, while which nothing can be added."""
        return np.frombuffer(self._ids, np.int32) if self._ids else np.zeros(0, np.int32)

    @property
    def trained(self) -> np.ndarray:
        """Of all, bool; a view too."""
        return np.frombuffer(self._trained, bool)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64."""
        return np.diff(self._ends)

    def sums(self, per_token: np.ndarray) -> np.ndarray:
        """Of numbers given for each token of all, [tokens], the sum over each conversation."""
        before = np.concatenate([[0], np.cumsum(per_token, dtype=np.int64)])
        return np.diff(before[np.asarray(self._ends)])


class ChatWindows:
    """Windows of whole conversations: a random-access source, as `data.pipeline.TokenSource`.

    The conversations of a window are told apart by `segment_ids`, which attention, routing statistics and loss obey.
    Positions run on over the window: rope sees differences of positions alone, so that a conversation is the same
    wherever it stands.
    """

    def __init__(
        self,
        encodings: Encodings,
        numbers: Sequence[int],
        seq_len: int,
        *,
        pad_id: int,
        packing: bool = True,
        name: str = "chats",
    ):
        """
        Args:
            encodings: conversations.
            numbers: those that are meant; none is longer than seq_len + 1.
            seq_len: tokens predicted in a window, T.
            pad_id: what fills a window; it is in segment 0, and is not learned whatever id it is.
            packing: whether a window holds as many conversations as fit, or one.
            name: what messages call them.
        """
        self._encodings, self._pad_id, self._name, self.seq_len = encodings, pad_id, name, seq_len
        lengths = encodings.lengths[np.asarray(numbers, np.int64)]
        plan = best_fit(lengths, seq_len + 1) if packing else [[i] for i in range(len(lengths))]
        self.plan = [[int(numbers[i]) for i in window] for window in plan]
        """For each window the numbers of its conversations. Decided once: epochs shuffle the windows."""

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"tokens", "segment_ids": int32 [T+1], "loss_mask": bool [T+1]}; conversations are segments 1, 2, …"""
        if not 0 <= index < len(self.plan):
            raise IndexError(f"window {index} of {len(self.plan)}")
        tokens = np.full(self.seq_len + 1, self._pad_id, np.int32)
        segment_ids, loss_mask = np.zeros(self.seq_len + 1, np.int32), np.zeros(self.seq_len + 1, bool)
        start = 0
        for segment, number in enumerate(self.plan[index], 1):
            ids, trained = self._encodings[number]
            end = start + len(ids)
            tokens[start:end], segment_ids[start:end], loss_mask[start:end] = ids, segment, trained
            start = end
        return {"tokens": tokens, "segment_ids": segment_ids, "loss_mask": loss_mask}

    def __repr__(self) -> str:
        return f"ChatWindows({self._name}, windows={len(self)}, seq_len={self.seq_len})"


def best_fit(lengths: Any, capacity: int) -> list[list[int]]:
    """Packs without splitting: longest first, each into the fullest window that has room (best-fit decreasing, which
    needs at most 11/9 of the fewest windows, and a little).

    Which of equally long conversations share a window is drawn from a fixed seed, so that neighbours in a file, which
    are often alike, do not stay together. The same lengths give the same windows.

    Args:
        lengths: of each, at least 1 and at most `capacity`.
        capacity: of a window.
    Returns: for each window the numbers of what it holds.
    """
    lengths = np.asarray(lengths, np.int64)
    drawn = np.random.default_rng(0).permutation(len(lengths))
    order = drawn[np.argsort(-lengths[drawn], kind="stable")]
    windows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free places -> windows that have exactly so many
    rooms: list[int] = []  # its keys, sorted
    for number in order.tolist():
        length = int(lengths[number])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            window, room = len(windows), capacity
            windows.append([])
        else:
            room = rooms[place]
            window = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        windows[window].append(number)
        if rest := room - length:
            if rest not in with_room:
                with_room[rest] = []
                bisect.insort(rooms, rest)
            with_room[rest].append(window)
    return windows
