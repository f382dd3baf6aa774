"""R1's stages, for a teacher and for its student, as configurations of `dsj.r1`."""

from pathlib import Path
from typing import Any

from sizes import ANSWER, PROMPT, Size

from deepseek_jax.chat import ChatData, ChatJsonl
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.distill_config import Distill, OnPolicy, Teacher
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.prefer import Prefer
from deepseek_jax.posttrain.preference_data import PairFile
from deepseek_jax.posttrain.prompts import Mix, Part, ProblemFile
from deepseek_jax.posttrain.r1 import Stage
from deepseek_jax.posttrain.reject import Rejection
from deepseek_jax.posttrain.reward_model import RewardModel
from deepseek_jax.posttrain.rewards import Accuracy, Language, ModelReward, Only
from deepseek_jax.posttrain.sft import SFT
from deepseek_jax.training import AdamW

MATHS = ("chain", "chain2", "mixed")
SHARED: dict[str, Any] = dict(verify_checkpoints="off", checkpoint_every=10**6)
WINDOW: dict[str, Any] = dict(max_prompt_tokens=PROMPT, max_new_tokens=ANSWER)
ADAMW = AdamW(weight_decay=0.0)


class Places:
    """Where everything lies in the experiment's folder."""

    def __init__(self, folder: Path):
        self.data = folder / "data"
        self.teacher_base, self.student_base = folder / "teacher-base", folder / "student-base"
        self.teacher, self.student = folder / "teacher", folder / "student"
        self.rows = folder / "rows"


def problems(places: Places, *, remarks: bool = False) -> Mix:
    """The three kinds of problems in equal parts; with remarks, as many questions without a reference answer."""
    names = {name: f"problems/{name}.jsonl" for name in MATHS} | ({"remarks": "remarks.jsonl"} if remarks else {})
    return Mix(
        parts=tuple(Part(name=name, problems=ProblemFile(path=str(places.data / path))) for name, path in names.items())
    )


def _grpo(size: Size, seed: int, **fields: Any) -> GRPO:
    """One objective for all stages: DeepSeekMath's without the bias to short answers, which is `dr_grpo`."""
    loss = PolicyLoss(aggregation="dr_grpo", max_tokens=ANSWER, clip_high=0.28, kl=0.001)
    return GRPO(
        loss=loss, advantages="none", optimizer=ADAMW, prompts=size.prompts, samples=size.samples, slots=size.slots,
        eval_problems=min(64, size.slots), shown=2, max_barren_steps=10**6, seed=seed, **WINDOW, **SHARED, **fields,
    )  # fmt: skip


def _rejection(size: Size, seed: int, **fields: Any) -> Rejection:
    return Rejection(
        rewards=(Accuracy(),), count=size.ask, samples=4, keep=4, at_least=size.at_least, language="en", code=False,
        temperature=0.6, slots=size.slots, block=max(size.slots // 4, 1), seed=seed, verify_checkpoints="off", **WINDOW,
        **fields,
    )  # fmt: skip


def _sft(size: Size, seed: int, base: Path, paths: list[str], steps: int, peak: float) -> SFT:
    return SFT(
        init_from=str(base), template="r1", seed=seed, steps=steps, batch_size=size.sft_batch, seq_len=size.seq_len,
        data=ChatData(sources=tuple(ChatJsonl(path=path) for path in paths), held_out_fraction=0.05), eval_sequences=16,
        rate=Rate(peak=peak, warmup_steps=min(10, steps // 2), shape="cosine"), optimizer=ADAMW, log_every=20,
        **SHARED,
    )  # fmt: skip


def teacher_stages(places: Places, size: Size, seed: int) -> tuple[Stage, ...]:
    """R1-Zero and the four stages of R1. After "zero-samples", `run.py` writes its cold.jsonl."""
    base, data = places.teacher_base, places.data
    maths = problems(places)
    rate = Rate(peak=size.rate)
    english = Language(language="en", weight=0.5)
    return (
        Stage(
            name="r1-zero",
            run=_grpo(
                size, seed, init_from=str(base), template="none", problems=maths, rewards=(Accuracy(),), rate=rate,
                steps=size.zero_steps,
            ),
        ),
        Stage(
            name="zero-samples",
            run=_rejection(size, seed + 1, init_from="@r1-zero", template="none", problems=maths),
        ),
        Stage(name="cold-start", run=_sft(size, seed, base, ["@zero-samples/cold.jsonl"], size.sft_steps, 3e-4)),
        Stage(
            name="reasoning-rl",
            run=_grpo(
                size, seed + 2, init_from="@cold-start", problems=maths, rewards=(Accuracy(), english), rate=rate,
                steps=size.reasoning_steps,
            ),
        ),
        Stage(name="rl-samples", run=_rejection(size, seed + 3, init_from="@reasoning-rl", problems=maths)),
        Stage(
            name="sft",
            run=_sft(
                size, seed, base, ["@rl-samples/samples.jsonl", str(data / "remarks_sft.jsonl")], size.sft_steps, 3e-4
            ),
        ),
        Stage(
            name="all-rl",
            run=_grpo(
                size, seed + 4, init_from="@sft", problems=problems(places, remarks=True), rate=rate, steps=size.all_steps,
                rewards=(
                    Only(reward=Accuracy(), parts=MATHS),
                    english,
                    Only(
                        reward=ModelReward(path=str(places.student / "reward-model"), weight=0.2), parts=("remarks",)
                    ),
                ),
            ),
        ),
    )  # fmt: skip


def alone_stages(places: Places, size: Size, seed: int) -> tuple[Stage, ...]:
    """What the small dense model does without a teacher: a judge of remarks, and the control, RL on the student."""
    base = str(places.student_base)
    return (
        Stage(
            name="reward-model",
            run=Prefer(
                init_from=base, template="r1", data=PairFile(path=str(places.data / "pairs.jsonl")),
                learn=RewardModel(reads="summary"), batch_size=min(32, size.slots), max_tokens=64, steps=size.reward_steps,
                rate=Rate(peak=5e-4, shape="cosine"), optimizer=ADAMW, held_out_fraction=0.1, eval_examples=128, seed=seed,
                **SHARED,
            ),
        ),
        Stage(
            name="student-rl",
            run=_grpo(
                size, seed, init_from=base, template="none", problems=problems(places), rewards=(Accuracy(),),
                rate=Rate(peak=2 * size.rate), steps=size.student_steps,
            ),
        ),
    )  # fmt: skip


def taught_stages(places: Places, size: Size, seed: int) -> tuple[Stage, ...]:
    """Distillation: SFT on the data that the teacher's own last SFT had; then the teacher's probabilities, on policy."""
    samples = [str(places.teacher / "rl-samples" / "samples.jsonl"), str(places.data / "remarks_sft.jsonl")]
    return (
        Stage(
            name="student-sft",
            run=_sft(size, seed, places.student_base, samples, size.student_sft_steps, 1e-3),
        ),
        Stage(
            name="student-on-policy",
            run=Distill(
                init_from="@student-sft", teachers=(Teacher(path=str(places.teacher / "all-rl")),),
                method=OnPolicy(
                    problems=ProblemFile(path=str(places.data / "problems" / "all.jsonl")), prompts=size.prompts,
                    samples=size.samples, slots=size.slots, eval_problems=min(64, size.slots), rewards=(Accuracy(),),
                    **WINDOW,
                ),
                steps=size.policy_steps, rate=Rate(peak=2 * size.rate), optimizer=ADAMW, seed=seed, **SHARED,
            ),
        ),
    )  # fmt: skip
