"""DeepSeek-V2 (arXiv 2405.04434, section 3.1.2): 8.1T tokens at 4K, plain RoPE; YaRN comes with the extension.

AdamW 0.9 / 0.95, decay 0.1, clipping at 1; 2,000 steps of warm-up, then the rate times 0.316 at 60 % and again at 90 % of
the tokens. The batch grows from 2,304 to 9,216 sequences over the first 225B tokens; the paper does not print the shape
of the growth. Bring the corpus and DeepSeek's tokenizer: `--data.sources.0.path`, `--data.tokenizer`.
"""

from dataclasses import replace

from deepseek_jax import get_config as member
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import ArrayRecord
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training import BatchRamp, MultiStep, RunConfig


def get_config() -> RunConfig:
    model = member("deepseek-v2")
    return RunConfig(
        model=replace(model, rope=replace(model.rope, scaling=None), max_position_embeddings=4096),
        data=DataConfig(sources=(ArrayRecord(path="data/corpus"),), tokenizer="data/tokenizer.json"),
        schedule=MultiStep(peak=2.4e-4, milestones=(0.6, 0.9), factors=(0.316, 0.316**2)),
        train_tokens=8_100_000_000_000,
        batch_size=9216,
        batch_ramp=BatchRamp(start=2304, tokens=225_000_000_000, increment=2304),
        accumulation=4,
        seq_len=4096,
        mesh=MeshConfig(data=1, fsdp=-1),
        eval_every=1000,
        checkpoint_every=1000,
    )
