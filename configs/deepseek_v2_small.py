"""DeepSeek-V2's recipe on v2-nano, 200 steps on the source code of Python's standard library: the same shape, small."""

from dataclasses import replace
from pathlib import Path

from deepseek_jax import get_config as member
from deepseek_jax.cli.train import load_config
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import PythonStdlib
from deepseek_jax.training import RunConfig, scaled_down


def get_config() -> RunConfig:
    model = member("deepseek-v2-nano")
    model = replace(model, rope=replace(model.rope, scaling=None))
    return scaled_down(
        load_config(Path(__file__).with_name("deepseek_v2.py")),
        model=model,
        data=DataConfig(sources=(PythonStdlib(max_bytes=10_000_000),), vocab_size=2048),
        steps=200,
        batch_size=16,
        seq_len=256,
        peak=3e-3,
        warmup_steps=20,
    )
