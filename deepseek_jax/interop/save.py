"""`save_hf`: a model and its variables as a published checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from etils import epath

from deepseek_jax import storage
from deepseek_jax.interop import fp8, layout
from deepseek_jax.interop.headers import FLOAT8, NAMES
from deepseek_jax.interop.hf_config import config_to_hf, quantization_to_hf
from deepseek_jax.interop.names import copies, table
from deepseek_jax.interop.progress import Progress
from deepseek_jax.interop.rows import Row, scale_name, scale_rows
from deepseek_jax.interop.writing import (
    SHARD_BYTES,
    Planned,
    new_folder,
    write_config,
    write_tensors,
    write_tokenizer,
)
from deepseek_jax.models.transformer import DeepSeek

SaveDtype = Literal["float32", "bfloat16", "float16", "float8"]
ON_DISK = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8": "BF16"}
"""Dtype asked for -> dtype of the tensors that are not quantised."""


def save_hf(
    path: storage.AnyPath,
    model: DeepSeek,
    variables: Any,
    dtype: SaveDtype = "bfloat16",
    *,
    ue8m0: bool = False,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> epath.Path:
    """Writes a folder that transformers, vLLM, SGLang and `load_hf` read: shards, index, config.json, tokenizer files.

    Args:
        path: a new folder, local or gs://.
        model: the model; only its configuration is read.
        variables: of `model.init` or `load_hf`; with a collection `scales` they are written as they are, in FP8.
        dtype: of the tensors; selection biases stay float32. "float8" writes the Linear weights of attention and
            feed-forward as 128 × 128 blocks with float32 scales, as V3 is published, the rest in bfloat16.
        ue8m0: whether new scales are powers of two, as in V3.1.
        tokenizer: its files go along: a folder, a tokenizer.json, or an object with `save(path)`.
        shard_bytes: most bytes of one file.
        progress: whether the bytes written are shown on stderr; None: yes.

    Returns:
        The folder.

    Raises:
        ValueError: no published format holds the configuration; variables that are not its own; values that the dtype
            cannot hold; a folder that holds a checkpoint already; arrays that are spread over several processes.
    """
    if dtype not in ON_DISK:
        raise ValueError(f"dtype = {dtype!r}: must be one of {', '.join(map(repr, ON_DISK))}")
    if ue8m0 and dtype != "float8":
        raise ValueError(f"ue8m0 = True: a form of FP8 scales, but dtype = {dtype!r}: give dtype='float8'")
    config = model.config
    rows, named = table(config), _named(variables)
    kept = "scales" in variables
    if kept:
        if dtype != "float8":
            raise ValueError(f"dtype = {dtype!r}: these variables hold FP8 and its scales: give dtype='float8'")
        quantised = [row for row in rows if row.leaf in named and named[row.leaf].dtype == fp8.FLOAT8]
        rows = rows + scale_rows(quantised, fp8.BLOCK)
    _require_leaves(rows, named)
    sources = _sources(rows)
    source_of = {name: (parts, place) for name, parts, place in sources}
    order = [name for name, _, _ in sources]
    written: list[tuple[str, str]] = [(name, name) for name in order]
    modules = {name: original for name, original in copies(config).items() if name != "lm_head.weight"}
    written += list(modules.items())
    rank = {name: i for i, name in enumerate(order)}
    rank |= {scale_name(name): i for i, name in enumerate(order) if scale_name(name) in rank}  # beside their tensor
    written.sort(key=lambda pair: (place_in_file(pair[0], config.num_hidden_layers), rank[pair[1]], len(pair[0])))
    stated = config_to_hf(config, torch_dtype="bfloat16" if dtype == "float8" else dtype)
    planned: list[Planned] = []
    for name, original in written:
        parts, _ = source_of[original]
        row = parts[0]
        new_fp8 = dtype == "float8" and row.fp8 and not kept
        if kept:
            on_disk = NAMES[np.dtype(named[row.leaf].dtype)]
        else:
            wide = row.leaf.startswith("router/")
            on_disk = FLOAT8 if new_fp8 else "F32" if wide else ON_DISK[dtype]
        planned.append(Planned(name, on_disk, row.tensor_shape))
        if new_fp8:
            shape = fp8.scale_shape((row.tensor_shape[0], row.tensor_shape[1]))
            planned.append(Planned(scale_name(name), "F32", shape))
    if dtype == "float8":
        stated["quantization_config"] = quantization_to_hf(power_of_two=_powers(rows, named) if kept else ue8m0)

    folder = new_folder(path)
    total = sum(tensor.nbytes for tensor in planned)
    with Progress(f"save {folder.name}", total, progress is not False) as told:

        def arrays() -> Iterator[np.ndarray]:
            left = iter(planned)
            for _, original in written:
                parts, place = source_of[original]
                tensor = next(left)
                array = layout.assemble(parts, [_piece(named[part.leaf], place) for part in parts])
                if tensor.dtype == FLOAT8 and not kept:
                    try:
                        array, scales = fp8.quantise(array, power_of_two=ue8m0)
                    except ValueError as error:
                        raise ValueError(f"{tensor.name}: {error}") from None
                    yield array
                    told(array.nbytes)
                    next(left)
                    array = scales
                elif not kept:
                    array = cast(array, tensor)
                yield array
                told(array.nbytes)

        write_tensors(folder, planned, arrays(), shard_bytes)
    write_tokenizer(folder, tokenizer)
    write_config(folder, stated)
    return folder


def cast(array: np.ndarray, tensor: Planned) -> np.ndarray:
    """`array` in the dtype of `tensor`. Raises: ValueError where float16 cannot hold a value."""
    kind = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}[tensor.dtype]
    with np.errstate(over="ignore"):
        cast = array.astype(kind, copy=False)
    if tensor.dtype == "F16" and not np.isfinite(cast).all():
        raise ValueError(f"{tensor.name}: a value is too large for float16: give dtype='bfloat16'")
    return cast


def _sources(rows: list[Row]) -> list[tuple[str, list[Row], tuple[int, ...]]]:
    """(tensor, rows that make it up, place in their stacking dims) of every tensor."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(f"{row.tensor} {row.layers}", []).append(row)
    return [(name, together, place) for together in parts.values() for place, name in together[0].names()]


