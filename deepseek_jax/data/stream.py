"""Text of ids as they come, one or a few at a time."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence

from deepseek_jax.data.tokenizer import Tokenizer


class TextStream:
    """Decodes ids piece by piece and releases text that later ids cannot change.

    Held back are the bytes of a character that is not whole yet, and text that may be the beginning of a stop string.
    All text released is `tokenizer.decode(ids, skip_special=…)`, or, with stop strings, what stands before the one
    that is complete first (of those that end together, before the one that begins first). It does not depend on how
    the ids were split into pushes, and a push costs time in its own ids alone.

    Fields:
        stopped: whether a stop string was completed; later ids are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special: bool = True,
        keep: Collection[int] = (),
    ):
        """
        Args:
            tokenizer: a byte-level one.
            stop: texts that end the stream; they are not released.
            skip_special: whether the tokens that the tokenizer's file flags as special are left out. Think tags and
                the tokens of tool calls are not flagged in DeepSeek's files, so they are shown.
            keep: ids that are shown although the file flags them.
        Raises: ValueError for an empty stop string, or a tokenizer that is not byte-level.
        """
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop={stop!r}: give a sequence of texts, none of them empty")
        tokenizer.token_bytes(tokenizer.eos_id)  # raises for a tokenizer without bytes
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._hidden = tokenizer.hidden_ids.difference(keep) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # whole characters that may begin a stop string; shorter than the longest of them
        self._released: list[str] = []

    @property
    def text(self) -> str:
        """All text released so far."""
        return "".join(self._released)

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that is now safe to show, which may be empty.

        Raises: ValueError for an id outside the vocabulary.
        """
        new = b"".join(self._tokenizer.token_bytes(int(i)) for i in ids if i not in self._hidden)
        return self._release(self._decoder.decode(new), last=False)

    def finish(self) -> str:
        """Ends the stream; returns the rest of the text, U+FFFD in place of a character that was not completed."""
        return self._release(self._decoder.decode(b"", final=True), last=True)

    def _release(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        begin = self._first_stop(text)
        self.stopped = begin is not None
        if begin is None:
            begin = len(text) if last else len(text) - self._maybe_stop(text)
        released, self._held = text[:begin], "" if self.stopped else text[begin:]
        self._released.append(released)
        return released

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string that is complete first begins."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _maybe_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
