"""Tokens a second of the data pipeline, and the seconds that resuming takes.

    python benchmarks/data_pipeline.py [--seq-len 256] [--batch-size 8] [--seconds 3]

Two sources of random ids on disk are mixed 3 to 1 and read as windows through Grain, as a run reads them: memory maps,
shuffled each epoch, with and without `segment_ids`. Then a new iterator is set to step 1,000,000 and gives a batch.
At last, text is encoded, with and without fill in the middle. No accelerator is used.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.dataset import load
from deepseek_jax.data.pipeline import Mixture, TokenSource, batches
from deepseek_jax.data.sources import PythonStdlib
from deepseek_jax.storage import map_array, save_array

EOS = 1


def mixture(folder: Path, seq_len: int, n_tokens: int, cross_document_attention: bool) -> Mixture:
    sources = []
    for number, length in enumerate((n_tokens, n_tokens // 5)):
        ids = np.random.default_rng(number).integers(2, 4096, length, dtype=np.uint16)
        ids[::700] = EOS
        array = map_array(save_array(folder / f"{number}.npy", ids))
        window: Any = {"eos_id": EOS, "cross_document_attention": cross_document_attention}
        sources.append(TokenSource(array, seq_len, **window))
    return Mixture(sources, [3.0, 1.0])


def tokens_a_second(source: Mixture, batch_size: int, seconds: float) -> float:
    iterator = batches(source, batch_size, seed=0)
    next(iterator)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += next(iterator)["tokens"][:, 1:].size
    return count / (time.perf_counter() - start)


def resume_seconds(source: Mixture, batch_size: int, step: int) -> float:
    start = time.perf_counter()
    iterator = batches(source, batch_size, seed=0)
    iterator.set_state({"next_index": step})
    next(iterator)
    return time.perf_counter() - start


def encoding_rate(folder: Path, **fields: Any) -> tuple[float, float]:
    """(MB of text a second, tokens a second) of `load` with a trained tokenizer and no encoded tokens."""
    config = DataConfig(sources=(PythonStdlib(max_bytes=8_000_000),), cache_dir=str(folder), **fields)
    load(config, 256, None, progress=False)  # trains the tokenizer
    (encoded,) = (folder / "tokens").iterdir()
    for file in encoded.iterdir():
        file.unlink()
    start = time.perf_counter()
    data = load(config, 256, None, progress=False)
    seconds = time.perf_counter() - start
    splits = data.files["python-stdlib"].splits.values()
    return sum(s.text_bytes for s in splits) / 1e6 / seconds, sum(s.tokens for s in splits) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-tokens", type=int, default=50_000_000)
    args = parser.parse_args()

    print(f"{platform.machine()}, {os.cpu_count()} cores, batch {args.batch_size} x {args.seq_len}, two sources 3:1\n")
    print("| what | median | smallest | largest |\n|---|---|---|---|")

    def row(what: str, values: list[float], form: str) -> None:
        figures = (statistics.median(values), min(values), max(values))
        print(f"| {what} | " + " | ".join(form.format(figure) for figure in figures) + " |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for crossing in (True, False):
            source = mixture(Path(folder), args.seq_len, args.n_tokens, crossing)
            kind = "no masking" if crossing else "segment_ids"
            rates = [tokens_a_second(source, args.batch_size, args.seconds) for _ in range(args.repeats)]
            row(f"reading, {kind}, tokens/s", rates, "{:,.0f}")
            times = [resume_seconds(source, args.batch_size, 1_000_000) for _ in range(args.repeats)]
            row(f"to the first batch after resuming at step 1,000,000, {kind}, s", times, "{:.4f}")
    for kind, fields in (
        ("as it is", {}),
        ("fim_rate 0.1, split_punctuation_rate 0.1", {"fim_rate": 0.1, "split_punctuation_rate": 0.1}),
        ("bytes", {"tokenizer": "bytes"}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            megabytes, tokens = encoding_rate(Path(folder), **fields)
            row(f"reading and encoding 8 MB of code, {kind}, MB/s", [megabytes], "{:.2f}")
            row(f"the same in tokens/s, {kind}", [tokens], "{:,.0f}")


if __name__ == "__main__":
    main()
