"""DeepSeek-V3's first context extension (arXiv 2412.19437, section 4.3): 4K to 32K, 1,000 steps.

YaRN on the decoupled key, s = 40, alpha 1, beta 32; the rate stays at 7.3e-6, where pre-training ended; the selection
bias stays as it is. The weights come from `init_from`.
"""

from pathlib import Path

from deepseek_jax import get_config as member
from deepseek_jax.cli.train import load_config
from deepseek_jax.training import RunConfig, extended


def get_config() -> RunConfig:
    return extended(
        load_config(Path(__file__).with_name("deepseek_v3.py")),
        rope=member("deepseek-v3").rope,
        init_from="runs/deepseek_v3",
        seq_len=32768,
        batch_size=1920,
        steps=1000,
        learning_rate=7.3e-6,
    )
