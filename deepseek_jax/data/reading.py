"""Sources as streams of documents, and what one pass over a stream finds out.

A stream is read again for each pass (scan, tokenizer sample, encoding), so a corpus never has to fit in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from deepseek_jax.data import corpus, records
from deepseek_jax.data.corpus import Document
from deepseek_jax.data.progress import Report
from deepseek_jax.data.sources import PythonStdlib, Source, TextFiles
from deepseek_jax.storage import AnyPath, path, write_atomic

_FORMAT = 1  # part of the key of a remembered scan: raise it when the same files would be read otherwise
_NAMED = 5  # places remembered for each reason


@dataclasses.dataclass(frozen=True)
class Scan:
    """What one pass over a source found.

    Fields:
        documents, text_bytes: how many, and their text in bytes of UTF-8.
        content_hash: hex blake2b of the documents' digests in their order: names and paths do not matter.
        low_sides: the two lowest different `Document.side`s (or the only one); high_side: the highest.
        skipped: reason -> how many records or files were left out for it.
        places: reason -> the first few of them.
        cut_short: whether reading ended at max_bytes, so that what came after was not counted.
    """

    documents: int
    text_bytes: int
    content_hash: str
    low_sides: tuple[float, ...]
    high_side: float
    skipped: dict[str, int]
    places: dict[str, tuple[str, ...]]
    cut_short: bool = False


class Corpus:
    """One source as documents, to be read as often as needed.

    Folders are read into memory once: ordered by digest, without duplicates. Record files are streamed in their order,
    duplicates included, since finding them would take a table of all digests.
    """

    def __init__(self, name: str, source: Source, max_document_bytes: int | None = None):
        """
        Args:
            name: what messages call it.
            source: what is read.
            max_document_bytes: longer documents are left out; None: none is too long.
        """
        self.name, self.source, self._longest = name, source, max_document_bytes
        self._folder: corpus.Documents | None = None
        self._found = _Found()

    @property
    def is_stream(self) -> bool:
        """Whether documents come in the order of files, rather than of digests."""
        return not isinstance(self.source, PythonStdlib | TextFiles)

    def __iter__(self) -> Iterator[Document]:
        self._found = _Found()
        return self._stream(self._found) if self.is_stream else iter(self._documents())

    def scan(self, cache_dir: AnyPath, *, progress: bool = True) -> Scan:
        """Counts and hashes all documents. For record files the result is remembered in `cache_dir`, and holds as long
        as their names, sizes and times of change stay.

        Raises: ValueError when there are no documents, and as `corpus.folder` and `records.read` do.
        """
        remembered = path(cache_dir) / "scans" / f"{self._key()}.json" if self.is_stream else None
        if remembered is not None and remembered.exists():
            values = json.loads(remembered.read_text())
            places = {reason: tuple(names) for reason, names in values["places"].items()}
            return Scan(**{**values, "low_sides": tuple(values["low_sides"]), "places": places})
        scan = self._scan(progress and self.is_stream)
        if remembered is not None:
            write_atomic(remembered, json.dumps(dataclasses.asdict(scan)))
        return scan

    def _scan(self, progress: bool) -> Scan:
        digests, count, total, low, high = hashlib.blake2b(digest_size=16), 0, 0, [], 0.0
        with Report(f"reading {self.name}", None, progress) as report:
            for document in self:
                digests.update(document.digest)
                count, total, high = count + 1, total + document.n_bytes, max(high, document.side)
                if len(low) < 2 or document.side < low[1]:
                    low = sorted({*low, document.side})[:2]
                report(document.n_bytes)
        found = self._found
        if not self.is_stream:
            for reason, names in self._documents().skipped.items():
                found.skipped[reason], found.places[reason] = len(names), list(names[:_NAMED])
        if not count:
            left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(found.skipped.items())) or "nothing left out"
            if found.cut_short:
                left_out += f"; the first document is longer than max_bytes={self.source.max_bytes}"
            raise ValueError(f"source {self.name!r} holds no documents ({left_out}): {self.source}")
        places = {reason: tuple(names) for reason, names in found.places.items()}
        return Scan(count, total, digests.hexdigest(), tuple(low), high, found.skipped, places, found.cut_short)

    def _documents(self) -> corpus.Documents:
        if self._folder is None:
            source = self.source
            if isinstance(source, TextFiles):
                documents = corpus.folder(source.path, source.patterns)
            else:
                documents = corpus.python_stdlib()
            if self._longest is not None:
                documents = documents.without_longer(self._longest)
            self._folder = documents.capped(source.max_bytes) if source.max_bytes and documents else documents
        return self._folder

    def _stream(self, found: _Found) -> Iterator[Document]:
        total = 0
        for where, text in records.read(self.source, found.skip):
            document = Document(where, text)
            if self._longest is not None and document.n_bytes > self._longest:
                found.skip("over max_document_bytes", where)
                continue
            total += document.n_bytes
            if self.source.max_bytes is not None and total > self.source.max_bytes:
                found.cut_short = True
                return
            yield document

    def _key(self) -> str:
        """Of the files as they are now, and of how they are read."""
        files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in records.files_of(self.source)]
        how = {k: v for k, v in dataclasses.asdict(self.source).items() if k not in ("name", "weight")}
        parts: Any = [_FORMAT, type(self.source).__name__, how, self._longest, files]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclasses.dataclass
class _Found:
    """What a pass leaves out."""

    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    cut_short: bool = False

    def skip(self, reason: str, where: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < _NAMED:
            places.append(where)


def held_out_below(scans: Sequence[Scan], held_out_fraction: float) -> float:
    """Documents with a lower `side` are held out: the fraction itself, moved where a small corpus would have a side
    without documents. One number for all sources, so that a document that two of them share stays on one side.

    Raises: ValueError where there are too few documents to split.
    """
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction}: give a share in [0, 1)")
    if not held_out_fraction:
        return 0.0
    lowest = sorted({side for scan in scans for side in scan.low_sides})
    if len(lowest) < 2:
        raise ValueError(
            f"held_out_fraction={held_out_fraction}: the corpus has {sum(scan.documents for scan in scans)} documents, "
            f"and the split is by document; give at least 2 different ones, or held_out_fraction=0"
        )
    return min(max(held_out_fraction, (lowest[0] + lowest[1]) / 2), max(scan.high_side for scan in scans))
