"""DeepSeek-V2-Lite (arXiv 2405.04434, appendix B): 5.7T tokens at 4K, plain RoPE; YaRN comes with the extension.

AdamW 0.9 / 0.95, decay 0.1, clipping at 1; 2,000 steps of warm-up, then the rate times 0.316 at 80 % and again at 90 % of
the tokens; a constant batch. Bring the corpus and DeepSeek's tokenizer: `--data.sources.0.path`, `--data.tokenizer`.
"""

from dataclasses import replace

from deepseek_jax import get_config as member
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import ArrayRecord
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training import MultiStep, RunConfig


def get_config() -> RunConfig:
    model = member("deepseek-v2-lite")
    return RunConfig(
        model=replace(model, rope=replace(model.rope, scaling=None), max_position_embeddings=4096),
        data=DataConfig(sources=(ArrayRecord(path="data/corpus"),), tokenizer="data/tokenizer.json"),
        schedule=MultiStep(peak=4.2e-4, milestones=(0.8, 0.9), factors=(0.316, 0.316**2)),
        train_tokens=5_700_000_000_000,
        batch_size=4608,
        seq_len=4096,
        mesh=MeshConfig(data=1, fsdp=-1),
        eval_every=1000,
        checkpoint_every=1000,
    )
