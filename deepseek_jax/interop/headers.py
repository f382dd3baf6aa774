"""Safetensors headers and folders of them, read strictly: what does not add up is refused before a byte is used.

The file format: 8 bytes with the header's length, the header as JSON (name -> dtype, shape, data_offsets), then the
tensors back to back. A header may come from anywhere, so nothing in it is believed.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from deepseek_jax import storage

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
MAX_JSON = 100_000_000  # bytes of an index or config
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT8 = "F8_E4M3"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "U16": np.dtype(np.uint16), "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32), "I32": np.dtype(np.int32), "U64": np.dtype(np.uint64), "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64), FLOAT8: np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
"""Dtype of a header -> dtype of numpy."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    file: epath.Path
    dtype: str
    """As in the header, such as `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint's folder, headers read, no tensor."""

    folder: epath.Path
    config: dict[str, Any]
    """config.json, unchecked."""
    tensors: dict[str, TensorInfo]
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def open_folder(path: storage.AnyPath) -> Checkpoint:
    """Reads config.json, the index and every header of a folder; local or gs://.

    Raises: ValueError for what is missing, pickled instead of safetensors, or does not add up, with the file's name.
    """
    folder = storage.path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder that holds config.json and *.safetensors")
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json: give the folder of a published checkpoint")
    config = read_json(folder / "config.json")
    if (folder / INDEX).exists():
        weight_map = _weight_map(folder / INDEX)
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).exists():
        weight_map, files = None, [SINGLE]
    else:
        pickled = sorted(f.name for f in folder.iterdir() if re.search(r"\.(bin|pt|pth|pkl|ckpt)$", f.name))
        if pickled:
            raise ValueError(
                f"{folder} holds pickles ({', '.join(pickled[:3])}), which run code when they are read: they are never "
                f"opened here; get the safetensors of this checkpoint"
            )
        raise ValueError(f"{folder} holds neither {INDEX} nor {SINGLE}")
    shards = (f.name for f in folder.iterdir() if re.fullmatch(r".+-\d+-of-\d+\.safetensors", f.name))
    if others := sorted(set(shards) - set(files)):
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}, which {INDEX if weight_map else 'no ' + INDEX} names: their tensors "
            f"would be left out; get the index of these files, or move them away"
        )
    tensors: dict[str, TensorInfo] = {}
    for name in files:
        if not (folder / name).exists():
            raise ValueError(f"{folder / INDEX} names {name}, which is not there: get the missing file")
        for tensor, info in read_header(folder / name).items():
            if tensor in tensors:
                raise ValueError(f"{folder}: tensor {tensor!r} is in {tensors[tensor].file.name} and in {name}")
            if weight_map is not None and weight_map.get(tensor) != name:
                raise ValueError(f"{folder / name} holds {tensor!r}, which {INDEX} places in {weight_map.get(tensor)}")
            tensors[tensor] = info
    if weight_map is not None and (lost := sorted(set(weight_map) - set(tensors))):
        raise ValueError(f"{folder / INDEX} names {len(lost)} tensors that its files do not hold: {lost[:5]}")
    return Checkpoint(folder, config, tensors, tuple(files))


def read_header(file: epath.Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor of a safetensors file.

    Raises: ValueError for a header that is longer than the file or `MAX_HEADER`, no JSON, has an unknown dtype or a
        shape that is not its bytes, or whose tensors overlap, leave gaps, or do not fill the file.
    """
    size = file.stat().length
    wrong = _Wrong(file)
    if size < 8:
        raise wrong(f"{size} bytes are no safetensors file")
    length = int.from_bytes(storage.read_bytes(file, 0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise wrong(f"its header claims {length} bytes, in a file of {size} and with {MAX_HEADER} the most allowed")
    try:
        header = json.loads(storage.read_bytes(file, 8, 8 + length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise wrong(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise wrong(f"its header is a {type(header).__name__}, not an object")
    note = header.pop("__metadata__", {})
    if not isinstance(note, dict) or not all(isinstance(value, str) for value in note.values()):
        raise wrong("__metadata__ is not an object of strings")
    base, found = 8 + length, {}
    for name, entry in header.items():
        found[name] = _tensor(name, entry, base, file, wrong)
    at = base
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            kind = "overlaps the tensor before it" if info.start < at else "leaves a gap before it"
            raise wrong(f"{name!r} at byte {info.start - base} {kind}, which ends at {at - base}")
        at = info.end
    if at != size:
        raise wrong(f"its tensors end at byte {at}, the file at {size}")
    return found


def read_json(file: epath.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError for what is no JSON object, names a key twice, or is too long."""
    data = storage.read_bytes(file, 0, MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ValueError(f"{file} is longer than {MAX_JSON} bytes")
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: a {type(value).__name__}, where an object belongs")
    return value


def _tensor(name: str, entry: Any, base: int, file: epath.Path, wrong: _Wrong) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong(f"{name!r} is {entry!r}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"{name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(
            f"{name!r} has shape {shape!r} and data_offsets {offsets!r}: both must be lists of sizes, ascending"
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise wrong(f"{name!r}: {dtype}{shape} does not take the {offsets[1] - offsets[0]} bytes of its data_offsets")
    return TensorInfo(file, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _weight_map(file: epath.Path) -> dict[str, str]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file} has no weight_map")
    for tensor, name in weight_map.items():
        # A path could lead out of the folder.
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[\w][\w.+-]*\.safetensors", name)
            or os.path.basename(name) != name
        ):
            raise ValueError(f"{file} places {tensor!r} in {name!r}: must be the name of a .safetensors file beside it")
    return weight_map


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


class _Wrong:
    """Makes errors that name the file."""

    def __init__(self, file: epath.Path):
        self._file = file

    def __call__(self, what: str) -> ValueError:
        return ValueError(f"{self._file}: {what}; the file is damaged or no safetensors: get it again")
