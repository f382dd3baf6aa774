"""`load_hf`: a published checkpoint as a model and its variables, straight into their final shards.

Leaf by leaf, shard by shard, tensor by tensor: what exists on the host beside the devices' own arrays is one shard of
one stacked leaf and a few strips of rows. Nothing is left out: what the configuration does not explain is an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from deepseek_jax import storage
from deepseek_jax.config import GQA, ModelConfig
from deepseek_jax.interop import fp8, layout
from deepseek_jax.interop.check import check, is_angles, require_whole
from deepseek_jax.interop.headers import DTYPES, FLOAT8, Checkpoint, TensorInfo, open_folder
from deepseek_jax.interop.hf_config import config_from_hf, quantization_of
from deepseek_jax.interop.names import copies, table
from deepseek_jax.interop.progress import Progress
from deepseek_jax.interop.reading import read_rows
from deepseek_jax.interop.rows import Row, scale_name, scale_rows
from deepseek_jax.layers.rope import inverse_frequencies
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import Weight, tree_shardings

_STRIP_BYTES = 4 * 2**20  # of a tensor handled at once
_CLOUD_THREADS = 16  # requests under way at once

LoadDtype = Literal["float32", "bfloat16", "float16", "float8"]


def load_hf(
    path: storage.AnyPath,
    dtype: LoadDtype = "float32",
    mesh: Mesh | None = None,
    *,
    mtp: bool = True,
    progress: bool | None = None,
) -> tuple[DeepSeek, dict[str, Any]]:
    """Reads a published checkpoint: llama, qwen2, deepseek (MoE 16B), deepseek_v2, deepseek_v3; safetensors only.

    Args:
        path: folder with config.json and *.safetensors, local or gs://.
        dtype: of parameters and of the model's compute; FP8 blocks are dequantised to it, selection biases stay
            float32. "float8" keeps what is on disk, bit for bit: FP8 values as float8_e4m3fn leaves, their scales in a
            collection `scales`, the rest in the file's dtype. Such variables are for exchange (`save_hf`): the model
            does not compute with them.
        mesh: where the variables go, each leaf in its shards by `parallel/rules.py`; None: this process's first device.
        mtp: False leaves multi-token modules out, and gives a model without them.
        progress: whether the bytes read are shown on stderr; None: in the first process.

    Returns:
        The model and `{"params": …}`, with `router` where the gates have selection biases. Each process reads what its
        own devices hold. From gs://, a shard that is a part of a matrix's columns costs all bytes of its rows.

    Raises:
        ValueError: files that do not add up, a configuration that is not understood, or tensors missing, left over, of
            the wrong shape or dtype; all are listed.
    """
    if dtype not in ("float32", "bfloat16", "float16", "float8"):
        raise ValueError(f"dtype = {dtype!r}: must be 'float32', 'bfloat16', 'float16' or 'float8'")
    checkpoint = open_folder(path)
    keep = dtype == "float8"
    name = checkpoint.folder.name
    stated = config_from_hf(checkpoint.config, name=name, dtype="bfloat16" if keep else dtype)
    config = stated if mtp else dataclasses.replace(stated, num_nextn_predict_layers=0)
    block = quantization_of(checkpoint.config)
    if keep and block is None:
        raise ValueError(f"dtype = 'float8': {checkpoint.folder} is not in FP8; load it in 'bfloat16'")
    rows = table(config)
    require_whole(check(checkpoint, stated, rows, block, mtp=mtp), checkpoint, stated)
    shardings = _shardings(config, mesh)
    if keep:
        quantised = [row for row in rows if checkpoint.tensors[next(row.names())[1]].dtype == FLOAT8]
        rows = rows + scale_rows(quantised, block or fp8.BLOCK)
    if progress is None:
        progress = jax.process_index() == 0
    total = sum(checkpoint.tensors[n].nbytes for n in {n for row in rows for _, n in row.names()})
    variables: dict[str, Any] = {}
    local = storage.is_local(checkpoint.folder)
    with (
        storage.PartReader() as parts,
        Progress(f"load {name}", total, progress) as told,
        ThreadPoolExecutor(max(2, os.cpu_count() or 1) if local else _CLOUD_THREADS) as pool,
    ):
        loader = _Loader(checkpoint, parts, pool, told, block)
        _require_copies(loader, config)
        if isinstance(config.attention, GQA):
            _require_angles(loader, config)
        for row in rows:
            wide = row.leaf.startswith("router/")
            kind = loader.kept_dtype(row) if keep else np.dtype("float32" if wide else config.param_dtype)
            array = loader.leaf(row, kind, shardings.get(row.leaf, _everywhere(mesh)))
            node = variables
            *parents, last = row.leaf.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = array
    return DeepSeek(config), variables


class _Loader:
    """Makes leaves from tensors."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: storage.PartReader,
        pool: ThreadPoolExecutor,
        told: Progress,
        block: tuple[int, int] | None,
    ):
        self.checkpoint, self.parts, self.pool = checkpoint, parts, pool
        self._told, self._block, self._decode = told, block, fp8.Decoder()

    def kept_dtype(self, row: Row) -> np.dtype:
        """The dtype that all tensors of a leaf have on disk."""
        found = {self.checkpoint.tensors[name].dtype for _, name in row.names()}
        if len(found) != 1:
            raise ValueError(
                f"dtype = 'float8': {row.tensor} is {' in places, '.join(sorted(found))} in others; a leaf has one dtype"
            )
        return DTYPES[found.pop()]

    def leaf(self, row: Row, dtype: np.dtype, sharding: Sharding) -> jax.Array:
        """The leaf of this row, in its shards on this process's devices."""
        shape = row.leaf_shape
        devices: dict[tuple[layout.Span, ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            spans = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            devices.setdefault(spans, []).append(device)
        shards = []
        for spans, holders in devices.items():
            buffer = layout.aligned_empty([stop - start for start, stop in spans], dtype)
            self._fill(buffer, row, spans)
            shards += [jax.device_put(buffer, device) for device in holders]
            jax.block_until_ready(shards)  # so that no second buffer waits beside this one
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)

    def _fill(self, buffer: np.ndarray, row: Row, spans: Sequence[layout.Span]) -> None:
        """Writes the part `spans` of a leaf into `buffer`, which has its shape."""
        lead, row_spans, col_spans = layout.split_spans(row, spans)
        rows, cols = layout.places(row.rows, row_spans), layout.places(row.cols, col_spans)
        if not len(rows) or not len(cols):
            return

        def one(place: tuple[int, ...], strip: slice) -> None:
            inside = tuple(at - start for at, (start, _) in zip(place, lead, strict=True))
            shape = (len(cols), len(rows)) if row.swapped else (len(rows), len(cols))
            out = buffer[inside].reshape(shape)
            out = out[:, strip] if row.swapped else out[strip]
            self._strip(out, row.name(*place), rows[strip], cols, row.swapped)

        todo = []
        for place in itertools.product(*(range(start, stop) for start, stop in lead)):
            step = _strip_rows(self.checkpoint.tensors[row.name(*place)])
            todo += [(place, slice(start, start + step)) for start in range(0, len(rows), step)]
        list(self.pool.map(one, *zip(*todo, strict=True)))

    def _strip(self, out: np.ndarray, name: str, rows: np.ndarray, cols: np.ndarray, swapped: bool) -> None:
        """The given rows and columns of one tensor, as they are or transposed, into `out`."""
        info, wanted = self.checkpoint.tensors[name], layout.as_slice(cols)
        whole = len(cols) == math.prod(info.shape[1:])
        piece = read_rows(self.parts, info, rows, whole=whole).reshape(len(rows), -1)[:, wanted]
        if info.dtype == FLOAT8 and out.dtype != fp8.FLOAT8:
            assert swapped and self._block is not None  # every quantised tensor is a Linear's
            by_row = read_rows(self.parts, self.checkpoint.tensors[scale_name(name)])[rows // self._block[0]]
            if isinstance(wanted, slice):
                first, last = int(cols[0]) // self._block[1], int(cols[-1]) // self._block[1] + 1
                each, offset, length = by_row[:, first:last].T, int(cols[0]) % self._block[1], self._block[1]
            else:
                each, offset, length = by_row[:, cols // self._block[1]].T, 0, 1
            self._decode(piece, np.ascontiguousarray(each), offset, length, out)
        else:
            layout.copy(out, layout.transposed(piece) if swapped else piece)
        self._told(piece.nbytes)


def _strip_rows(info: TensorInfo) -> int:
    """Rows of a tensor that are handled at once: a multiple of a block's, so that few shapes are compiled."""
    return max(128, _STRIP_BYTES * info.shape[0] // max(info.nbytes, 1) // 128 * 128)


def _shardings(config: ModelConfig, mesh: Mesh | None) -> dict[str, Sharding]:
    """Leaf path -> sharding; empty without a mesh."""
    return {} if mesh is None else _named(tree_shardings(mesh, abstract_variables(config)))


def _named(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Weight))[0]
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in pairs}


def _everywhere(mesh: Mesh | None) -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, PartitionSpec())


def _require_copies(loader: _Loader, config: ModelConfig) -> None:
    """Tensors that repeat others must do so bit for bit, since they are not loaded; a process compares its share."""
    tensors = loader.checkpoint.tensors

    def same(ours: TensorInfo, theirs: TensorInfo, index: np.ndarray) -> bool:
        a, b = (read_rows(loader.parts, info, index).view(np.uint8) for info in (ours, theirs))
        return np.array_equal(a, b)

    for name, original in copies(config).items():
        if name not in tensors or original not in tensors:
            continue
        ours, theirs = tensors[name], tensors[original]
        step = _strip_rows(ours)
        strips = [np.arange(at, min(at + step, ours.shape[0])) for at in range(0, ours.shape[0], step)]
        mine = strips[jax.process_index() :: jax.process_count()]
        if not all(loader.pool.map(partial(same, ours, theirs), mine)):
            raise ValueError(
                f"{loader.checkpoint.folder}: {name} differs from {original}; the model shares one between them"
            )


def _require_angles(loader: _Loader, config: ModelConfig) -> None:
    """Tables of inverse frequencies, which old checkpoints carry, must be the ones that are computed here."""
    assert isinstance(config.attention, GQA)
    plain = dataclasses.replace(config.rope, scaling=None)  # the tables were written before scaling was applied
    expected = inverse_frequencies(plain, config.attention.head_dim)
    for name, info in loader.checkpoint.tensors.items():
        if is_angles(name):
            table = read_rows(loader.parts, info).astype(np.float64)
            if table.shape != expected.shape or not np.allclose(table, expected, rtol=1e-2):
                raise ValueError(f"{loader.checkpoint.folder}: {name} is not what rope_theta = {plain.theta} gives")
