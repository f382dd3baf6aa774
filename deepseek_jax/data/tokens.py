"""Documents to tokens, once: flat arrays in a cache that is keyed by the text, by the tokenizer, and by what is done to
documents.

A document is stored as BOS, its tokens, EOS; a split is the documents of it end to end, in the order in which they
come. They are encoded as they come and written as they are encoded: neither text nor tokens are held in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.corpus import Document
from deepseek_jax.data.progress import Report
from deepseek_jax.data.rearrange import PunctuationSplitter, infill
from deepseek_jax.data.tokenizer import FIM_TOKENS, Tokenizer
from deepseek_jax.storage import AnyPath, is_local, map_array, path, save_array, write_atomic

_FORMAT = 2  # part of the cache key: raise it when the same documents would be stored otherwise
_CHUNK_BYTES = 4_000_000  # text handed to the tokenizer at once: enough documents to keep all cores busy
_CHUNK_DOCUMENTS = 10_000

TRAIN, HELD_OUT = "train", "held_out"


@dataclasses.dataclass(frozen=True)
class Split:
    """What one split holds.

    Fields:
        tokens: ids stored, BOS and EOS included.
        documents: number of documents.
        text_bytes: UTF-8 bytes of their text.
        infilled: documents rearranged for fill in the middle.
        split_tokens: tokens that were split into punctuation and line breaks.
    """

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    infilled: int = 0
    split_tokens: int = 0

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per id. Bits per byte = loss in nats per id / ln 2 / bytes_per_token."""
        return self.text_bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """An encoded source on disk.

    Fields:
        folder: holds one <split>.npy a split, and meta.json.
        splits: "train" and "held_out" -> its counts; one that has no documents is not there.
        key: hex hash of the documents in their order, of the tokenizer, of the split and of what was done to them.
        reused: whether the files were found in the cache.
    """

    folder: Any
    splits: dict[str, Split]
    key: str
    reused: bool

    def array(self, split: str) -> np.ndarray:
        """The ids of one split, [tokens], uint16 or uint32, memory-mapped and read-only.

        Raises: ValueError for an unknown split, and for a file that is not what meta.json says.
        """
        if split not in self.splits:
            raise ValueError(f"split={split!r}: this corpus has {sorted(self.splits)}")
        file = self.folder / f"{split}.npy"
        try:
            array = map_array(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}; delete {self.folder} to encode the corpus again") from None
        if array.shape != (self.splits[split].tokens,) or array.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"{file}: holds {array.dtype}{list(array.shape)}, meta.json says {self.splits[split].tokens} ids; "
                f"delete {self.folder} to encode the corpus again"
            )
        return array


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    cache_dir: AnyPath,
    *,
    content_hash: str,
    held_out_below: float = 0.0,
    fim_rate: float = 0.0,
    split_punctuation_rate: float = 0.0,
    text_bytes: int | None = None,
    name: str = "documents",
    progress: bool = True,
) -> TokenFiles:
    """Encodes the documents of a source, or finds them encoded.

    Args:
        documents: read once, in their order, and not at all where the cache has them.
        tokenizer: encodes the text; on all cores.
        cache_dir: its subfolder `tokens/<key>` holds the arrays. meta.json is written last, so a folder with one is
            whole; sizes are checked before it is used again.
        content_hash: `Scan.content_hash` of these documents.
        held_out_below: documents with a lower `side` are held out.
        fim_rate, split_punctuation_rate: as in `DataConfig`; held-out documents are left as they are.
        text_bytes: in all, for the progress.
        name: of the source, for messages.
        progress: whether progress goes to stderr: a bar on a terminal, else a line every ten seconds.
    Raises: ValueError when the documents are others than those that were hashed, or when the tokenizer has no tokens
        for fill in the middle.
    """
    if fim_rate and tokenizer.fim_ids is None:
        raise ValueError(
            f"DataConfig.fim_rate = {fim_rate!r}: the tokenizer has no tokens {', '.join(FIM_TOKENS)}; take one that "
            f"has, let one be trained (tokenizer=None), or set fim_rate=0"
        )
    parts = [_FORMAT, content_hash, tokenizer.sha256, held_out_below, fim_rate, split_punctuation_rate]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    folder = path(cache_dir) / "tokens" / key
    if (found := _open(folder, key)) is not None:
        return found
    with contextlib.ExitStack() as stack:
        scratch = None
        if is_local(folder):  # beside its destination: /tmp may be small, or memory
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder
        sides = {split: _Growing(stack, scratch, tokenizer) for split in (TRAIN, HELD_OUT)}
        encoder = _Encoder(tokenizer, held_out_below, fim_rate, split_punctuation_rate)
        digests = hashlib.blake2b(digest_size=16)
        with Report(f"encoding {name}", text_bytes, progress) as report:
            for chunk in _chunks(documents):
                for document, split, ids, counts in encoder(chunk):
                    digests.update(document.digest)
                    sides[split].append(ids, counts)
                report(sum(document.n_bytes for document in chunk))
        if digests.hexdigest() != content_hash:
            raise ValueError(f"source {name!r} changed while it was being read; start again when nobody writes to it")
        counts = {}
        for split, side in sides.items():
            if side.counts.documents:
                save_array(folder / f"{split}.npy", side.array())
                counts[split] = side.counts
    meta = {"format": _FORMAT, "key": key, "content_hash": content_hash, "tokenizer_hash": tokenizer.sha256}
    meta |= {"splits": {split: dataclasses.asdict(count) for split, count in counts.items()}}
    write_atomic(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    return TokenFiles(folder, counts, key, reused=False)


def _open(folder: Any, key: str) -> TokenFiles | None:
    """The files of an earlier call, or None when they are absent or not what their meta.json says."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = {name: Split(**count) for name, count in meta["splits"].items()}
        files = TokenFiles(folder, counts, key, reused=True)
        for name in counts:
            files.array(name)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files


class _Growing:
    """The ids of a split, in a file without a name that goes away with the stack."""

    def __init__(self, stack: contextlib.ExitStack, folder: Any, tokenizer: Tokenizer):
        file = tempfile.TemporaryFile(dir=None if folder is None else Path(folder))  # noqa: SIM115, the stack closes it
        self._file = stack.enter_context(file)
        self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.counts = Split()

    def append(self, ids: np.ndarray, counts: Split) -> None:
        self._file.write(ids.astype(self._dtype).data)
        added = dataclasses.astuple(counts)
        self.counts = Split(*(a + b for a, b in zip(dataclasses.astuple(self.counts), added, strict=True)))

    def array(self) -> np.ndarray:
        self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r", shape=(self.counts.tokens,))


class _Encoder:
    """Documents to ids, many at a time."""

    def __init__(self, tokenizer: Tokenizer, held_out_below: float, fim_rate: float, split_punctuation_rate: float):
        self._tokenizer, self._below, self._fim_rate = tokenizer, held_out_below, fim_rate
        self._splitter = PunctuationSplitter(tokenizer, split_punctuation_rate)

    def __call__(self, documents: Sequence[Document]) -> Iterator[tuple[Document, str, np.ndarray, Split]]:
        """Each document with its split, its ids [n] with BOS and EOS, and what it adds to the counts."""
        texts: list[str] = []
        holes = []
        for document in documents:
            held_out = document.side < self._below
            hole = None if held_out or not self._fim_rate else infill(document.text, document.digest, self._fim_rate)
            holes.append(hole)
            texts += (document.text,) if hole is None else hole
        encoded = iter(self._tokenizer.encode_batch(texts))
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        for document, hole in zip(documents, holes, strict=True):
            if hole is None:
                ids = [bos, *next(encoded), eos]
            else:
                assert self._tokenizer.fim_ids is not None
                (opens, stands_for, closes), prefix, middle, suffix = (
                    self._tokenizer.fim_ids, next(encoded), next(encoded), next(encoded),
                )  # fmt: skip
                ids = [bos, opens, *prefix, stands_for, *suffix, closes, *middle, eos]
            array, split_tokens = np.array(ids, np.uint32), 0
            held_out = document.side < self._below
            if not held_out:
                array, split_tokens = self._splitter(array, document.digest)
            counts = Split(len(array), 1, document.n_bytes, int(hole is not None), split_tokens)
            yield document, HELD_OUT if held_out else TRAIN, array, counts


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.n_bytes
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
