"""What a training run is: model, data, recipe, mesh. A config file's `get_config()` returns a `RunConfig`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from deepseek_jax.chat.data import ChatData
from deepseek_jax.config import ModelConfig, require
from deepseek_jax.data.config import DataConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.training.lora import LoRA
from deepseek_jax.training.schedule import BatchRamp, ByTokens, Plan, Schedule, make_plan


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with decoupled decay of weights (not of norms and biases) and clipping, as in all papers of the line."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """What both moments are stored in; they are computed in float32 (V3, section 3.3.3: bfloat16)."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, "AdamW", name, getattr(self, name), "must be in [0, 1)")
        require(self.eps > 0, "AdamW", "eps", self.eps, "must be greater than 0")
        require(self.weight_decay >= 0, "AdamW", "weight_decay", self.weight_decay, "must not be negative")
        require(self.clip_norm > 0, "AdamW", "clip_norm", self.clip_norm, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class SpikeSkip:
    """Leaves out updates whose loss or gradient norm stands out from those before (as OLMo 2 and Levanter do)."""

    window: int = 128
    """Applied updates looked back on; none is left out before half of them are there."""
    sigma: float = 6.0
    """Standard deviations above their mean from which an update is left out."""

    def __post_init__(self) -> None:
        require(self.window >= 4, "SpikeSkip", "window", self.window, "must be at least 4")
        require(self.sigma > 0, "SpikeSkip", "sigma", self.sigma, "must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run.

    A step consumes a batch. Its length is given by `steps`, by `train_tokens`, or by both: then the schedule goes by
    `train_tokens` and the run ends at `steps`, where that comes first.
    """

    model: ModelConfig
    schedule: Schedule
    batch_size: int
    """Sequences of an optimizer step, over all devices and accumulation steps; with a ramp, of the last steps."""
    seq_len: int
    """Tokens of a sequence."""
    steps: int | None = None
    """Batches that the run consumes; None: as many as `train_tokens` need."""
    train_tokens: int | None = None
    """Tokens that the schedule is laid out for; None: those of all steps."""
    batch_ramp: BatchRamp | None = None
    data: DataConfig | ChatData = field(default_factory=DataConfig)
    """Documents, or conversations to learn answers from (`dsj.sft` makes the run of these)."""
    optimizer: AdamW = field(default_factory=AdamW)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    moments_on: Literal["device", "host"] = "device"
    """Whose memory the optimizer's moments lie in between updates; "host" moves them to the device and back once a step."""
    pipeline: Pipeline | None = None
    """How a piece goes through the mesh's stages; None: they only share weights and batch, as `fsdp` does."""
    accumulation: int = 1
    """Pieces in which a full batch is worked off, one after the other; the result does not depend on it."""
    mtp_loss_weight: float | ByTokens = 0.3
    """λ of the multi-token loss (V3 section 4.2: 0.3 for 10T tokens, then 0.1)."""
    bias_update_speed: float | ByTokens = 0.001
    """γ of the selection bias (V3 section 4.2: 0.001 for 14.3T tokens, then 0). 0 leaves the bias as it is."""
    lora: LoRA | None = None
    """Trains low-rank adapters of the weights in place of the weights."""
    ema_decay: float | None = None
    """Decay a step of a running mean of the weights, kept beside them and evaluated too (V3 section 3.2.3)."""
    init_from: str | None = None
    """Run folder (its last good checkpoint) or published checkpoint (config.json and safetensors) with the weights and
    selection biases of step 0; the optimizer begins anew."""
    loss_chunk: int = 512
    """Positions whose logits exist at once."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    """Steps between held-out evaluations; 0: only before the first and after the last step."""
    eval_sequences: int = 64
    """Held-out sequences of one evaluation, at most, of each source."""
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    verify_checkpoints: Literal["full", "sampled", "off"] = "full"
    """How much of a checkpoint is compared with its SHA-256 manifest before it is restored; "off" writes none either."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a failed save (a full disk) does to the run; "continue" tries again at the next checkpoint."""
    spike_skip: SpikeSkip | None = None
    max_skipped_in_a_row: int = 10
    """The run stops, and saves the batches, when so many updates in a row were not finite, or spikes."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress (a step, a compilation, an evaluation) after which the process prints the stacks of all
    threads and ends; 0: never."""
    profile: str | None = None
    """"A:B" writes a trace of the steps A to B - 1 into the run folder, for xprof."""
    writers: tuple[str, ...] = ()
    """Where metrics go beside metrics.jsonl: "tensorboard", "wandb", or "package.module:factory"."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the finished model continues."""
    sample_tokens: int = 64

    @property
    def plan(self) -> Plan:
        """Which steps read which tokens."""
        return make_plan(self.batch_size, self.seq_len, self.batch_ramp)

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        if self.train_tokens is None:
            assert self.steps is not None
            return self.steps
        whole = self.plan.steps_for(self.train_tokens)
        return whole if self.steps is None else min(self.steps, whole)

    @property
    def horizon(self) -> int:
        """Tokens that the schedule is laid out for."""
        return self.plan.tokens_before(self.last_step) if self.train_tokens is None else self.train_tokens

    @property
    def piece_size(self) -> int:
        """Sequences worked off at once, over all devices."""
        return self.batch_size // self.accumulation

    @property
    def profile_steps(self) -> range:
        """The steps that `profile` names."""
        first, last = map(int, (self.profile or "0:0").split(":"))
        return range(first, last)

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, remedy: str) -> None:
            require(condition, "RunConfig", name, getattr(self, name), remedy)

        check(
            self.steps is not None or self.train_tokens is not None, "steps",
            "must be a number of steps, unless train_tokens says how long the run is",
        )  # fmt: skip
        for name in (
            "steps", "train_tokens", "batch_size", "seq_len", "accumulation", "loss_chunk", "log_every",
            "eval_sequences", "checkpoint_every", "keep_checkpoints", "sample_tokens", "max_skipped_in_a_row",
        ):  # fmt: skip
            check(getattr(self, name) is None or getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("mtp_loss_weight", "bias_update_speed", "eval_every", "hang_timeout_s"):
            value = getattr(self, name)
            check(isinstance(value, ByTokens) or value >= 0, name, "must not be negative")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "must lie between 0 and 1, or be None")
        check(
            self.profile is None or (bool(re.fullmatch(r"\d+:\d+", self.profile)) and len(self.profile_steps) > 0),
            "profile", 'must be "A:B" with A < B, such as "10:15"',
        )  # fmt: skip
        check(self.moments_on in ("device", "host"), "moments_on", "must be 'device' or 'host'")
        self._check_batches(check)
        self._check_model(check)

    def _check_batches(self, check) -> None:
        check(self.batch_size % self.accumulation == 0, "accumulation", f"must divide batch_size = {self.batch_size}")
        check(
            self.pipeline is None or self.mesh.stage != 1, "pipeline",
            "needs stages, and MeshConfig.stage = 1: set it to their number, or leave the pipeline out",
        )  # fmt: skip
        if (ramp := self.batch_ramp) is not None:
            grown = self.batch_size - ramp.start
            check(
                grown > 0 and grown % ramp.increment == 0, "batch_ramp",
                f"must reach batch_size = {self.batch_size} from start in whole increments",
            )  # fmt: skip
            check(
                ramp.start % self.piece_size == 0 and ramp.increment % self.piece_size == 0, "batch_ramp",
                f"needs start and increment in multiples of batch_size / accumulation = {self.piece_size}, which is "
                f"worked off at once: raise accumulation",
            )  # fmt: skip

    def _check_model(self, check) -> None:
        check(
            self.seq_len <= self.model.max_position_embeddings, "seq_len",
            f"must not exceed the model's max_position_embeddings = {self.model.max_position_embeddings}",
        )  # fmt: skip
        for name in ("dtype", "param_dtype"):
            require(
                getattr(self.model, name) != "float16", "RunConfig.model", name, "float16",
                "training in float16 needs loss scaling, which is not built: take bfloat16 or float32",
            )  # fmt: skip
        if self.pipeline is not None and self.mesh.stage != 1:
            self.pipeline.check_model(self.model)
        depth = self.model.num_nextn_predict_layers
        check(self.seq_len > depth + 1, "seq_len", f"must exceed the depth of multi-token prediction = {depth} by 2")
        check(
            isinstance(self.data, ChatData)
            or self.data.tokenizer is not None
            or self.data.vocab_size <= self.model.vocab_size,
            "data",
            f"vocab_size must not exceed the model's vocab_size = {self.model.vocab_size}",
        )  # fmt: skip
