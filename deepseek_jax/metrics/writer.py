"""Metrics as JSON lines: one object a line, readable by anything, whole after any crash.

Every line has a `step`; the other names are the caller's, and `plots` says which of them it draws.

Numbers are written so that reading gives back the same bits: a float32 as the double that equals it. JSON has no NaN
and no infinity; they are the strings "NaN", "Infinity" and "-Infinity", which `read_jsonl` turns back into floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax import storage

_NOT_IN_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlWriter:
    """Appends metric lines to a file; on a local disk each is handed to the system at once, so a killed program loses
    none. On gs:// lines wait a while: see `storage.LineFile`.

    A run that goes on from step k first drops the lines after k, which it is about to write again: the file reads as
    one unbroken run. So a step's lines are to be written, and flushed, before its checkpoint is.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
        """
        Args:
            path: the file, local or gs://; made when it is missing, with its folder.
            resume_step: the step that was restored: lines of later steps, and a last line cut short, are dropped.
                None begins anew and drops every line.
        Raises: ValueError when a line that stays is not JSON with a `step`.
        """
        self.path = storage.path(path)
        kept = []
        if resume_step is not None and self.path.exists():
            kept = [line for line, record in _lines(self.path) if record["step"] <= resume_step]
        self._file = storage.LineFile(self.path, kept)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
            record: name -> number, string, bool, None, array, or lists and dicts of these; `step` (an int) is needed.
                Arrays (numpy or jax, any dtype) become numbers or nested lists.
        Raises: ValueError for a record without `step`, or a value that is none of these.
        """
        line = {str(name): plain(value, str(name)) for name, value in record.items()}
        if type(line.get("step")) is not int:
            raise ValueError(f"step={line.get('step')!r}: a metric line needs an int 'step'")
        self._file.write(json.dumps(line, allow_nan=False))

    def flush(self) -> None:
        """Returns when every line is in the file, so that no kill can lose it."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file as dicts, in order, NaN and infinity as floats; a last line cut short is left out.

    Raises: ValueError for any other line that is not JSON with a `step`; FileNotFoundError.
    """
    return [record for _, record in _lines(storage.path(path))]


def _lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_bytes().decode().split("\n")
    lines.pop()  # what follows the last newline: nothing, or a line that a killed program left unfinished
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): {line[:80]!r}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}, line {number}: a metric line is an object with an int 'step': {line[:80]!r}")
        yield line, with_floats(record)


def plain(value: Any, name: str) -> Any:
    """A value as what JSON holds."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        if array.dtype.kind not in "biu":
            array = array.astype(np.float64)  # exact for every float of 64 bits or fewer, bfloat16 included
        return plain(array.tolist(), name)
    raise ValueError(f"{name}={value!r} ({type(value).__name__}): give a number, a string, an array, a list or a dict")


def with_floats(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_IN_JSON.get(value, value)
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: with_floats(item) for key, item in value.items()}
    return value
