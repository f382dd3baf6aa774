"""GB/s of `load_hf` against a plain read by the safetensors library, and the host memory that it takes.

    python benchmarks/load_hf.py [--gigabytes 4] [--folder DIR] [--dtypes float8,bfloat16] [--rounds 3]

A checkpoint in V3's form, FP8 blocks with random values, is made on the spot. Each reading is a process of its own, in
turns: plain, each dtype, plain again. Cold means that the files' pages were dropped from the system's cache before, warm
that they were just read. `plain` copies every tensor into memory one after the other and keeps them all, as `load_hf`
does; `plain-dropped` lets go of each, so that it needs no memory of its own. `extra` is the peak of the process's memory
over what it had before loading and over the arrays themselves, which stand in host memory on a CPU; `bound` is 2 × the
largest stacked leaf + 1 GiB. Prints a line of JSON a reading, then medians with their spread. The plain read needs torch,
as the library's numpy side knows no FP8.
"""

import argparse
import json
import os
import statistics
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


def prepare(folder: Path, cache: str) -> None:
    """Brings the system's cache and memory into a known state, just before the clock starts.

    A virtual machine gives memory that is free for some seconds back to its host, and gets it again several times slower
    than memory is. So as much as will be needed is touched and let go of first, or that would be all that is measured.
    """
    if cache == "as-is":
        return
    files = sorted(folder.glob("*.safetensors"))
    drop_cache(folder)
    if cache == "warm":
        for file in files:
            with file.open("rb") as stream:
                while stream.read(2**24):
                    pass
    touched = np.empty(5 * sum(file.stat().st_size for file in files) // 2, np.uint8)
    touched[::4096] = 1
    del touched
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew


def plain(folder: Path, cache: str, keep: bool) -> dict[str, Any]:
    """Every tensor, copied out of the file's map, one after the other."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    prepare(folder, cache)
    kept, start = [], time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, a reader is no dict
                copy = tensors.get_tensor(name).clone()
                if keep:
                    kept.append(copy)
    return {"seconds": time.perf_counter() - start}


def load(folder: Path, cache: str, dtype: str) -> dict[str, Any]:
    """`load_hf`, with the memory it took."""
    import jax

    from deepseek_jax.interop.load import load_hf

    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    prepare(folder, cache)
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


def measure(folder: Path, what: str, cache: str) -> dict[str, Any]:
    """One reading in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, "--caches", cache, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    gigabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    rate = {"what": what, "cache": cache, "gb": round(gigabytes, 2)}
    return rate | {"gb_per_s": round(gigabytes / result["seconds"], 3), "load": os.getloadavg()[0]} | result


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Median and spread of each kind of reading, and its ratio to the plain read of its own round."""
    lines, rates = [], {}
    for result in results:
        rates.setdefault((result["cache"], result["what"]), []).append(result["gb_per_s"])
    for (cache, what), found in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(found, rates[cache, "plain"], strict=True)]
        line = f"{cache} {what}: {statistics.median(found):.2f} GB/s ({min(found):.2f} to {max(found):.2f})"
        lines.append(f"{line}, of plain {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept (default: a temporary one)")
    parser.add_argument("--dtypes", default="float8,bfloat16")
    parser.add_argument("--caches", default="cold,warm", help="cold, warm, or as-is, which prepares nothing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-plain", action="store_true", help="only `load_hf`: torch is not needed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        plainly = {"plain": True, "plain-dropped": False}
        what, where = options.measure, (options.folder, options.caches)
        print(json.dumps(plain(*where, plainly[what]) if what in plainly else load(*where, what)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "checkpoint"
        if not (folder / "config.json").exists():
            make_checkpoint(folder, options.gigabytes)
        results = []
        peers = () if options.no_plain else ("plain", "plain-dropped")
        for cache in options.caches.split(","):
            for _ in range(options.rounds):
                for what in (*peers, *options.dtypes.split(",")):
                    results.append(measure(folder, what, cache))
                    print(json.dumps(results[-1]), flush=True)
        if peers:
            print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
