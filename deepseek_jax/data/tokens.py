"""Documents to tokens, once: flat arrays in a cache that is keyed by the text and by the tokenizer.

A document is stored as BOS, its tokens, EOS; a split is the documents of it in hash order, end to end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.corpus import Document, content_hash
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.storage import map_array, save_array, write_atomic

_FORMAT = 1  # part of the cache key: raise it when the same documents would be stored otherwise
_CHUNK_BYTES = 4_000_000  # text handed to the tokenizer at once: enough documents to keep all cores busy
_LOG_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Split:
    """What one split holds.

    Fields:
        tokens: ids stored, BOS and EOS included.
        documents: number of documents.
        text_bytes: UTF-8 bytes of their text.
    """

    tokens: int
    documents: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per id. Bits per byte = loss in nats per id / ln 2 / bytes_per_token."""
        return self.text_bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """An encoded corpus on disk.

    Fields:
        folder: holds one <split>.npy a split, and meta.json.
        splits: split name -> its counts.
        content_hash: hex hash of the texts of all splits.
        tokenizer_hash: hex sha256 of the tokenizer.json.
        reused: whether the files were found in the cache.
    """

    folder: Path
    splits: dict[str, Split]
    content_hash: str
    tokenizer_hash: str
    reused: bool

    def array(self, split: str) -> np.ndarray:
        """The ids of one split, [tokens], uint16 or uint32, memory-mapped and read-only.

        Raises: ValueError for an unknown split, and for a file that is not what meta.json says.
        """
        if split not in self.splits:
            raise ValueError(f"split={split!r}: this corpus has {sorted(self.splits)}")
        path = self.folder / f"{split}.npy"
        try:
            array = map_array(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}; delete {self.folder} to encode the corpus again") from None
        if array.shape != (self.splits[split].tokens,) or array.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"{path}: holds {array.dtype}{list(array.shape)}, meta.json says {self.splits[split].tokens} ids; "
                f"delete {self.folder} to encode the corpus again"
            )
        return array


def prepare(
    splits: Mapping[str, Sequence[Document]],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> TokenFiles:
    """Encodes the documents of each split, or finds them encoded.

    Args:
        splits: name ("train", "held_out") -> documents, stored in hash order whatever order they come in.
        tokenizer: encodes the text; on all cores.
        cache_dir: its subfolder `tokens/<content>-<tokenizer>` holds the arrays. meta.json is written last, so a
            folder with one is whole; sizes are checked before it is used again.
        progress: whether progress goes to stderr: a bar on a terminal, else a line every ten seconds.
    Raises: ValueError when a split has no documents.
    """
    for name, documents in splits.items():
        if not documents:
            raise ValueError(f"split {name!r} has no documents; give more text, or leave the split out")
    content = _hash_of_splits(splits)
    folder = Path(cache_dir).expanduser() / "tokens" / f"{content}-{tokenizer.sha256[:32]}"
    if (found := _open(folder, content, tokenizer.sha256)) is not None:
        return found
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    counts = {}
    for name, documents in splits.items():
        ordered = sorted(documents, key=lambda document: document.digest)
        array = _encode(name, ordered, tokenizer, dtype, progress)
        save_array(folder / f"{name}.npy", array)
        counts[name] = Split(len(array), len(documents), sum(document.n_bytes for document in documents))
    meta = {
        "format": _FORMAT,
        "dtype": np.dtype(dtype).name,
        "content_hash": content,
        "tokenizer_hash": tokenizer.sha256,
        "splits": {name: dataclasses.asdict(count) for name, count in counts.items()},
    }
    write_atomic(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    return TokenFiles(folder, counts, content, tokenizer.sha256, reused=False)


def _open(folder: Path, content: str, tokenizer_hash: str) -> TokenFiles | None:
    """The files of an earlier call, or None when they are absent or not what their meta.json says."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        counts = {name: Split(**count) for name, count in meta["splits"].items()}
        files = TokenFiles(folder, counts, content, tokenizer_hash, reused=True)
        for name in counts:
            files.array(name)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files


def _hash_of_splits(splits: Mapping[str, Sequence[Document]]) -> str:
    parts = [str(_FORMAT), *(f"{name}={content_hash(documents)}" for name, documents in sorted(splits.items()))]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def _encode(name: str, documents: Sequence[Document], tokenizer: Tokenizer, dtype: Any, progress: bool) -> np.ndarray:
    """All ids of a split, [tokens]."""
    total = sum(document.n_bytes for document in documents)
    parts: list[np.ndarray] = []
    with _Report(f"encoding {name}", total, progress) as report:
        for chunk in _chunks(documents):
            for ids in tokenizer.encode_batch([document.text for document in chunk]):
                parts.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=dtype))
            report(sum(document.n_bytes for document in chunk))
    return np.concatenate(parts)


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.n_bytes
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Report:
    """Bytes done, on stderr: a bar on a terminal, a plain line now and then elsewhere. Called with each increment."""

    def __init__(self, label: str, total: int, shown: bool):
        self._label, self._total, self._done, self._shown = label, total, 0, shown
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True)

    def __enter__(self) -> _Report:
        self._start = self._last = time.monotonic()
        return self

    def __call__(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._bar is not None:
            self._bar.update(n_bytes)
        elif time.monotonic() - self._last > _LOG_SECONDS:
            self._last = time.monotonic()
            self._say(f"{self._label}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB")

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._say(f"{self._label}: {self._done / 1e6:.1f} MB in {time.monotonic() - self._start:.1f} s")

    def _say(self, line: str) -> None:
        if self._shown:
            print(line, file=sys.stderr, flush=True)
