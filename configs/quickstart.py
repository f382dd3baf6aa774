"""A V3-nano on the source code of Python's own standard library: minutes on two CPU cores, no download.

MLA, one dense layer and then experts with a shared one, group-limited routing balanced without a loss, multi-token
prediction: everything that makes V3, small.
"""

from deepseek_jax import get_config as model
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import PythonStdlib
from deepseek_jax.training import MultiStep, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=model("deepseek-v3-nano"),
        data=DataConfig(
            sources=(PythonStdlib(max_bytes=10_000_000),), vocab_size=2048, tokenizer_sample_bytes=3_000_000
        ),
        schedule=MultiStep(peak=4e-3, warmup_steps=20),
        steps=150,
        batch_size=8,
        seq_len=256,
        bias_update_speed=0.003,
        eval_sequences=48,
        checkpoint_every=50,
        sample_prompts=("def ", "import ", "class Test"),
        sample_tokens=48,
    )
