"""How large the experiment is: models, data and budgets of each size."""

from dataclasses import dataclass
from pathlib import Path

from deepseek_jax import chat
from deepseek_jax.config import GQA, MLA, Dense, ModelConfig, MoE, Rope
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import Jsonl, PythonStdlib
from deepseek_jax.training import MultiStep, RunConfig

PROMPT, ANSWER = 40, 64
"""Tokens of a prompt with its template, and of an answer, at most."""


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Of one model."""

    steps: int
    seconds: float
    """So long after the first look at the gate it ends, whatever that says."""
    batch: int
    peak: float
    gate: float = 0.9
    """It ends where so many of the answers that write their steps, at temperature 1, are right."""
    every: int = 200
    """Steps between two looks at the gate."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Everything that differs between a laptop, a GPU and a test."""

    documents: int
    problems: int
    stdlib_bytes: int
    vocab: int
    dtype: str
    teacher: Pretraining
    student: Pretraining
    width: int
    """Of the teacher's hidden state; layers, experts and the student follow it below."""
    layers: int
    experts: int
    seq_len: int = 256
    prompts: int = 32
    samples: int = 8
    slots: int = 256
    rate: float = 1e-4
    """Of reinforcement learning of the teacher; the student's is twice that."""
    zero_steps: int = 40
    reasoning_steps: int = 25
    all_steps: int = 20
    student_steps: int = 60
    policy_steps: int = 20
    """Of on-policy distillation."""
    ask: int = 1024
    """Problems of each rejection sampling."""
    at_least: float = 1.0
    cold: int = 600
    """Conversations of the cold start, at least: where R1-Zero gives fewer, written ones fill up."""
    sft_batch: int = 16
    sft_steps: int = 100
    student_sft_steps: int = 200
    reward_steps: int = 60
    test: int = 256
    """Held-out problems of each part, greedily answered."""


SIZES = {
    "gpu": Size(
        documents=80_000, problems=12_000, stdlib_bytes=6_000_000, vocab=2048, dtype="bfloat16", width=256, layers=5,
        experts=16,
        teacher=Pretraining(steps=2400, seconds=55, batch=64, peak=1e-3),
        student=Pretraining(steps=3000, seconds=45, batch=64, peak=2e-3),
    ),
    "cpu": Size(
        documents=30_000, problems=4_000, stdlib_bytes=1_000_000, vocab=1024, dtype="float32", width=96, layers=3,
        experts=8,
        teacher=Pretraining(steps=3000, seconds=1500, batch=16, peak=2e-3),
        student=Pretraining(steps=3000, seconds=600, batch=16, peak=3e-3),
        samples=8, prompts=16, slots=128, rate=2e-4, ask=256, cold=300, test=96, student_sft_steps=120,
    ),
    "micro": Size(
        documents=400, problems=400, stdlib_bytes=100_000, vocab=400, dtype="float32", width=32, layers=2, experts=4,
        teacher=Pretraining(steps=20, seconds=20, batch=4, peak=3e-3, every=20),
        student=Pretraining(steps=20, seconds=20, batch=4, peak=3e-3, every=20),
        seq_len=128, prompts=4, samples=2, slots=8, zero_steps=1, reasoning_steps=1, all_steps=1, student_steps=1,
        policy_steps=1, ask=8, at_least=-1.0, cold=40, sft_batch=4, sft_steps=4, student_sft_steps=4, reward_steps=2,
        test=4,
    ),
}  # fmt: skip


def teacher_model(size: Size) -> ModelConfig:
    """DeepSeek-V3, small: MLA, one dense layer, then routed experts in groups beside a shared one, sigmoid gates."""
    width, heads = size.width, max(size.width // 32, 2)
    return ModelConfig(
        name="v3-teacher", vocab_size=size.vocab, hidden_size=width, num_hidden_layers=size.layers,
        attention=MLA(
            num_attention_heads=heads, q_lora_rank=width * 3 // 4, kv_lora_rank=width // 2, qk_nope_head_dim=32,
            qk_rope_head_dim=16, v_head_dim=32,
        ),
        ffn=MoE(
            intermediate_size=3 * width, moe_intermediate_size=width, n_routed_experts=size.experts, n_shared_experts=1,
            num_experts_per_tok=4 if size.experts > 8 else 2, first_k_dense_replace=1, scoring_func="sigmoid",
            topk_method="noaux_tc", n_group=4 if size.experts > 8 else 2, topk_group=2 if size.experts > 8 else 1,
            norm_topk_prob=True, routed_scaling_factor=2.5, sequence_loss_alpha=0.0001,
        ),
        rope=Rope(interleaved=True), max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        initializer_range=0.04, dtype=size.dtype,  # type: ignore[arg-type]
    )  # fmt: skip


def student_model(size: Size) -> ModelConfig:
    """DeepSeek LLM, smaller still: dense, with the teacher's vocabulary."""
    width = size.width * 3 // 4
    return ModelConfig(
        name="dense-student", vocab_size=size.vocab, hidden_size=width, num_hidden_layers=max(size.layers - 1, 2),
        attention=GQA(num_attention_heads=max(width // 32, 1), num_key_value_heads=max(width // 32, 1), head_dim=32),
        ffn=Dense(intermediate_size=8 * width // 3 // 8 * 8), rope=Rope(), max_position_embeddings=256, bos_token_id=0,
        eos_token_id=1, initializer_range=0.04, dtype=size.dtype,  # type: ignore[arg-type]
    )  # fmt: skip


def base_run(size: Size, model: ModelConfig, how: Pretraining, data: Path, seed: int) -> RunConfig:
    """Pre-training of a base model on the corpus and some of Python's own library."""
    return RunConfig(
        model=model,
        data=DataConfig(
            sources=(
                Jsonl(path=str(data / "corpus.jsonl"), weight=0.9),
                PythonStdlib(max_bytes=size.stdlib_bytes, weight=0.1),
            ),
            vocab_size=size.vocab, extra_tokens=chat.TOKENS, tokenizer_sample_bytes=3_000_000, held_out_fraction=0.01,
            cross_document_attention=False, cache_dir=str(data / "cache"),
        ),
        schedule=MultiStep(
            peak=how.peak, warmup_steps=min(100, how.steps // 4), milestones=(0.6, 0.85), factors=(0.4, 0.15)
        ),
        steps=how.steps, batch_size=how.batch, seq_len=size.seq_len, bias_update_speed=0.003, seed=seed,
        log_every=100, eval_every=how.every, eval_sequences=16, checkpoint_every=10**6, verify_checkpoints="off",
    )  # fmt: skip
