"""From a `DataConfig` to batches: the one call that a training loop makes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import Document
from deepseek_jax.data.pipeline import Mixture, TokenSource, batches
from deepseek_jax.data.reading import Corpus, Scan, held_out_below
from deepseek_jax.data.sources import shares_of
from deepseek_jax.data.tokenizer import (
    BYTES,
    Tokenizer,
    byte_tokenizer,
    keep_tokenizer,
    load_tokenizer,
    train_bpe,
    with_tokens,
)
from deepseek_jax.data.tokens import HELD_OUT, TRAIN, TokenFiles, prepare
from deepseek_jax.serialize import to_dict
from deepseek_jax.storage import AnyPath, cache_folder, path

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """Sources ready to be read. All dicts go by the sources' names.

    Fields:
        config: what it was made from.
        tokenizer: their tokenizer.
        scans: what was found in each source.
        files: the encoded sources and their counts: `files["text"].splits["train"].tokens` and so on.
        train: windows to train on, in the proportions of the weights.
        held_out: windows never trained on, with `segment_ids`; sources without held-out documents are not in it.
        fingerprint: hex hash of the texts, the tokenizer, and how they are cut and mixed: two runs with one fingerprint
            and one seed read the same batches.
    """

    config: DataConfig
    tokenizer: Tokenizer
    scans: dict[str, Scan]
    files: dict[str, TokenFiles]
    train: Mixture
    held_out: dict[str, TokenSource]
    fingerprint: str

    template = None  # documents are no conversations

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Source -> reason -> how many of its files or records were left out."""
        return {name: scan.skipped for name, scan in self.scans.items()}

    def train_batches(self, batch_size: int, seed: int, **options: Any) -> Any:
        """An endless, resumable iterator of shuffled train batches; see `pipeline.batches`."""
        return batches(self.train if len(self.files) > 1 else self.train.sources[0], batch_size, seed, **options)

    def epochs(self, n_tokens: float) -> dict[str, float]:
        """How often a run of so many tokens reads the training windows of each source."""
        parts = zip(self.files, self.train.sources, self.train.shares, strict=True)
        return {name: n_tokens * share / (len(source) * source.seq_len) for name, source, share in parts}

    def summary(self) -> dict[str, Any]:
        """What a manifest should say about the data: counts and hashes, ready for JSON."""
        epochs, sources = self.epochs(1e9), {}
        for name, source, share in zip(self.files, self.config.sources, self.train.shares, strict=True):
            scan, files = self.scans[name], self.files[name]
            sources[name] = {
                "kind": type(source).__name__,
                "share": share,
                "epochs_per_1e9_tokens": epochs[name],
                "documents": scan.documents,
                "text_bytes": scan.text_bytes,
                "content_hash": scan.content_hash,
                "splits": {
                    split: {**dataclasses.asdict(counts), "bytes_per_token": counts.bytes_per_token}
                    for split, counts in files.splits.items()
                },
                "skipped": scan.skipped,
                "skipped_places": {reason: list(places) for reason, places in scan.places.items()},
                "cut_short_at_max_bytes": scan.cut_short,
            }
        return {
            "fingerprint": self.fingerprint,
            "tokenizer_hash": self.tokenizer.sha256,
            "tokenizer_vocab_size": self.tokenizer.vocab_size,
            "sources": sources,
        }


