"""DeepSeekMoE 16B (arXiv 2401.06066, section 5.1): 2T tokens.

AdamW 0.9 / 0.95, decay 0.1, clipping at 1; 2,000 steps of warm-up, then the rate times 0.316 at 80 % and again at 90 % of
the tokens. The paper says 4.5K sequences and 18M tokens a batch, and 106,449 steps (4,587 sequences); 4,608 is taken for
4.5K, which gives 105,964 steps.
Bring the corpus and DeepSeek's tokenizer: `--data.sources.0.path`, `--data.tokenizer`.
"""

from deepseek_jax import get_config as model
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import ArrayRecord
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training import MultiStep, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=model("deepseek-moe-16b"),
        data=DataConfig(sources=(ArrayRecord(path="data/corpus"),), tokenizer="data/tokenizer.json"),
        schedule=MultiStep(peak=4.2e-4, milestones=(0.8, 0.9), factors=(0.316, 0.316**2)),
        train_tokens=2_000_000_000_000,
        batch_size=4608,
        seq_len=4096,
        mesh=MeshConfig(data=1, fsdp=-1),
        eval_every=1000,
        checkpoint_every=1000,
    )
