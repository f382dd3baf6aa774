"""DeepSeek LLM 67B (arXiv 2401.02954, section 2.3): 2T tokens, grouped-query attention.

AdamW 0.9 / 0.95, decay 0.1, clipping at 1; 2,000 steps of warm-up, then the rate falls to 31.6 % at 80 % and to 10 % at
90 % of the tokens. Bring the corpus and DeepSeek's tokenizer: `--data.sources.0.path`, `--data.tokenizer`.
"""

from deepseek_jax import get_config as model
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import ArrayRecord
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training import MultiStep, RunConfig


def get_config() -> RunConfig:
    return RunConfig(
        model=model("deepseek-llm-67b"),
        data=DataConfig(sources=(ArrayRecord(path="data/corpus"),), tokenizer="data/tokenizer.json"),
        schedule=MultiStep(peak=3.2e-4),
        train_tokens=2_000_000_000_000,
        batch_size=4608,
        seq_len=4096,
        mesh=MeshConfig(data=1, fsdp=-1),
        eval_every=1000,
        checkpoint_every=1000,
    )
