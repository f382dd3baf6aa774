"""What V3's pre-training does to documents when they are encoded (report, section 4.1): fill in the middle, and the
splitting of tokens that merge punctuation with line breaks.

All draws come from the document's own digest, so they depend neither on order, on processes nor on a library's
random numbers, and the encoded document can be cached.
"""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer


def infill(text: str, digest: bytes, rate: float) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of a document chosen for fill in the middle, else None.

    The two cuts are uniform over its characters, empty parts included; prefix + middle + suffix is the text. It is
    stored as PSM: <｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>middle (V3, section 4.1; DeepSeek-Coder, section 3.1.2).

    Args:
        text: the document.
        digest: its digest, which decides.
        rate: the share of documents that are chosen, in [0, 1].
    """
    drawn = hashlib.blake2b(digest, digest_size=24, person=b"fim").digest()
    chosen, first, second = (int.from_bytes(drawn[i : i + 8], "big") for i in (0, 8, 16))
    if chosen >= int(rate * 2**64):
        return None
    begin, end = sorted((cut * (len(text) + 1)) >> 64 for cut in (first, second))
    return text[:begin], text[begin:end], text[end:]


class PunctuationSplitter:
    """Replaces a random share of the tokens that merge punctuation with line breaks, such as ")\\n\\n", by the ids of
    the two parts. The text stays the same."""

    def __init__(self, tokenizer: Tokenizer, rate: float):
        """
        Args:
            tokenizer: whose ids they are.
            rate: the share of such tokens that is split, in [0, 1].
        """
        self._threshold = int(rate * 2**64)
        self._parts: dict[int, tuple[int, ...]] = {}
        if rate:
            merged = {i: parts for i, text in tokenizer.strings().items() if (parts := _parts(text)) is not None}
            ids = tokenizer.encode_batch([part for parts in merged.values() for part in parts])
            for number, i in enumerate(merged):
                self._parts[i] = (*ids[2 * number], *ids[2 * number + 1])
        self._is_merged = np.zeros(tokenizer.vocab_size, bool)
        self._is_merged[list(self._parts)] = True

    @property
    def merged_ids(self) -> dict[int, tuple[int, ...]]:
        """Each id that merges punctuation with line breaks, and the ids that replace it."""
        return dict(self._parts)

    def __call__(self, ids: np.ndarray, digest: bytes) -> tuple[np.ndarray, int]:
        """
        Args:
            ids: of one document, [n].
            digest: the document's, which decides.
        Returns: (the new ids, [n or more] of the same dtype; how many were split).
        """
        if not self._parts:
            return ids, 0
        (places,) = np.nonzero(self._is_merged[ids])
        if not len(places):
            return ids, 0
        seed = hashlib.blake2b(digest, digest_size=16, person=b"punctuation").digest()
        # Raw words of PCG64: NumPy promises that they stay the same.
        drawn = np.random.PCG64(int.from_bytes(seed, "big")).random_raw(len(places))
        places = [place for place, word in zip(places.tolist(), drawn.tolist(), strict=True) if word < self._threshold]
        if not places:
            return ids, 0
        pieces, start = [], 0
        for place in places:
            pieces += [ids[start:place], np.array(self._parts[int(ids[place])], ids.dtype)]
            start = place + 1
        return np.concatenate([*pieces, ids[start:]]), len(places)


def _parts(text: str) -> tuple[str, str] | None:
    """(punctuation, line breaks) of a token that is both and nothing else; a space may come first."""
    marks = text.rstrip("\r\n")
    body = marks.removeprefix(" ")
    if not body or marks == text or not all(unicodedata.category(c)[0] in "PS" for c in body):
        return None
    return marks, text[len(marks) :]
