"""Record files as streams of whole rows, for data that is more than one text a record: JSONL, Parquet, TFDS."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.data.records import EMPTY, EMPTY_SHARD, NOT_UTF8, Skip, files_of, read_tfds
from deepseek_jax.data.sources import Jsonl, Parquet, Tfds

Row = dict[str, Any]
_AT_ONCE = 256


def read_rows(source: Jsonl | Parquet | Tfds, skip: Skip, fields: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """(place, row) of each record: str, numbers, lists and dicts, as JSON has them.

    Args:
        source: where the rows are; the name of its text field does not matter.
        skip: called with reason and place for each blank line, line that is not UTF-8, and empty shard.
        fields: those that are wanted; a row that lacks one is given without it. Others may be left out.
    Raises: ValueError, naming file and record, for what is no JSON object or no Parquet; for TFDS, for a dataset that is
        neither prepared nor to be had.
    """
    if isinstance(source, Tfds):
        shards = [(f"{source.dataset}:{source.split}", ((n, _plain(row)) for n, row in read_tfds(source)))]
    else:
        files = files_of(source)
        shards = [(str(f), _parquet(f, fields) if isinstance(source, Parquet) else _jsonl(f)) for f in files]
    for shard, rows in shards:
        count = 0
        for number, row in rows:
            count += 1
            if isinstance(row, str):
                skip(row, f"{shard}:{number}")
            else:
                yield f"{shard}:{number}", row
        if not count:
            skip(EMPTY_SHARD, shard)


def _jsonl(file: Path) -> Iterator[tuple[int, Row | str]]:
    """Line numbers, and rows or the reason why there is none."""
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, _from_json(line, f"{file}:{number}") if line.strip() else EMPTY
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: damaged gzip file ({error}); fetch or write it anew") from None


def _from_json(line: bytes, where: str) -> Row | str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return NOT_UTF8
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); mend or remove it") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the line is a JSON {type(row).__name__}: must be an object")
    return row


def _parquet(file: Path, fields: Sequence[str]) -> Iterator[tuple[int, Row]]:
    if not file.stat().st_size:
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name in fields]
        if not columns:
            raise ValueError(f"none of the fields {list(fields)} is among its columns {table.schema_arrow.names}")
        number = 0
        for batch in table.iter_batches(batch_size=_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: _plain(value) for name, value in row.items()}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _plain(value: Any) -> Any:
    """As JSON has it. Keys inside whose value is null are left out: a table gives every row all keys that any row has,
    so that a call of one tool would carry the arguments of all others."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")  # refused as not UTF-8 where it is encoded
    if hasattr(value, "tolist"):  # numpy, of TFDS
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
