"""What a run would read, as text: counts by source, and the first packed batches with the borders of documents."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.dataset import Data, load
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokens import HELD_OUT, TRAIN

_ROWS = 8  # shown of a batch


def describe(
    config: DataConfig,
    seq_len: int,
    *,
    batch_size: int = 4,
    seed: int = 0,
    batches: int = 1,
    n_tokens: int | None = None,
    model_vocab_size: int | None = None,
    progress: bool = True,
) -> str:
    """Counts and the first batches of a run, as text. Encodes the sources where the cache has them not; writes nothing
    else.

    Args:
        config: what to read.
        seq_len: tokens predicted in a window.
        batch_size, seed: of the run; the rows shown are those that it reads first, at most eight of each batch.
        batches: how many are shown; 0 shows counts alone.
        n_tokens: that the run trains on, for the epochs of each source.
        model_vocab_size: the model's vocabulary, checked against the tokenizer's.
        progress: whether progress goes to stderr.
    Raises: ValueError as `load` does, and for a negative number of batches.
    """
    if batches < 0:
        raise ValueError(f"batches={batches}: must not be negative")
    data = load(config, seq_len, None, model_vocab_size=model_vocab_size, progress=progress)
    return "\n".join([*_counts(data, seq_len, n_tokens), *_batches(data, batch_size, seed, batches)])


def _counts(data: Data, seq_len: int, n_tokens: int | None) -> Iterator[str]:
    config, tokenizer = data.config, data.tokenizer
    of = "trained on the training documents" if config.tokenizer is None else config.tokenizer
    yield f"tokenizer   {tokenizer.vocab_size:,} ids, {of}, sha256 {tokenizer.sha256[:12]}"
    masking = "attention crosses documents" if config.cross_document_attention else "attention stays within documents"
    yield f"windows     {seq_len:,} tokens; {masking}"
    yield f"fill in     {config.fim_rate:g} of the training documents; punctuation split {config.split_punctuation_rate:g}"
    yield f"fingerprint {data.fingerprint}"
    yield ""
    head = ["source", "share", "documents", "MB", "tokens", "bytes/token", "windows", "held-out tokens"]
    rows = [head if n_tokens is None else [*head, f"epochs in {_short(n_tokens)} tokens"]]
    epochs = data.epochs(n_tokens or 0)
    for (name, files), source, share in zip(data.files.items(), data.train.sources, data.train.shares, strict=True):
        train, held_out = files.splits[TRAIN], files.splits.get(HELD_OUT)
        rows.append(
            [
                name, f"{share:.2%}", f"{data.scans[name].documents:,}", f"{data.scans[name].text_bytes / 1e6:,.2f}",
                f"{train.tokens:,}", f"{train.bytes_per_token:.2f}", f"{len(source):,}",
                f"{held_out.tokens:,}" if held_out else "none",
                *([] if n_tokens is None else [f"{epochs[name]:.3g}"]),
            ]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
    for name, files in data.files.items():
        train = files.splits[TRAIN]
        if train.infilled:
            yield f"{name}: {train.infilled:,} of {train.documents:,} training documents are filled in"
        if train.split_tokens:
            yield f"{name}: {train.split_tokens:,} tokens split into punctuation and line breaks"
        scan = data.scans[name]
        for reason, count in sorted(scan.skipped.items()):
            places = scan.places[reason]
            yield f"{name}: left out, {reason}: {count:,} ({', '.join(places)}{', …' if count > len(places) else ''})"
        if scan.cut_short:
            yield f"{name}: reading ended at max_bytes; what comes after is not counted"


def _batches(data: Data, batch_size: int, seed: int, count: int) -> Iterator[str]:
    iterator = data.train_batches(batch_size, seed)
    names = tuple(data.files)
    for number in range(count):
        batch = next(iterator)
        for row in range(min(batch_size, _ROWS)):
            source = names[data.train.place(number * batch_size + row)[0]]
            tokens = batch["tokens"][row]
            segments = batch["segment_ids"][row] if "segment_ids" in batch else None
            ends = int((tokens == data.tokenizer.eos_id).sum())
            yield ""
            yield f"═══ batch {number}, row {row} · {source} · {len(tokens):,} tokens, {ends} document ends"
            yield from show(tokens, data.tokenizer, segments)
        if batch_size > _ROWS:
            yield f"\n… and {batch_size - _ROWS:,} more rows of batch {number}"


def show(tokens: np.ndarray, tokenizer: Tokenizer, segment_ids: np.ndarray | None = None) -> Iterator[str]:
    """One window as lines: a rule where a document (and with `segment_ids` a segment) begins, and its text after a bar.

    Args:
        tokens: ids [T+1].
        tokenizer: theirs.
        segment_ids: [T+1], or None where attention crosses documents.
    """
    after_eos = np.flatnonzero(tokens[:-1] == tokenizer.eos_id) + 1
    for start, end in zip([0, *after_eos], [*after_eos, len(tokens)], strict=True):
        begins = tokens[start] == tokenizer.bos_id
        segment = "" if segment_ids is None else f", segment {segment_ids[start]}"
        yield f"─── {'document begins' if begins else 'document goes on'}{segment}, {end - start:,} tokens"
        for line in tokenizer.decode(tokens[start:end]).split("\n"):
            yield "│ " + "".join(c if c == "\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in line)


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
