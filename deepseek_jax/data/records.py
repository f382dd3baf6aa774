"""Record files as streams of texts: JSONL, Parquet, ArrayRecord, TFDS. One record at a time is in memory, or a small
batch; files come in the order of their names, records in the order of the file.

A record that holds no text is handed to `skip(reason, where)` and counted there. A record that is not what the source
says (no JSON, no such field, no string) is a ValueError with its place: it is a mistake, not noise.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import os
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.data.sources import ArrayRecord, Jsonl, Parquet, Source, Tfds

Skip = Callable[[str, str], None]

NOT_UTF8, EMPTY, EMPTY_SHARD = "not UTF-8", "empty", "empty shard"
_ENDINGS = {
    Jsonl: (".jsonl", ".jsonl.gz"),
    Parquet: (".parquet",),
    ArrayRecord: (".array_record", ".arrayrecord"),
}
_AT_ONCE = 256  # records of a batch
_ONLINE_SECONDS = 1.5


def files_of(source: Source) -> list[Path]:
    """The files of a source of records, by name. Raises ValueError where there are none, or no such dataset."""
    if isinstance(source, Tfds):
        return sorted(Path(file) for file in Path(_builder(source).data_dir).iterdir() if file.is_file())
    kind = type(source).__name__
    path, endings = source.path, _ENDINGS[type(source)]  # type: ignore[union-attr]
    if "://" in path:
        raise ValueError(f"{kind}.path = {path!r}: sources are read from local disks; copy or mount the files")
    root = Path(path).expanduser()
    if root.is_dir():
        # TFDS and others put the shard's number after the ending: x.array_record-00000-of-00008.
        found = [
            file for file in root.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
            and (file.name.endswith(endings) or any(f"{ending}-" in file.name for ending in endings))
        ]  # fmt: skip
        if not found:
            raise ValueError(f"{kind}.path = {path!r}: no file in this folder has a name with {' or '.join(endings)}")
    elif root.is_file():
        found = [root]
    else:
        found = [Path(name) for name in glob.glob(str(root), recursive=True) if os.path.isfile(name)]
        if not found:
            raise ValueError(f"{kind}.path = {path!r}: no such file, folder or match; give another path")
    return sorted(found)


def read(source: Source, skip: Skip) -> Iterator[tuple[str, str]]:
    """(place, text) of each record that holds text.

    Args:
        source: a source of records.
        skip: called with reason and place for each record, and each empty shard, that gives no text.
    Raises: ValueError, naming file and record, for what is not as the source says; for TFDS, for a dataset that is
        neither prepared nor to be had.
    """
    if isinstance(source, Tfds):
        shards = [(f"{source.dataset}:{source.split}", _tfds_texts(source))]
    else:
        reader: Any = {Jsonl: _jsonl, Parquet: _parquet, ArrayRecord: _array_record}[type(source)]
        shards = [(str(file), reader(source, file)) for file in files_of(source)]
    for shard, records in shards:
        count = 0
        for number, value in records:
            count += 1
            where = f"{shard}:{number}"
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError:
                    skip(NOT_UTF8, where)
                    continue
            if value is None:
                skip("null", where)
            elif not isinstance(value, str):
                raise ValueError(f"{where}: the text is a {type(value).__name__}, must be a string")
            elif not value.strip():
                skip(EMPTY, where)
            elif not _has_utf8(value):
                skip(NOT_UTF8, where)
            else:
                yield where, value
        if not count:
            skip(EMPTY_SHARD, shard)


def _has_utf8(text: str) -> bool:
    """False for lone surrogates, which JSON can spell ("\\ud800") and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _jsonl(source: Jsonl, file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                yield number, (_from_json(line, source.field, f"{file}:{number}") if line.strip() else "")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: damaged gzip file ({error}); fetch or write it anew") from None


def _from_json(record: bytes, field: str, where: str) -> Any:
    """The text of one JSON object; the record itself where it is not UTF-8, for the caller to count."""
    try:
        value = json.loads(record.decode())
    except UnicodeDecodeError:
        return record
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); mend or remove it") from None
    if not isinstance(value, dict) or field not in value:
        has = f"has the fields {sorted(value)}" if isinstance(value, dict) else f"is a {type(value).__name__}"
        raise ValueError(f"{where}: the record {has}; there is no field={field!r}")
    return value[field]


