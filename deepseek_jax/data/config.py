"""What a run reads: the corpus, its tokenizer, the held-out share."""

from __future__ import annotations

import dataclasses

from deepseek_jax.config import require
from deepseek_jax.data.tokenizer import MIN_VOCAB_SIZE

PYTHON_STDLIB = "python-stdlib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = PYTHON_STDLIB
    """"python-stdlib" (the .py files of the running Python's standard library: tens of MB of real code without a
    download), or the path of a folder of text files."""
    patterns: tuple[str, ...] = ("*.txt", "*.md", "*.rst", "*.py")
    """Which files of a folder are read, as shell patterns of the file name; "python-stdlib" has its own."""
    max_bytes: int | None = None
    """Most text that is read, in bytes of UTF-8: a fixed pseudo-random choice of whole documents. None reads all."""
    tokenizer: str | None = None
    """Path of a tokenizer.json; None trains a byte-level BPE on the training documents."""
    vocab_size: int = 4096
    """Ids of the BPE that is trained, its 3 special tokens and the 256 bytes included."""
    tokenizer_sample_bytes: int = 10_000_000
    """Text that the BPE is trained on, in bytes."""
    held_out_fraction: float = 0.02
    """Share of documents never trained on, chosen by a hash of their content: the same on every machine. 0: none."""
    cross_document_attention: bool = True
    """Whether tokens see the documents before theirs in the same window: true in V3's pre-training (section 4.1).
    False adds `segment_ids` to every batch."""
    cache_dir: str | None = None
    """Folder of trained tokenizers and encoded tokens, shared by runs. None: deepseek_jax in $XDG_CACHE_HOME, or in
    ~/.cache."""

    def __post_init__(self) -> None:
        self._require(bool(self.source), "source", f"give {PYTHON_STDLIB!r} or the path of a folder of text files")
        self._require(
            not isinstance(self.patterns, str) and len(self.patterns) > 0 and all(self.patterns),
            "patterns",
            'give a tuple of shell patterns, such as ("*.txt",)',
        )
        self._require(
            self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be greater than 0, or None for all text"
        )
        self._require(
            self.tokenizer is not None or self.vocab_size >= MIN_VOCAB_SIZE,
            "vocab_size",
            f"must be at least {MIN_VOCAB_SIZE}: a byte-level BPE holds 3 special tokens and the 256 bytes",
        )
        self._require(self.tokenizer_sample_bytes > 0, "tokenizer_sample_bytes", "must be greater than 0")
        self._require(0 <= self.held_out_fraction < 1, "held_out_fraction", "must be in [0, 1), such as 0.02")

    def _require(self, condition: bool, field: str, remedy: str) -> None:
        require(condition, "DataConfig", field, getattr(self, field), remedy)