def place_in_file(name: str, layers: int) -> tuple[int, int]:
    """Sorts tensors of a file: layers in order, the embedding before them, norm and head after the main model's, as published."""
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2])
        return (1 if layer < layers else 3), layer
    return (0, 0) if name.startswith("model.embed") else (2, 0)


def _piece(leaf: Any, place: tuple[int, ...]) -> np.ndarray:
    """`leaf[place]` on the host, without a host copy of the whole leaf."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[place]
    shards = leaf.addressable_shards
    if len(shards) == 1 and shards[0].device.platform == "cpu":
        return np.asarray(leaf)[place]  # the very memory
    out = np.empty(leaf.shape[len(place) :], leaf.dtype)
    for shard in shards:
        spans = [part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)]
        lead = spans[: len(place)]
        if shard.replica_id == 0 and all(start <= at < stop for at, (start, stop) in zip(place, lead, strict=True)):
            inside = tuple(at - start for at, (start, _) in zip(place, lead, strict=True))
            target = tuple(slice(start, stop) for start, stop in spans[len(place) :])
            out[target] = np.asarray(shard.data[inside])
    return out


def _powers(rows: list[Row], named: dict[str, Any]) -> bool:
    """Whether all scales are powers of two: then they were made so."""
    for row in rows:
        if row.leaf.startswith("scales/"):
            mantissa, _ = np.frexp(np.asarray(named[row.leaf]))
            if not (mantissa == 0.5).all():
                return False
    return True


def _require_leaves(rows: list[Row], named: dict[str, Any]) -> None:
    wanted = {row.leaf: row.leaf_shape for row in rows}
    wrong = [f"{leaf} is missing" for leaf in wanted if leaf not in named]
    wrong += [f"{leaf} is no leaf of this model" for leaf in named if leaf not in wanted]
    for leaf, shape in wanted.items():
        if leaf in named and tuple(named[leaf].shape) != shape:
            wrong.append(f"{leaf} has shape {tuple(named[leaf].shape)}, expected {shape}")
        if leaf in named and isinstance(named[leaf], jax.Array) and not named[leaf].is_fully_addressable:
            wrong.append(f"{leaf} is spread over several processes: save from one that holds it all")
    if wrong:
        raise ValueError("variables: " + "; ".join(wrong[:10]) + (" …" if len(wrong) > 10 else ""))


def _named(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in pairs}