def load(
    config: DataConfig,
    seq_len: int,
    run_dir: AnyPath | None,
    *,
    model_vocab_size: int | None = None,
    progress: bool = True,
) -> Data:
    """Reads the sources, trains or reads the tokenizer, encodes (or finds it all in the cache).

    Args:
        config: what to read.
        seq_len: tokens predicted in a window.
        run_dir: the run's folder. Its tokenizer.json is written, so that the run can be used without its corpus. None
            writes none.
        model_vocab_size: the model's vocabulary, checked against the tokenizer's.
        progress: whether progress goes to stderr.
    Raises: ValueError for a source that is missing, empty, ill-formed or shorter than a window, a tokenizer too large
        for the model, or another tokenizer than the run began with.
    """
    cache_dir = path(config.cache_dir or cache_folder())
    corpora = [
        Corpus(name, source, config.max_document_bytes)
        for name, source in zip(config.names, config.sources, strict=True)
    ]
    scans = [corpus.scan(cache_dir, progress=progress) for corpus in corpora]
    below = held_out_below(scans, config.held_out_fraction)
    tokenizer = with_tokens(_tokenizer(config, corpora, scans, below, cache_dir, progress), config.extra_tokens)
    if model_vocab_size is not None:
        tokenizer.require_fits(model_vocab_size)
    if run_dir is not None:
        given = f"sources={[to_dict(source) for source in config.sources]}, tokenizer={config.tokenizer!r}"
        keep_tokenizer(
            tokenizer, path(run_dir) / "tokenizer.json",
            f"{given}, vocab_size={config.vocab_size}, fim_rate={config.fim_rate}, extra_tokens={config.extra_tokens} give "
            f"now: the corpus or the config has changed since this run began; undo that, or start a new run folder",
        )  # fmt: skip
    files = {
        corpus.name: prepare(
            corpus, tokenizer, cache_dir, content_hash=scan.content_hash, text_bytes=scan.text_bytes,
            held_out_below=below, fim_rate=config.fim_rate, split_punctuation_rate=config.split_punctuation_rate,
            name=corpus.name, progress=progress,
        )
        for corpus, scan in zip(corpora, scans, strict=True)
    }  # fmt: skip
    window: dict[str, Any] = {
        "eos_id": tokenizer.eos_id,
        "cross_document_attention": config.cross_document_attention,
    }
    train, held_out = [], {}
    for name, encoded in files.items():
        if TRAIN not in encoded.splits:
            raise ValueError(
                f"DataConfig.held_out_fraction = {config.held_out_fraction!r}: it takes all "
                f"{encoded.splits[HELD_OUT].documents} documents of source {name!r}; give the source more documents"
            )
        train.append(TokenSource(encoded.array(TRAIN), seq_len, name=f"train split of source {name!r}", **window))
        if HELD_OUT in encoded.splits:
            array = encoded.array(HELD_OUT)
            held_out[name] = TokenSource(array, seq_len, name=f"held-out split of {name!r}", pad_last=True, **window)
        elif config.held_out_fraction:
            _logger.warning(
                "source %r: none of its %d documents is held out (held_out_fraction=%s), so it is not evaluated",
                name, encoded.splits[TRAIN].documents, config.held_out_fraction,
            )  # fmt: skip
    return Data(
        config=config,
        tokenizer=tokenizer,
        scans=dict(zip(config.names, scans, strict=True)),
        files=files,
        train=Mixture(train, [source.weight for source in config.sources]),
        held_out=held_out,
        fingerprint=_fingerprint(config, list(files.values()), seq_len),
    )


def _fingerprint(config: DataConfig, files: Sequence[TokenFiles], seq_len: int) -> str:
    """Of all that decides which windows come; the names of the sources and their places do not."""
    weights = [repr(share) for share in shares_of(config.sources)]
    parts = {
        "sources": list(zip((encoded.key for encoded in files), weights, strict=True)),  # text, tokenizer, split, rates
        "seq_len": seq_len,
        "cross_document_attention": config.cross_document_attention,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer(
    config: DataConfig, corpora: Sequence[Corpus], scans: Sequence[Scan], below: float, cache_dir: Any, progress: bool
) -> Tokenizer:
    """The tokenizer that the config names, or one trained (or trained before) on the training documents; without
    extra_tokens, for which a trained one leaves room."""
    fim, vocab_size = config.fim_rate > 0, config.vocab_size - len(config.extra_tokens)
    if config.tokenizer == BYTES:
        return byte_tokenizer(fim=fim)
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    budgets = [round(share * config.tokenizer_sample_bytes) for share in shares_of(config.sources)]
    texts = [[scan.content_hash, budget] for scan, budget in zip(scans, budgets, strict=True)]
    key = hashlib.blake2b(json.dumps([texts, below, vocab_size, fim]).encode(), digest_size=16).hexdigest()
    file = cache_dir / "tokenizers" / f"{key}.json"
    if file.exists():
        return load_tokenizer(file)
    sample = [
        document.text
        for corpus, scan, budget in zip(corpora, scans, budgets, strict=True)
        for document in _sample(corpus, scan, below, budget)
    ]
    return train_bpe(sample, vocab_size, file, fim=fim, progress=None if progress else False)


def _sample(corpus: Corpus, scan: Scan, below: float, budget: int) -> Iterator[Document]:
    """About `budget` bytes of training documents, at least one: those whose digests are the lowest. (A stream shows
    them in another order, so there a bound on the digest is estimated.)"""
    bound = 2**64 * min(1.0, budget / max(1.0, scan.text_bytes * (1 - below)))
    total, first = 0, None
    for document in corpus:
        if document.side < below:
            continue
        first = first or document
        if corpus.is_stream and int.from_bytes(document.digest[:8], "big") > bound:
            continue
        total += document.n_bytes
        if total > max(budget, document.n_bytes):
            return
        yield document
    if not total and first is not None:
        yield first
