"""DeepSeek-V3 (arXiv 2412.19437, section 4.2): 14.8T tokens at 4K, plain RoPE; then deepseek_v3_32k.py and _128k.py.

AdamW 0.9 / 0.95, decay 0.1, moments in bfloat16, clipping at 1. The rate: 2,000 steps of warm-up to 2.2e-4, constant to
10T tokens, a cosine to 2.2e-5 over 4.3T, 2.2e-5 for 333B and 7.3e-6 for 167B. The batch grows from 3,072 to 15,360
sequences over the first 469B tokens; the paper does not print the shape of the growth, nor the share of merged
punctuation that is split, nor the decay of the weights' running mean. FIM at 0.1 of the documents; documents in a
window see each other. Bring the corpus and DeepSeek's tokenizer: `--data.sources.0.path`, `--data.tokenizer`.
"""

from dataclasses import replace

from deepseek_jax import get_config as member
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import ArrayRecord
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.training import AdamW, BatchRamp, ByTokens, Phase, Phases, RunConfig

T, B = 10**12, 10**9


def get_config() -> RunConfig:
    model = member("deepseek-v3")
    return RunConfig(
        model=replace(model, rope=replace(model.rope, scaling=None), max_position_embeddings=4096, remat="v3"),
        data=DataConfig(
            sources=(ArrayRecord(path="data/corpus"),),
            tokenizer="data/tokenizer.json",
            fim_rate=0.1,
            split_punctuation_rate=0.1,
        ),
        schedule=Phases(
            peak=2.2e-4,
            phases=(
                Phase(tokens=10 * T, factor=1.0),
                Phase(tokens=4_300 * B, factor=0.1, shape="cosine"),
                Phase(tokens=333 * B, factor=0.1),
                Phase(tokens=167 * B, factor=7.3 / 220),
            ),
        ),
        optimizer=AdamW(moment_dtype="bfloat16"),
        train_tokens=14_800 * B,
        batch_size=15360,
        batch_ramp=BatchRamp(start=3072, tokens=469 * B, increment=3072),
        accumulation=5,
        seq_len=4096,
        mtp_loss_weight=ByTokens(values=(0.3, 0.1), boundaries=(10 * T,)),
        bias_update_speed=ByTokens(values=(0.001, 0.0), boundaries=(14_300 * B,)),
        ema_decay=0.999,
        mesh=MeshConfig(data=1, fsdp=-1),
        eval_every=1000,
        checkpoint_every=1000,
    )
