"""DeepSeek-R1 (arXiv 2501.12948 and Nature 645, 633; its supplement has the numbers): R1-Zero, R1's four stages, a student.

The paper's step is one update on 512 completions, 16 of each of 32 questions; a rollout makes 8,192 completions, which 16
updates use, once each. A step here is a rollout, so numbers of steps are the paper's by 16: its 10,400 steps of R1-Zero
are 650, "until step 8.2k" is 512, a new reference every 400 is every 25, stage 4's 1,700 with the last 400 are 81 and 25.

Bring what data/ and models/ name. What the paper does not print is marked "not printed". Its range of the ratio, 1 ± ε with
ε = 10, is never left below, as a ratio is above 0: clip_low = 1 says so.
"""

from typing import Any

from deepseek_jax.chat import ChatData, ChatJsonl
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.prefer import Prefer
from deepseek_jax.posttrain.preference_data import LabelFile, PairFile
from deepseek_jax.posttrain.prompts import Mix, Part, ProblemFile
from deepseek_jax.posttrain.r1 import R1, Stage
from deepseek_jax.posttrain.reject import Rejection
from deepseek_jax.posttrain.reward_model import RewardModel
from deepseek_jax.posttrain.rewards import Accuracy, Code, Format, Language, ModelReward, Only
from deepseek_jax.posttrain.sft import SFT
from deepseek_jax.training import AdamW

BASE = "models/DeepSeek-V3-Base"
STUDENT = "models/Qwen2.5-Math-7B"
"""With the tokenizer.json of the published R1-Distill-Qwen-7B, which has the template's tokens."""
UPDATES = 16  # of a rollout
MESH: dict[str, Any] = dict(mesh=MeshConfig(data=1, fsdp=-1), optimizer=AdamW(moment_dtype="bfloat16"))

REASONING = Mix(
    parts=(
        Part(name="math", problems=ProblemFile(path="data/math.jsonl")),
        Part(name="code", problems=ProblemFile(path="data/code.jsonl")),  # with "tests"
        Part(name="stem", problems=ProblemFile(path="data/stem.jsonl")),
        Part(name="logic", problems=ProblemFile(path="data/logic.jsonl")),
    )
)
GENERAL = (
    Part(name="helpful", problems=ProblemFile(path="data/helpful_prompts.jsonl")),
    Part(name="safety", problems=ProblemFile(path="data/safety_prompts.jsonl")),
)
RULES = (
    Only(reward=Accuracy(verifier="math"), parts=("math", "stem", "logic")),
    Only(reward=Code(), parts=("code",)),
)
LANGUAGE = Language(language="en")
R1_LOSS = PolicyLoss(clip_low=1.0, clip_high=10.0, kl=0.001)


def rl(**fields: Any) -> GRPO:
    return GRPO(
        rate=Rate(peak=3e-6), prompts=32 * UPDATES, samples=16, updates=UPDATES, reference_every=400 // UPDATES,
        max_prompt_tokens=2048,  # not printed
        slots=512, checkpoint_every=25, **MESH, **fields,
    )  # fmt: skip


def sft(*paths: str) -> SFT:
    return SFT(
        init_from=BASE, template="r1", data=ChatData(sources=tuple(ChatJsonl(path=path) for path in paths)), epochs=2,
        rate=Rate(peak=5e-5, shape="cosine", final=0.1), batch_size=128, seq_len=32768, mtp="drop", remat="v3", **MESH,
    )  # fmt: skip


def reward_model(**fields: Any) -> Prefer:
    return Prefer(
        init_from="@sft", epochs=1, batch_size=256, max_tokens=8192, rate=Rate(peak=6e-6), remat="v3", **MESH, **fields
    )


def get_config() -> R1:
    return R1(
        stages=(
            # R1-Zero: rules for answer and format, of equal weight, and nothing else.
            Stage(
                name="r1-zero-32k",
                run=rl(
                    init_from=BASE, template="r1-zero", problems=REASONING, rewards=(*RULES, Format()), steps=512,
                    loss=PolicyLoss(kl=0.001),  # ε is not printed
                    max_new_tokens=32768,
                ),
            ),
            Stage(
                name="r1-zero",
                run=rl(
                    init_from="@r1-zero-32k", problems=REASONING, rewards=(*RULES, Format()), steps=138,
                    loss=PolicyLoss(kl=0.001), max_new_tokens=65536,
                ),
            ),
            # R1, stage 1: thousands of long thoughts with a summary, gathered from R1-Zero and prompts, put in order by hand.
            Stage(name="cold-start", run=sft("data/cold_start.jsonl")),
            # Stage 2: the language's share is added to the reward.
            Stage(
                name="reasoning-rl",
                run=rl(
                    init_from="@cold-start", problems=REASONING, rewards=(*RULES, LANGUAGE), loss=R1_LOSS,
                    max_new_tokens=32768,
                    steps=650,  # not printed
                ),
            ),
            # Stage 3: about 600K right answers of it, 200K conversations of other kinds, from the base model again.
            Stage(
                name="rl-samples",
                run=Rejection(
                    init_from="@reasoning-rl", problems=REASONING, rewards=RULES, max_new_tokens=32768, language="en",
                    code=False, mesh=MeshConfig(data=1, fsdp=-1), slots=512,
                    count=200_000, samples=16, keep=4, temperature=1.0, top_p=1.0, longest_paragraph=4000,  # not printed
                ),
            ),
            Stage(name="sft", run=sft("@rl-samples/samples.jsonl", "data/general_200k.jsonl")),
            # Judges: 66K pairs, looking at the summary; 106K labels, looking at everything.
            Stage(
                name="helpful",
                run=reward_model(
                    data=PairFile(path="data/helpful_pairs_66k.jsonl"), learn=RewardModel(reads="summary")
                ),
            ),
            Stage(
                name="safety",
                run=reward_model(
                    data=LabelFile(path="data/safety_labels_106k.jsonl"), learn=RewardModel(kind="pointwise")
                ),
            ),
            # Stage 4: 1,700 steps at temperature 0.7; general questions and judges in the last 400, as the policy would
            # learn to please the judges in more.
            Stage(
                name="all-rl-rules",
                run=rl(
                    init_from="@sft", problems=REASONING, rewards=(*RULES, LANGUAGE), loss=R1_LOSS, max_new_tokens=32768,
                    temperature=0.7, steps=81,
                ),
            ),
            Stage(
                name="all-rl",
                run=rl(
                    init_from="@all-rl-rules", problems=Mix(parts=(*REASONING.parts, *GENERAL)), loss=R1_LOSS,
                    max_new_tokens=32768, temperature=0.7, steps=25,
                    rewards=(
                        *RULES,
                        LANGUAGE,
                        Only(reward=ModelReward(path="@helpful", name="helpful"), parts=("helpful",)),
                        Only(reward=ModelReward(path="@safety", name="safety"), parts=("safety",)),
                        Only(reward=Format(), parts=("helpful", "safety")),
                    ),
                ),
            ),
            # Distillation, section 2.4: the 800K samples, batch 64; the 7B's rate.
            Stage(
                name="distill-qwen-7b",
                run=SFT(
                    init_from=STUDENT, template="r1", epochs=2, batch_size=64, seq_len=32768, remat="full", **MESH,
                    data=ChatData(
                        sources=(ChatJsonl(path="@rl-samples/samples.jsonl"), ChatJsonl(path="data/general_200k.jsonl"))
                    ),
                    rate=Rate(peak=8e-5, shape="cosine", final=0.1),
                ),
            ),
        )
    )  # fmt: skip
