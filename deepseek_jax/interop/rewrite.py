"""`rewrite_hf`: a published checkpoint in another dtype, such as V3's FP8 in BF16, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax import storage
from deepseek_jax.interop import fp8
from deepseek_jax.interop.check import check, is_angles, require_whole
from deepseek_jax.interop.headers import DTYPES, FLOAT8, open_folder
from deepseek_jax.interop.hf_config import config_from_hf, quantization_of, quantization_to_hf
from deepseek_jax.interop.names import table
from deepseek_jax.interop.progress import Progress
from deepseek_jax.interop.reading import read_rows
from deepseek_jax.interop.rows import scale_name
from deepseek_jax.interop.save import ON_DISK, SaveDtype, cast, place_in_file
from deepseek_jax.interop.writing import (
    SHARD_BYTES,
    Planned,
    new_folder,
    write_config,
    write_tensors,
    write_tokenizer,
)


def rewrite_hf(
    source: storage.AnyPath,
    path: storage.AnyPath,
    dtype: SaveDtype = "bfloat16",
    *,
    ue8m0: bool = False,
    mtp: bool = True,
    tokenizer: Any = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> epath.Path:
    """Reads a checkpoint, checks it whole, and writes it again; arguments and errors as in `load_hf` and `save_hf`.

    Tensors that have the dtype already, FP8 with its scales too, are copied bit for bit. config.json stays, but for
    what the dtype and `mtp` change. Tokenizer files come from `source` unless `tokenizer` names others.
    """
    checkpoint = open_folder(source)
    stated = config_from_hf(checkpoint.config, name=checkpoint.folder.name)
    config = stated if mtp else dataclasses.replace(stated, num_nextn_predict_layers=0)
    block = quantization_of(checkpoint.config)
    rows = table(config)
    require_whole(check(checkpoint, stated, rows, block, mtp=mtp), checkpoint, stated)
    if dtype == "float8" and block not in (None, fp8.BLOCK):
        raise ValueError(f"{checkpoint.folder}: FP8 blocks are {block}: only {fp8.BLOCK} are written")
    if dtype == "float8" and block is not None and ue8m0:
        raise ValueError("ue8m0 = True: this checkpoint is in FP8 already, and its scales are kept: leave ue8m0 out")
    kinds = {name: row for row in rows for _, name in row.names()}
    scales = {scale_name(name) for name in kinds}
    modules = range(stated.num_hidden_layers, stated.num_hidden_layers + stated.num_nextn_predict_layers)
    left_out = () if mtp else tuple(f"model.layers.{layer}." for layer in modules)
    names = [
        name
        for name in sorted(checkpoint.tensors, key=lambda name: place_in_file(name, config.num_hidden_layers))
        if name not in scales and not is_angles(name) and not (left_out and name.startswith(left_out))
    ]
    planned: list[Planned] = []
    for name in names:
        info, row = checkpoint.tensors[name], kinds.get(name)
        on_disk = ON_DISK[dtype]
        if row is not None and row.leaf.startswith("router/"):
            on_disk = "F32"
        elif row is not None and row.fp8 and dtype == "float8" and (block is None or info.dtype == FLOAT8):
            on_disk = FLOAT8
        planned.append(Planned(name, on_disk, info.shape))
        if on_disk == FLOAT8:
            planned.append(Planned(scale_name(name), "F32", fp8.scale_shape((info.shape[0], info.shape[1]))))
    stated_out = {**checkpoint.config, "torch_dtype": "bfloat16" if dtype == "float8" else dtype}
    stated_out.pop("dtype", None)
    if dtype != "float8":
        stated_out.pop("quantization_config", None)
    elif block is None:
        stated_out["quantization_config"] = quantization_to_hf(power_of_two=ue8m0)
    if not mtp:
        stated_out = {k: v for k, v in stated_out.items() if k != "num_mtp_layers"} | {"num_nextn_predict_layers": 0}

    folder = new_folder(path)
    with (
        storage.PartReader() as parts,
        Progress(f"write {folder.name}", sum(t.nbytes for t in planned), progress) as told,
    ):

        def whole(name: str) -> np.ndarray:
            return read_rows(parts, checkpoint.tensors[name])

        def arrays() -> Iterator[np.ndarray]:
            coming = iter(planned)
            for name in names:
                tensor, array = next(coming), whole(name)
                if array.dtype == fp8.FLOAT8 and tensor.dtype != FLOAT8:
                    array = fp8.dequantise(array, whole(scale_name(name)), DTYPES[tensor.dtype], block or fp8.BLOCK)
                if tensor.dtype == FLOAT8:
                    if array.dtype == fp8.FLOAT8:
                        new = whole(scale_name(name))
                    else:
                        array, new = fp8.quantise(array, power_of_two=ue8m0)
                    yield array
                    told(array.nbytes)
                    next(coming)
                    array = new
                else:
                    array = cast(array, tensor)
                yield array
                told(array.nbytes)

        write_tensors(folder, planned, arrays(), shard_bytes)
    write_tokenizer(folder, checkpoint.folder if tokenizer is None else tokenizer)
    write_config(folder, stated_out)
    return folder
