"""Rewards: rules, verifiers, tests of code, judges and models, and the scorer that weighs them."""

from deepseek_jax.posttrain.rewards.item import Item, Outcome
from deepseek_jax.posttrain.rewards.kinds import (
    Accuracy,
    Code,
    Custom,
    Format,
    Judge,
    Language,
    Length,
    ModelReward,
    Only,
    Overlong,
    RewardKind,
    check_parts,
)
from deepseek_jax.posttrain.rewards.rules import (
    ANSWER,
    THINK,
    accuracy,
    checked,
    countdown,
    equal_answers,
    final_answer,
    has_format,
    language_share,
    overlong_penalty,
    plain_accuracy,
)
from deepseek_jax.posttrain.rewards.scorer import OpenModel, RewardsFailed, Scorer, Scores, open_rewards

__all__ = [
    "ANSWER", "THINK", "Accuracy", "Code", "Custom", "Format", "Item", "Judge", "Language", "Length", "ModelReward", "Only",
    "OpenModel", "Outcome", "Overlong", "RewardKind", "RewardsFailed", "Scorer", "Scores", "accuracy", "check_parts", "checked",
    "countdown", "equal_answers", "final_answer", "has_format", "language_share", "open_rewards", "overlong_penalty",
    "plain_accuracy",
]  # fmt: skip
