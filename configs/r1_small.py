"""R1's stages at the size of a CPU: minutes to an hour, each resumable, on sums that a small base model can do in steps.

    python experiments/distill_vs_rl/run.py --size cpu --only bases --folder runs/r1_small
    deepseek-jax r1 configs/r1_small.py --run-dir runs/r1_small/r1

The first command makes what `FOLDER` names: two base models (a small V3, a smaller dense one), problems, and conversations
for the cold start. Other bases are given by flags: `--stages.0.run.init-from`, .1, .4 the teacher's, .5, .7, .8 the student's.
"""

from typing import Any

from deepseek_jax.chat import ChatData, ChatJsonl
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.prefer import Prefer
from deepseek_jax.posttrain.preference_data import PairFile
from deepseek_jax.posttrain.prompts import Mix, Part, ProblemFile
from deepseek_jax.posttrain.r1 import R1, Stage
from deepseek_jax.posttrain.reject import Rejection
from deepseek_jax.posttrain.reward_model import RewardModel
from deepseek_jax.posttrain.rewards import Accuracy, Language, ModelReward, Only
from deepseek_jax.posttrain.sft import SFT
from deepseek_jax.training import AdamW

FOLDER = "runs/r1_small"
TEACHER, STUDENT, DATA = f"{FOLDER}/teacher-base", f"{FOLDER}/student-base", f"{FOLDER}/data"
MATHS = ("chain", "chain2", "mixed")
PARTS = tuple(Part(name=name, problems=ProblemFile(path=f"{DATA}/problems/{name}.jsonl")) for name in MATHS)
REMARKS = Part(name="remarks", problems=ProblemFile(path=f"{DATA}/remarks.jsonl"))
ENGLISH = Language(language="en", weight=0.5)
ADAMW = AdamW(weight_decay=0.0)
LENGTHS: dict[str, Any] = dict(max_prompt_tokens=40, max_new_tokens=64)


def rl(rate: float, **fields: Any) -> GRPO:
    return GRPO(
        loss=PolicyLoss(aggregation="dr_grpo", max_tokens=64, clip_high=0.28, kl=0.001), advantages="none",
        rate=Rate(peak=rate), optimizer=ADAMW, prompts=16, samples=8, slots=128, **LENGTHS, **fields,
    )  # fmt: skip


def sft(base: str, *paths: str) -> SFT:
    return SFT(
        init_from=base, template="r1", data=ChatData(sources=tuple(ChatJsonl(path=path) for path in paths)), epochs=3,
        rate=Rate(peak=5e-4, warmup_steps=10, shape="cosine"), optimizer=ADAMW, batch_size=16, seq_len=256,
    )  # fmt: skip


def get_config() -> R1:
    maths, samples, remarks = Mix(parts=PARTS), "@rl-samples/samples.jsonl", f"{DATA}/remarks_sft.jsonl"
    return R1(
        stages=(
            Stage(
                name="r1-zero",
                run=rl(2e-4, init_from=TEACHER, template="none", problems=maths, rewards=(Accuracy(),), steps=40),
            ),
            Stage(name="cold-start", run=sft(TEACHER, f"{DATA}/cold.jsonl")),
            Stage(
                name="reasoning-rl",
                run=rl(2e-4, init_from="@cold-start", problems=maths, rewards=(Accuracy(), ENGLISH), steps=25),
            ),
            Stage(
                name="rl-samples",
                run=Rejection(
                    init_from="@reasoning-rl", problems=maths, rewards=(Accuracy(),), count=256, samples=4, keep=4,
                    language="en", code=False, slots=128, block=32, **LENGTHS,
                ),
            ),
            Stage(name="sft", run=sft(TEACHER, samples, remarks)),
            Stage(
                name="reward-model",
                run=Prefer(
                    init_from=STUDENT, template="r1", data=PairFile(path=f"{DATA}/pairs.jsonl"), batch_size=32,
                    learn=RewardModel(reads="summary"), max_tokens=64, epochs=1, rate=Rate(peak=5e-4, shape="cosine"),
                    optimizer=ADAMW,
                ),
            ),
            Stage(
                name="all-rl",
                run=rl(
                    2e-4, init_from="@sft", problems=Mix(parts=(*PARTS, REMARKS)), steps=20,
                    rewards=(
                        Only(reward=Accuracy(), parts=MATHS),
                        ENGLISH,
                        Only(reward=ModelReward(path="@reward-model", weight=0.2), parts=("remarks",)),
                    ),
                ),
            ),
            Stage(name="student-sft", run=sft(STUDENT, samples, remarks)),
            Stage(
                name="student-rl",
                run=rl(4e-4, init_from=STUDENT, template="none", problems=maths, rewards=(Accuracy(),), steps=60),
            ),
        )
    )  # fmt: skip
