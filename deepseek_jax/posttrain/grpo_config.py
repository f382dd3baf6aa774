"""What a run of GRPO is: problems, rewards, the objective and the rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.posttrain.advantage import Scale
from deepseek_jax.posttrain.common import PostConfig
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.prompts import Mix, ProblemFile
from deepseek_jax.posttrain.rewards import RewardKind, check_parts
from deepseek_jax.posttrain.tasks import ChainSum, Countdown, ReasoningGym, RunningSum


@dataclass(frozen=True, kw_only=True)
class GRPO(PostConfig):
    """Reinforcement learning from group-relative rewards (DeepSeekMath, arXiv 2402.03300; R1, arXiv 2501.12948).

    A step samples `samples` completions of each of `prompts` problems, scores them, and updates the policy `updates` times,
    each time from another part of them. R1-Zero: 32 prompts, 16 samples, lr 3e-6, KL 0.001, a new reference every 400 steps.
    """

    problems: RunningSum | ChainSum | Countdown | ReasoningGym | ProblemFile | Mix
    rewards: tuple[RewardKind, ...]
    steps: int
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    advantages: Scale | Literal["process"] = "group"
    """What rewards are divided by; "process": from rewards of steps, which `rewards.Custom` gives (DeepSeekMath, 4.1.3)."""
    prompts: int = 32
    samples: int = 16
    max_prompt_tokens: int = 512
    """Problems with longer prompts are passed over, and counted."""
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    updates: int = 1
    """Updates from the completions of a step, each from an equal part of them, once."""
    pieces: int = 1
    """In how many an update is worked off, one after the other; less memory, the same update."""
    truncated: Literal["learn", "mask"] = "learn"
    """What a completion that was cut off teaches: what its reward says, or nothing."""
    refills: int = 0
    """Rounds of new problems, at most, in place of those whose completions all have the same reward (DAPO)."""
    max_barren_steps: int = 20
    """The run stops when for so many steps in a row no problem had completions of different rewards."""
    reference_every: int | None = None
    """Steps after which the policy becomes the reference; None: the reference stays what the run began with."""
    keep_routing: bool = False
    """Train each token through the experts that the rollout chose (V3.2, section 3.1)."""
    keep_sampling_mask: bool = False
    """Train in the set of tokens that top_p and top_k left the rollout (V3.2, section 3.1)."""
    generation_mesh: MeshConfig | None = None
    """Layout of the rollouts, such as all devices along `tensor`; None: that of the updates. The weights move before each
    rollout, and their checksums are compared."""
    slots: int = 64
    """Completions that are decoded at once."""
    eval_problems: int = 64
    """Problems of the test split that an evaluation answers, greedily."""
    shown: int = 4
    """Completions of a step that are written out in full, in the folder rollouts."""
    reward_workers: int = 2
    """Processes of each reward that has processes."""
    allow_unsafe_code: bool = False
    """Run code of completions also where this machine cannot isolate it (see `rewards.Code`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "steps", "prompts", "max_prompt_tokens", "max_new_tokens", "updates", "pieces", "slots", "eval_problems",
            "max_barren_steps", "reward_workers",
        ):  # fmt: skip
            self.check(getattr(self, name) > 0, name, "must be greater than 0")
        self.check(
            self.samples >= 2, "samples", "must be at least 2: a completion is judged against others of its prompt"
        )
        self.check(len(self.rewards) > 0, "rewards", "give at least one")
        check_parts(self.rewards, self.problems)
        self.check(self.temperature > 0, "temperature", "must be greater than 0: greedy completions are all alike")
        self.check(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        for name in ("refills", "shown", "top_k"):
            self.check(getattr(self, name) >= 0, name, "must not be negative")
        self.check(
            self.reference_every is None or (self.reference_every > 0 and self.loss.kl > 0),
            "reference_every", "must be greater than 0, and needs loss.kl > 0",
        )  # fmt: skip
        self.check(
            self.completions % (self.updates * self.pieces) == 0, "updates",
            f"times pieces = {self.pieces} must divide prompts · samples = {self.completions}",
        )  # fmt: skip
        self.check(
            self.advantages != "process" or self.loss.ratio == "token",
            "advantages",
            "'process' needs loss.ratio = 'token'",
        )
        self.check(
            self.keep_sampling_mask or (self.top_p == 1 and self.top_k == 0), "keep_sampling_mask",
            "must be True with top_p or top_k: the policy would be trained on a distribution that nobody sampled from",
        )  # fmt: skip
        self.check(
            self.loss.max_tokens is None or self.loss.max_tokens >= self.max_new_tokens, "loss",
            f"max_tokens must be at least max_new_tokens = {self.max_new_tokens}",
        )  # fmt: skip

    @property
    def completions(self) -> int:
        """Of a step."""
        return self.prompts * self.samples
