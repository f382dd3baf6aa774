"""Kinds of sources: where text comes from. Plain dataclasses; the libraries that read are imported where they read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import PurePath
from typing import Any, Literal

from deepseek_jax.config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """What all kinds share."""

    name: str | None = None
    """What metrics and messages call it: letters, digits, "_", "." and "-". None: from its path."""
    weight: float = 1.0
    """Share of the training windows, relative to the weights of the other sources."""
    max_bytes: int | None = None
    """Most text that is read, in bytes of UTF-8: of folders a fixed pseudo-random choice of whole documents, of record
    files the first ones. None reads all."""

    @property
    def default_name(self) -> str:
        """The name where none is given."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        if self.name is not None:
            self._require(
                re.fullmatch(r"[\w.-]+", self.name) is not None,
                "name",
                "must be made of letters, digits, '_', '.' and '-'; metrics carry it",
            )
        self._require(0 < self.weight < float("inf"), "weight", "must be greater than 0 and finite")
        self._require(
            self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be greater than 0, or None for all text"
        )

    def _require(self, condition: bool, field: str, remedy: str) -> None:
        require(condition, type(self).__name__, field, getattr(self, field), remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonStdlib(_Source):
    """The .py files of the running Python's standard library: tens of MB of real code without a download."""

    @property
    def default_name(self) -> str:
        return "python-stdlib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(_Source):
    """A folder of text or code, a document a file; read into memory, duplicates left out."""

    path: str
    """The folder; all below it is read, hidden files and folders left out."""
    patterns: tuple[str, ...] = ("*.txt", "*.md", "*.rst", "*.py")
    """Which files are read, as shell patterns of the file name."""

    @property
    def default_name(self) -> str:
        return _name_of(self.path)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.path), "path", "give the path of a folder of text files")
        self._require(
            not isinstance(self.patterns, str) and len(self.patterns) > 0 and all(self.patterns),
            "patterns",
            'give a tuple of shell patterns, such as ("*.txt",)',
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsonl(_Source):
    """JSON Lines, gzipped where the name ends in .gz: an object a line, a document an object."""

    path: str
    """A file, a folder (its *.jsonl and *.jsonl.gz), or a glob."""
    field: str = "text"
    """The key whose value is the text."""

    @property
    def default_name(self) -> str:
        return _name_of(self.path)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.path), "path", "give a .jsonl or .jsonl.gz file, a folder of them, or a glob")
        self._require(bool(self.field), "field", 'give the key of the text, such as "text"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(_Source):
    """Parquet files, a document a row. Needs pyarrow."""

    path: str
    """A file, a folder (its *.parquet), or a glob."""
    column: str = "text"
    """The column of the text: strings or bytes of UTF-8."""

    @property
    def default_name(self) -> str:
        return _name_of(self.path)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.path), "path", "give a .parquet file, a folder of them, or a glob")
        self._require(bool(self.column), "column", 'give the column of the text, such as "text"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord(_Source):
    """ArrayRecord files, a document a record."""

    path: str
    """A file, a folder (its *.array_record* and *.arrayrecord*), or a glob."""
    encoding: Literal["text", "json"] = "text"
    """What a record holds: the text in UTF-8, or a JSON object."""
    field: str = "text"
    """Of a JSON object, the key whose value is the text."""

    @property
    def default_name(self) -> str:
        return _name_of(self.path)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.path), "path", "give an ArrayRecord file, a folder of them, or a glob")
        self._require(self.encoding in ("text", "json"), "encoding", "must be 'text' or 'json'")
        self._require(bool(self.field), "field", 'give the key of the text, such as "text"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds(_Source):
    """A dataset of TensorFlow Datasets, read with its `data_source`: prepared as array_record, and without TensorFlow."""

    dataset: str
    """Its name, as tfds.load takes it: "name", "name/config" or "name/config:1.0.0"."""
    split: str = "train"
    field: str = "text"
    """The feature that is the text."""
    data_dir: str | None = None
    """Where it is, or will be, prepared. None: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""

    @property
    def default_name(self) -> str:
        return _name_of(self.dataset.replace("/", "-").replace(":", "-"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(bool(self.dataset), "dataset", 'give the name of a dataset, such as "wiki40b/en"')
        self._require(bool(self.split), "split", 'give a split, such as "train"')
        self._require(bool(self.field), "field", 'give the feature of the text, such as "text"')


Source = PythonStdlib | TextFiles | Jsonl | Parquet | ArrayRecord | Tfds


def names_of(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """The name of each source; of equal ones that nobody chose, the later ones are numbered ("text-2")."""
    names: list[str] = []
    taken = {source.name for source in sources if source.name is not None}
    for source in sources:
        name, number = source.name or source.default_name, 1
        while source.name is None and name in taken:
            number += 1
            name = f"{source.default_name}-{number}"
        taken.add(name)
        names.append(name)
    return tuple(names)


def shares_of(sources: tuple[Any, ...]) -> tuple[float, ...]:
    """Each source's share of the training windows; they add up to 1."""
    total = sum(source.weight for source in sources)
    return tuple(source.weight / total for source in sources)


def _name_of(path: str) -> str:
    """A name from a path or a glob: its last part without wildcards and endings."""
    parts = [part for part in PurePath(path).parts if not re.search(r"[*?\[]", part)]
    last = PurePath(parts[-1]).name if parts else ""
    for ending in (".gz", ".jsonl", ".json", ".parquet", ".array_record", ".arrayrecord"):
        last = last.removesuffix(ending)
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "text"
