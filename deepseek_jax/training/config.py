"""What a training run is: model, data, recipe, mesh. A config file's `get_config()` returns a `RunConfig`."""

from dataclasses import dataclass, field

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.data.config import DataConfig
from deepseek_jax.parallel.mesh import MeshConfig


@dataclass(frozen=True, kw_only=True)
class MultiStep:
    """Linear warm-up, then a constant rate that drops at given shares of the run (DeepSeek LLM, section 2.3)."""

    peak: float
    """Learning rate after warm-up."""
    warmup_steps: int = 2000
    milestones: tuple[float, ...] = (0.8, 0.9)
    """Shares of all steps at which the rate changes."""
    factors: tuple[float, ...] = (0.316, 0.1)
    """Rate over `peak` from each milestone on."""

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "MultiStep", name, getattr(self, name), remedy)

        check(self.peak > 0, "peak", "must be greater than 0")
        check(self.warmup_steps >= 0, "warmup_steps", "must not be negative")
        check(
            list(self.milestones) == sorted(self.milestones) and all(0 < m < 1 for m in self.milestones),
            "milestones", "must rise and lie between 0 and 1",
        )  # fmt: skip
        check(len(self.factors) == len(self.milestones), "factors", f"needs one per milestone: {self.milestones}")
        check(all(factor > 0 for factor in self.factors), "factors", "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with decoupled decay of weights (not of norms and biases) and clipping, as in all papers of the line."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, "AdamW", name, getattr(self, name), "must be in [0, 1)")
        require(self.eps > 0, "AdamW", "eps", self.eps, "must be greater than 0")
        require(self.weight_decay >= 0, "AdamW", "weight_decay", self.weight_decay, "must not be negative")
        require(self.clip_norm > 0, "AdamW", "clip_norm", self.clip_norm, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run."""

    model: ModelConfig
    schedule: MultiStep
    steps: int
    batch_size: int
    """Sequences of an optimizer step, over all devices and accumulation steps."""
    seq_len: int
    """Tokens of a sequence."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: AdamW = field(default_factory=AdamW)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    accumulation: int = 1
    """Pieces in which a step's batch is worked off; the result does not depend on it."""
    mtp_loss_weight: float = 0.3
    """λ of the multi-token loss (V3 section 4.2: 0.3, then 0.1)."""
    bias_update_speed: float = 0.001
    """γ of the selection bias (V3 section 4.2: 0.001, then 0)."""
    loss_chunk: int = 512
    """Positions whose logits exist at once."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    """Steps between held-out evaluations; 0: only before the first and after the last step."""
    eval_sequences: int = 64
    """Held-out sequences of one evaluation, at most."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    sample_prompts: tuple[str, ...] = ()
    """Texts that the finished model continues."""
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "RunConfig", name, getattr(self, name), remedy)

        for name in (
            "steps", "batch_size", "seq_len", "accumulation", "loss_chunk", "log_every", "eval_sequences",
            "checkpoint_every", "keep_checkpoints", "sample_tokens",
        ):  # fmt: skip
            check(getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("mtp_loss_weight", "bias_update_speed", "eval_every"):
            check(getattr(self, name) >= 0, name, "must not be negative")
        check(self.batch_size % self.accumulation == 0, "accumulation", f"must divide batch_size = {self.batch_size}")
        check(
            self.seq_len <= self.model.max_position_embeddings, "seq_len",
            f"must not exceed the model's max_position_embeddings = {self.model.max_position_embeddings}",
        )  # fmt: skip
        for name in ("dtype", "param_dtype"):
            require(
                getattr(self.model, name) != "float16", "RunConfig.model", name, "float16",
                "training in float16 needs loss scaling, which is not built: take bfloat16 or float32",
            )  # fmt: skip
        depth = self.model.num_nextn_predict_layers
        check(self.seq_len > depth + 1, "seq_len", f"must exceed the depth of multi-token prediction = {depth} by 2")
        check(
            self.data.tokenizer is not None or self.data.vocab_size <= self.model.vocab_size, "data",
            f"vocab_size must not exceed the model's vocab_size = {self.model.vocab_size}",
        )  # fmt: skip
