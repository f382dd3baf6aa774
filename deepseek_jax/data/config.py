"""What a run reads: its sources, their tokenizer, the held-out share, and what is done to documents."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import Counter

from deepseek_jax.config import require
from deepseek_jax.data.sources import PythonStdlib, Source, names_of
from deepseek_jax.data.tokenizer import BYTES, FIM_TOKENS, MIN_VOCAB_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    sources: tuple[Source, ...] = (PythonStdlib(),)
    """What is read, mixed by the sources' weights: an epoch of one may be shorter than that of another."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; "bytes" for the 256 bytes and the special tokens; None trains a byte-level BPE on the
    training documents, on each source in proportion to its weight."""
    vocab_size: int = 4096
    """Ids of the BPE that is trained: its 3 special tokens (6 with fim_rate), extra_tokens and the 256 bytes included."""
    extra_tokens: tuple[str, ...] = ()
    """Further special tokens, the last ids of whichever tokenizer: those of a chat template (`chat.TOKENS`), so that the
    model that is trained here has rows for them when it is fine-tuned."""
    tokenizer_sample_bytes: int = 10_000_000
    """Text that the BPE is trained on, in bytes."""
    held_out_fraction: float = 0.02
    """Share of documents never trained on, chosen by a hash of their content: the same on every machine, and the same
    side for a document that two sources share. 0: none."""
    cross_document_attention: bool = True
    """Whether tokens see the documents before theirs in the same window: true in V3's pre-training (section 4.1).
    False adds `segment_ids` to every batch."""
    fim_rate: float = 0.0
    """Share of training documents rearranged for fill in the middle, as prefix, suffix, middle (V3 section 4.1: 0.1)."""
    split_punctuation_rate: float = 0.0
    """Share of the training tokens that merge punctuation with line breaks which is split in two, so that prompts
    that end in punctuation are not strange to the model (V3 section 4.1; the report gives no rate)."""
    max_document_bytes: int | None = None
    """Documents with more text, in bytes of UTF-8, are left out and counted. None: none is too long."""
    cache_dir: str | None = None
    """Folder of trained tokenizers and encoded tokens, shared by runs. None: deepseek_jax in $XDG_CACHE_HOME, or in
    ~/.cache."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return names_of(self.sources)

    def __post_init__(self) -> None:
        kinds = typing.get_args(Source)
        self._require(
            isinstance(self.sources, tuple) and len(self.sources) > 0 and all(type(s) in kinds for s in self.sources),
            "sources",
            f"give a tuple of at least one of {', '.join(kind.__name__ for kind in kinds)}",
        )
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        self._require(not twice, "sources", f"two of them have the name {twice[:1]}; metrics tell them apart by it")
        least = MIN_VOCAB_SIZE + (len(FIM_TOKENS) if self.fim_rate else 0) + len(self.extra_tokens)
        self._require(
            self.tokenizer is not None or self.vocab_size >= least,
            "vocab_size",
            f"must be at least {least}: a byte-level BPE holds {least - 256} special tokens and the 256 bytes",
        )
        self._require(self.tokenizer != "", "tokenizer", f"give a tokenizer.json, {BYTES!r}, or None to train one")
        self._require(
            all(re.fullmatch(r"<[^<>\s]+>", name) for name in self.extra_tokens)
            and len(set(self.extra_tokens)) == len(self.extra_tokens),
            "extra_tokens",
            'give different names of the form <…>, such as ("<think>", "</think>")',
        )
        self._require(self.tokenizer_sample_bytes > 0, "tokenizer_sample_bytes", "must be greater than 0")
        self._require(0 <= self.held_out_fraction < 1, "held_out_fraction", "must be in [0, 1), such as 0.02")
        self._require(0 <= self.fim_rate <= 1, "fim_rate", "must be in [0, 1], such as V3's 0.1")
        self._require(0 <= self.split_punctuation_rate <= 1, "split_punctuation_rate", "must be in [0, 1], such as 0.1")
        self._require(
            self.max_document_bytes is None or self.max_document_bytes > 0,
            "max_document_bytes",
            "must be greater than 0, or None for no limit",
        )

    def _require(self, condition: bool, field: str, remedy: str) -> None:
        require(condition, "DataConfig", field, getattr(self, field), remedy)
