"""GB/s of `load_hf` against a plain read by the safetensors library, and the host memory that it takes.

    python benchmarks/load_hf.py [--gigabytes 4] [--folder DIR] [--dtypes float8,bfloat16]

A checkpoint in V3's form, FP8 blocks with random values, is made on the spot. Each reading is a process of its own,
cold (the files' pages dropped from the system's cache before) and warm (after a reading). `extra` is the peak of the
process's memory over what it had before loading and over the arrays themselves, which stand in host memory on a CPU;
`bound` is 2 × the largest stacked leaf + 1 GiB. Prints a line of JSON a reading. The plain read needs torch, as the
library's numpy side knows no FP8.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Random FP8 values and scales under V3's names, about so many bytes."""
    import ml_dtypes

    from deepseek_jax.interop.headers import DTYPES, FLOAT8
    from deepseek_jax.interop.hf_config import config_from_hf, config_to_hf, quantization_to_hf
    from deepseek_jax.interop.names import copies, table
    from deepseek_jax.interop.rows import scale_rows
    from deepseek_jax.interop.writing import Planned, new_folder, write_config, write_tensors
    from deepseek_jax.models.registry import get_config

    experts = 64 if gigabytes >= 0.5 else 8
    published = config_to_hf(get_config("deepseek-v3")) | dict(
        hidden_size=2048, moe_intermediate_size=1024, n_routed_experts=experts, n_group=4, topk_group=2,
        num_hidden_layers=2, first_k_dense_replace=1,
        intermediate_size=4096, vocab_size=16384, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=512,
        num_experts_per_tok=4, num_nextn_predict_layers=1,
    )  # fmt: skip
    layer = experts * 3 * 2048 * 1024
    published["num_hidden_layers"] = 1 + max(1, round(gigabytes * 1e9 / layer) - 1)
    config = config_from_hf(published)
    rows = table(config)
    planned = {}
    for row in (*rows, *scale_rows(rows, (128, 128))):
        dtype = FLOAT8 if row.fp8 else "F32" if row.leaf.split("/")[0] in ("router", "scales") else "BF16"
        planned |= {name: Planned(name, dtype, row.tensor_shape) for _, name in row.names()}
    for name, original in copies(config).items():
        planned[name] = Planned(name, "BF16", planned[original].shape)
    draw = np.random.default_rng(0)
    pool = draw.integers(0, 127, 2**24, dtype=np.uint8)  # repeated: the values do not matter, the speed of making does

    def array(tensor: Planned) -> np.ndarray:
        count = int(np.prod(tensor.shape))
        if tensor.dtype == FLOAT8:
            return np.resize(pool, count).view(ml_dtypes.float8_e4m3fn).reshape(tensor.shape)
        return np.full(tensor.shape, 1e-3, DTYPES[tensor.dtype])

    new_folder(folder)
    write_tensors(folder, list(planned.values()), map(array, planned.values()))
    write_config(folder, published | {"quantization_config": quantization_to_hf(power_of_two=False)})


def drop_cache(folder: Path) -> None:
    """Asks the system to forget the files' pages."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def settle(n_bytes: int) -> None:
    """Touches so much memory and gives it back: a virtual machine gets what it has not used lately from its host, many
    times slower than memory is, and that would be all that is measured."""
    touched = np.empty(n_bytes, np.uint8)
    touched[::4096] = 1


def plain(folder: Path) -> dict[str, Any]:
    """Every tensor, copied out of the file's map, one after the other."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, a reader is no dict
                tensors.get_tensor(name).clone()
    return {"seconds": time.perf_counter() - start}


def load(folder: Path, dtype: str) -> dict[str, Any]:
    """`load_hf`, with the memory it took."""
    import jax

    from deepseek_jax.interop.load import load_hf

    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    before, start = memory("VmRSS"), time.perf_counter()
    _, variables = load_hf(folder, dtype, progress=False)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(variables)
    largest, total = max(leaf.nbytes for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
    extra = memory("VmHWM") - before - total
    return {
        "seconds": seconds, "extra_gib": round(extra / GIB, 2), "bound_gib": round((2 * largest + GIB) / GIB, 2),
        "largest_leaf_gib": round(largest / GIB, 2), "arrays_gib": round(total / GIB, 2),
    }  # fmt: skip


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def measure(folder: Path, what: str, cold: bool) -> dict[str, Any]:
    """One reading in a process of its own."""
    settle(3 * sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    if cold:
        drop_cache(folder)
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    rate = {"what": what, "cache": "cold" if cold else "warm", "gb": round(gigabytes, 2)}
    return rate | {"gb_per_s": round(gigabytes / result["seconds"], 3)} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept (default: a temporary one)")
    parser.add_argument("--dtypes", default="float8,bfloat16")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(
            json.dumps(plain(options.folder) if options.measure == "plain" else load(options.folder, options.measure))
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "checkpoint"
        if not (folder / "config.json").exists():
            make_checkpoint(folder, options.gigabytes)
        rates: dict[str, float] = {}
        for cache in ("cold", "warm"):
            for what in ("plain", *options.dtypes.split(",")):
                result = measure(folder, what, cache == "cold")
                rates[f"{cache} {what}"] = result["gb_per_s"]
                result["of_plain"] = round(result["gb_per_s"] / rates[f"{cache} plain"], 2)
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
