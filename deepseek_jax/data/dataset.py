"""From a `DataConfig` to batches: the one call that a training loop makes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data import corpus
from deepseek_jax.data.config import PYTHON_STDLIB, DataConfig
from deepseek_jax.data.pipeline import TokenSource, batches, held_out_batches
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from deepseek_jax.data.tokens import TokenFiles, prepare

_TRAIN, _HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready to be read.

    Fields:
        config: what it was made from.
        tokenizer: its tokenizer.
        files: the encoded corpus and its counts: `files.splits["train"].tokens`, `.bytes_per_token` and so on.
        train: windows to train on.
        held_out: windows never trained on, with `segment_ids`; None when held_out_fraction is 0.
        skipped: reason -> number of files left out of the corpus.
        fingerprint: hex hash of the text, the tokenizer, and how they are cut: two runs with one fingerprint and one
            seed read the same batches.
    """

    config: DataConfig
    tokenizer: Tokenizer
    files: TokenFiles
    train: TokenSource
    held_out: TokenSource | None
    skipped: dict[str, int]
    fingerprint: str

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token of the held-out split (of the train split where there is none):
        bits per byte = loss in nats per token / ln 2 / bytes_per_token."""
        return self.files.splits[_TRAIN if self.held_out is None else _HELD_OUT].bytes_per_token

    def train_batches(self, batch_size: int, seed: int, **options: Any) -> Any:
        """An endless, resumable iterator of shuffled train batches; see `pipeline.batches`."""
        return batches(self.train, batch_size, seed, **options)

    def held_out_batches(self, batch_size: int, **options: Any) -> Iterator[dict[str, np.ndarray]]:
        """The held-out windows once, in order; none at held_out_fraction 0. See `pipeline.held_out_batches`."""
        return iter(()) if self.held_out is None else held_out_batches(self.held_out, batch_size, **options)

    def summary(self) -> dict[str, Any]:
        """What a manifest should say about the data: counts and hashes, ready for JSON."""
        return {
            "source": self.config.source,
            "fingerprint": self.fingerprint,
            "content_hash": self.files.content_hash,
            "tokenizer_hash": self.tokenizer.sha256,
            "tokenizer_vocab_size": self.tokenizer.vocab_size,
            "splits": {name: dataclasses.asdict(split) for name, split in self.files.splits.items()},
            "skipped": self.skipped,
        }


def load(
    config: DataConfig,
    seq_len: int,
    run_dir: str | os.PathLike[str],
    *,
    model_vocab_size: int | None = None,
    progress: bool = True,
) -> Data:
    """Reads the corpus, trains or reads the tokenizer, encodes (or finds it all in the cache).

    Args:
        config: what to read.
        seq_len: tokens predicted in a window.
        run_dir: the run's folder. Its tokenizer.json is written, so that the run can be used without its corpus.
        model_vocab_size: the model's vocabulary, checked against the tokenizer's.
        progress: whether progress goes to stderr.
    Raises: ValueError for an empty corpus, one shorter than a window, a tokenizer too large for the model, or
        another tokenizer than the run began with.
    """
    documents = read_corpus(config)
    train_documents, held_out_documents = corpus.split(documents, config.held_out_fraction)
    cache_dir = _cache_dir(config)
    tokenizer = _tokenizer(config, train_documents, Path(run_dir) / "tokenizer.json", cache_dir, progress)
    if model_vocab_size is not None:
        tokenizer.require_fits(model_vocab_size)
    splits = {_TRAIN: train_documents} | ({_HELD_OUT: held_out_documents} if held_out_documents else {})
    files = prepare(splits, tokenizer, cache_dir, progress=progress)
    window: dict[str, Any] = {
        "eos_id": tokenizer.eos_id,
        "cross_document_attention": config.cross_document_attention,
    }
    train = TokenSource(files.array(_TRAIN), seq_len, name=_TRAIN, **window)
    held_out = None
    if held_out_documents:
        held_out = TokenSource(files.array(_HELD_OUT), seq_len, name=_HELD_OUT, pad_last=True, **window)
    return Data(
        config=config,
        tokenizer=tokenizer,
        files=files,
        train=train,
        held_out=held_out,
        skipped={reason: len(names) for reason, names in documents.skipped.items()},
        fingerprint=fingerprint(files, seq_len, config.cross_document_attention),
    )


def read_corpus(config: DataConfig) -> corpus.Documents:
    """The documents that `config` names, after its size cap. Raises ValueError when there are none."""
    if config.source == PYTHON_STDLIB:
        documents = corpus.python_stdlib()
    else:
        documents = corpus.folder(config.source, config.patterns)
    return documents if config.max_bytes is None else documents.capped(config.max_bytes)


def fingerprint(files: TokenFiles, seq_len: int, cross_document_attention: bool) -> str:
    """Hex hash of all that decides which windows there are: text, tokenizer, split, window length, masking."""
    parts = {
        "content": files.content_hash,
        "tokenizer": files.tokenizer_hash,
        "seq_len": seq_len,
        "cross_document_attention": cross_document_attention,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer(config: DataConfig, train: corpus.Documents, of_run: Path, cache_dir: Path, progress: bool) -> Tokenizer:
    """The tokenizer that the config names, or one trained (or trained before) on `train`; kept in the run's folder."""
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        sample = train.capped(max(config.tokenizer_sample_bytes, train[0].n_bytes))
        path = cache_dir / "tokenizers" / f"{corpus.content_hash(sample)}-{config.vocab_size}.json"
        if path.exists():
            tokenizer = load_tokenizer(path)
        else:
            texts = (document.text for document in sample)
            tokenizer = train_bpe(texts, config.vocab_size, path, progress=None if progress else False)
    if not of_run.exists():
        tokenizer.save(of_run)
    elif load_tokenizer(of_run).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{of_run} is another tokenizer than source={config.source!r}, tokenizer={config.tokenizer!r}, "
            f"vocab_size={config.vocab_size} give now: the corpus or the config has changed since this run began; "
            f"undo that, or start a new run folder"
        )
    return tokenizer


def _cache_dir(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepseek_jax"
