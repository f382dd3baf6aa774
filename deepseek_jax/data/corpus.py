"""Documents: text files as a corpus, the same on every machine whatever the order of its folders.

A document is known by a hash of its text. The hash picks the side of the train / held-out split and, of a folder, the
order and the subset under a size cap, so none of them depends on paths, on the file system or on a seed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

# Files that differ between two builds of one Python version; without them equal versions give equal corpora.
_STDLIB_BUILD_FILES = ("_sysconfigdata*.py", "sitecustomize.py")
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    """One text.

    Fields:
        name: where it came from, for messages; a path relative to its corpus, with forward slashes.
        text: the text itself; newlines as they stand in the file.
    """

    name: str
    text: str

    @functools.cached_property
    def digest(self) -> bytes:
        """blake2b of the text, 16 bytes."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()

    @functools.cached_property
    def n_bytes(self) -> int:
        """Length of the text in UTF-8, bytes."""
        return len(self.text.encode())

    @property
    def side(self) -> float:
        """A number in [0, 1) from the digest's second half, held out where it is low. The order (and so the size cap
        of a folder) goes by the first half."""
        return int.from_bytes(self.digest[8:14], "big") / 2**48


@dataclasses.dataclass(frozen=True)
class Documents(Sequence[Document]):
    """A corpus in memory, and what was left out of it.

    Fields:
        items: the documents, ordered by digest.
        skipped: reason -> names of the files left out for it: "not UTF-8", "empty", "duplicate", "over max_bytes",
            "over max_document_bytes".
    """

    items: tuple[Document, ...]
    skipped: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.items)

    @functools.cached_property
    def n_bytes(self) -> int:
        """Text of all documents, bytes of UTF-8."""
        return sum(document.n_bytes for document in self.items)

    def describe(self) -> str:
        """One line: how much there is, and how much was left out and why."""
        line = f"{len(self):,} documents, {self.n_bytes / 1e6:.1f} MB"
        left_out = ", ".join(f"{len(names):,} {reason}" for reason, names in sorted(self.skipped.items()) if names)
        return f"{line} (left out: {left_out})" if left_out else line

    def without_longer(self, max_document_bytes: int) -> Documents:
        """The documents of at most so many bytes."""
        kept = tuple(document for document in self.items if document.n_bytes <= max_document_bytes)
        left_out = tuple(document.name for document in self.items if document.n_bytes > max_document_bytes)
        return Documents(kept, {**self.skipped, **({"over max_document_bytes": left_out} if left_out else {})})

    def capped(self, max_bytes: int) -> Documents:
        """The first documents in digest order whose text fits into `max_bytes`: a pseudo-random subset that is the
        same everywhere, and that a larger cap contains. ValueError when not even the first one fits."""
        total, kept = 0, 0
        for document in self.items:
            total += document.n_bytes
            if total > max_bytes:
                break
            kept += 1
        if not kept:
            raise ValueError(
                f"max_bytes={max_bytes}: the first document in hash order, {self.items[0].name!r}, has "
                f"{self.items[0].n_bytes:,} bytes; give more"
                if self.items
                else f"max_bytes={max_bytes}: there are no documents to choose from"
            )
        left_out = tuple(document.name for document in self.items[kept:])
        return Documents(self.items[:kept], {**self.skipped, **({"over max_bytes": left_out} if left_out else {})})


def folder(path: str | os.PathLike[str], patterns: Sequence[str] = ("*",)) -> Documents:
    """Reads every text file below a folder, hidden files and folders left out; symbolic links to folders are not
    followed.

    Args:
        path: the folder.
        patterns: shell patterns of the file name; a file is read when one of them matches.
    Returns: the documents; empty, duplicate and non-UTF-8 files are named in `skipped`.
    Raises: ValueError when the path is no folder, or when no file in it holds text.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"path={str(path)!r}: no such folder; give the path of a folder of text files")
    files = [file for file in _walk(root, lambda name: name.startswith(".")) if _matches(file.name, patterns)]
    documents = _read(files, root)
    if not documents:
        raise ValueError(
            f"path={str(path)!r}: no text in {len(files)} files that match patterns={tuple(patterns)}; "
            f"give other patterns or another folder ({documents.describe()})"
        )
    return documents


def python_stdlib() -> Documents:
    """The Python sources of the standard library of the Python that runs, its `test` package included where it is
    installed: 10 to 32 MB of code. Installed packages, and files written when that Python was built, are left out.

    Raises: ValueError when this Python ships no .py files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in (_walk(root, _STDLIB_LEFT_OUT.__contains__) if root.is_dir() else ())
        if file.suffix == ".py" and not _matches(file.name, _STDLIB_BUILD_FILES)
    ]
    documents = _read(files, root)
    if not documents:
        raise ValueError(f"PythonStdlib: no .py files in {root}; give TextFiles(path=...) as the source")
    return documents


def _walk(root: Path, left_out) -> Iterator[Path]:
    """Files below root in a fixed order, without the files and folders whose name is left out."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not left_out(name))
        yield from (Path(parent, name) for name in sorted(files) if not left_out(name))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _read(files: Sequence[Path], root: Path) -> Documents:
    """Reads files as UTF-8; the ones that hold no new text are named under the reason."""
    documents: dict[bytes, Document] = {}
    skipped: dict[str, list[str]] = {}
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            skipped.setdefault("not UTF-8", []).append(name)
            continue
        except OSError as error:
            skipped.setdefault(f"unreadable ({type(error).__name__})", []).append(name)
            continue
        document = Document(name, text)
        if not text.strip():
            skipped.setdefault("empty", []).append(name)
        elif document.digest in documents:
            skipped.setdefault("duplicate", []).append(name)
        else:
            documents[document.digest] = document
    ordered = tuple(documents[digest] for digest in sorted(documents))
    return Documents(ordered, {reason: tuple(names) for reason, names in skipped.items()})
