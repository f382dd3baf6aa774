"""Safetensors files written tensor by tensor: shards, index and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax import storage
from deepseek_jax.interop.headers import DTYPES, INDEX, NAMES, SINGLE

SHARD_BYTES = 5_000_000_000

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: str
    """As in a header, such as `BF16`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def new_folder(path: storage.AnyPath) -> epath.Path:
    """The folder for a checkpoint, made where it is missing. Raises: ValueError where it holds one already."""
    folder = storage.path(path)
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder to write to")
        found = sorted(f.name for f in folder.iterdir() if f.name == "config.json" or f.name.endswith(".safetensors"))
        if found:
            raise ValueError(f"{folder} holds a checkpoint already ({', '.join(found[:3])}): give a new folder")
    return storage.make_folder(folder)


def write_tensors(
    folder: epath.Path,
    planned: Sequence[Planned],
    arrays: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes the planned tensors, whose arrays come in this order, into shards of at most `shard_bytes`, and the index.

    Only one tensor needs to exist at a time; one larger than a shard has a shard of its own. Returns the file names.

    Raises: ValueError where an array is not what was planned.
    """
    shards: list[list[Planned]] = []
    room = 0
    for tensor in planned:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    coming = iter(arrays)
    for name, shard in zip(names, shards, strict=True):
        with storage.new_file(folder / name) as file:
            file.write(_header(shard))
            for tensor in shard:
                array = next(coming)
                if NAMES.get(array.dtype) != tensor.dtype or array.shape != tensor.shape:
                    raise ValueError(f"{tensor.name}: got {array.dtype}{array.shape}, planned {tensor}")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    if count > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in planned)},
            "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
        }
        storage.write_atomic(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return names


def write_config(folder: epath.Path, config: Mapping[str, Any]) -> None:
    """config.json, the last file of a folder: without it the folder is not opened."""
    storage.write_atomic(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_tokenizer(folder: epath.Path, tokenizer: Any) -> None:
    """Tokenizer files: copied from a folder or a tokenizer.json, or saved by an object's `save(path)`.

    Raises: ValueError where there is no tokenizer.json.
    """
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder / "tokenizer.json")
        return
    source = storage.path(tokenizer)
    if not source.is_dir():
        if not source.exists():
            raise ValueError(f"tokenizer = {str(tokenizer)!r}: no such file or folder")
        storage.write_atomic(folder / "tokenizer.json", source.read_bytes())
        return
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            storage.write_atomic(folder / name, (source / name).read_bytes())


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        offsets = [at, at + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text