def _parquet(source: Parquet, file: Path) -> Iterator[tuple[int, Any]]:
    if not file.stat().st_size:
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"Parquet.path = {source.path!r}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if source.column not in names:
            raise ValueError(f"there is no column={source.column!r}; the columns are {names}")
        kind = table.schema_arrow.field(source.column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        tests = ("is_string", "is_large_string", "is_binary", "is_large_binary", "is_string_view", "is_binary_view")
        if not any(getattr(pyarrow.types, test)(kind) for test in tests):
            raise ValueError(f"column={source.column!r} holds {kind}, must hold strings")
        number = 0
        for batch in table.iter_batches(batch_size=_AT_ONCE, columns=[source.column]):
            # As bytes: pyarrow does not look whether strings are UTF-8.
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                number += 1
                yield number, value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _array_record(source: ArrayRecord, file: Path) -> Iterator[tuple[int, Any]]:
    if not file.stat().st_size:
        return
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    try:
        count = reader.num_records()
        if not reader.ok():
            raise ValueError(f"{file}: no ArrayRecord file, or a damaged one; write it anew")
        for start in range(0, count, _AT_ONCE):
            for number, record in enumerate(reader.read(start, min(start + _AT_ONCE, count)), start + 1):
                is_json = source.encoding == "json"
                yield number, (_from_json(record, source.field, f"{file}:{number}") if is_json else record)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{file}: no ArrayRecord file, or a damaged one ({error}); write it anew") from None
    finally:
        with contextlib.suppress(RuntimeError):  # it says again what reading said
            reader.close()


def _tfds_texts(source: Tfds) -> Iterator[tuple[int, Any]]:
    for number, record in read_tfds(source):
        if source.field not in record:
            raise ValueError(
                f"Tfds.dataset = {source.dataset!r}: there is no field={source.field!r}; the features are {sorted(record)}"
            )
        yield number, record[source.field]


def read_tfds(source: Tfds) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, features) of each example of a split. Raises: ValueError for a dataset that is not to be had."""
    what = f"Tfds.dataset = {source.dataset!r}"
    builder = _builder(source)
    try:
        records: Sequence[Any] = builder.as_data_source(split=source.split)
    except NotImplementedError as error:
        raise ValueError(f"{what}: {error}; prepare it with file_format='array_record'") from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    for start in range(0, len(records), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(records)))
        for number, record in zip(rows, records.__getitems__(list(rows)), strict=True):  # type: ignore[attr-defined]
            yield number + 1, record


def _builder(source: Tfds) -> Any:
    """What reads a dataset that is prepared, now or before."""
    from tensorflow_datasets.core import read_only_builder, registered

    data_dir = str(_tfds_dir(source))
    if source.data_dir is not None and "://" in source.data_dir:
        raise ValueError(f"Tfds.data_dir = {source.data_dir!r}: sources are read from local disks; copy the dataset")
    try:
        return read_only_builder.builder_from_files(source.dataset, data_dir=data_dir)
    except registered.DatasetNotFoundError:
        pass
    ask = (
        f'prepare it on a machine with network: python -c "import tensorflow_datasets as tfds; '
        f"tfds.data_source('{source.dataset}', data_dir='{data_dir}')\", and copy the folder here if it was another"
    )
    what = f"Tfds.dataset = {source.dataset!r}: not prepared in data_dir={data_dir!r}"
    if not _online():
        raise ValueError(f"{what}, and this machine reaches no network; {ask}")
    import tensorflow_datasets as tfds

    try:
        tfds.data_source(source.dataset, data_dir=data_dir)
        return read_only_builder.builder_from_files(source.dataset, data_dir=data_dir)
    except Exception as error:  # whatever its builder raises: missing TensorFlow, a dead link, an unknown name
        raise ValueError(f"{what}, and preparing it failed ({type(error).__name__}: {error}); {ask}") from error


def _tfds_dir(source: Tfds) -> Path:
    return Path(source.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _online() -> bool:
    """Whether TFDS' storage answers. TFDS itself would try ten times, and say nothing; a name that does not resolve
    can hold a thread for long, so a thread of its own asks, and is not waited for."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen("https://storage.googleapis.com", timeout=_ONLINE_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError:  # an answer, if a rude one
            answers.append(True)
        except Exception:  # nobody waits for this thread by then, so nobody could be told
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_ONLINE_SECONDS)
    return answers == [True]
