"""The rewards of a run, opened, asked and added up.

A reward that cannot be worked out (it raises, is not a number, its process died or was killed for its time) counts as 0,
marks its item and is counted by reason: it can never pass for a wrong answer. Where that happens to a reward for every
item of a call, nothing would be learned but noise, and the call raises.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepseek_jax.config import require
from deepseek_jax.posttrain.rewards import code, judge, math_pool, rules
from deepseek_jax.posttrain.rewards import kinds as kinds_
from deepseek_jax.posttrain.rewards.item import Item, Outcome, Reward
from deepseek_jax.posttrain.rewards.kinds import RewardKind, name_of
from deepseek_jax.posttrain.rewards.sandbox import Sandbox
from deepseek_jax.posttrain.tasks import Problem

OpenModel = Callable[[str], Callable[[list[Item]], Sequence[float]]]
"""From a reward model's folder to a function of items that returns a score each. Where what it returns has a method
`close`, that is called at the end."""


class RewardsFailed(RuntimeError):
    """A reward could be worked out for no item at all. `exit_code` is the command line's: EX_UNAVAILABLE of sysexits.h."""

    exit_code = 69


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rewards of a batch of B items."""

    total: np.ndarray
    """float64 [B]: the sum of the rewards, each times its weight."""
    parts: dict[str, np.ndarray]
    """Float64 [B] of each reward by its name, without its weight; parts of a reward under "name/part"."""
    failed: np.ndarray
    """bool [B]: some reward could not be worked out, for a technical reason, and counts as 0."""
    failures: dict[str, int]
    """How often each such reason occurred."""
    steps: list[tuple[tuple[int, float], ...]]
    """Of each item: the scores of its steps, times their rewards' weights, with the characters of the text that each ends."""


class Scorer:
    """Rewards that are open; made by `open_rewards`."""

    def __init__(
        self, rewards: Mapping[str, tuple[Reward, float]], lengths: Mapping[str, kinds_.Length],
        only: Mapping[str, tuple[str, ...]], beat: Callable[[], None],
    ):  # fmt: skip
        """
        Args:
            rewards: each reward's function and weight, by name.
            lengths: those that are worked out from the others' scores, by name.
            only: the parts of a mixture that a reward is for, by its name; those that are for all are not in it.
            beat: called before each reward.
        """
        self._rewards, self._lengths, self._only, self._beat = rewards, lengths, only, beat

    def score(self, items: Sequence[Item]) -> Scores:
        """Works out every reward of every item.

        Raises: RewardsFailed where a reward failed, for technical reasons, for every item.
        """
        B = len(items)
        total, failed = np.zeros(B), np.zeros(B, bool)
        parts: dict[str, np.ndarray] = {}
        failures: Counter[str] = Counter()
        steps: list[tuple[tuple[int, float], ...]] = [()] * B
        for name, (reward, weight) in self._rewards.items():
            self._beat()
            only = self._only.get(name)
            chosen = [i for i, item in enumerate(items) if only is None or item.problem.source in only]
            outcomes = [Outcome(0.0)] * B
            for i, outcome in zip(chosen, _asked(reward, [items[i] for i in chosen]), strict=True):
                outcomes[i] = _sound(outcome)
            reasons = Counter(f"{name}: {outcome.reason}" for outcome in outcomes if outcome.reason)
            if chosen and reasons.total() == len(chosen):
                [(reason, count), *_] = reasons.most_common()
                raise RewardsFailed(
                    f"the reward {name!r} could not be worked out for any of {len(chosen)} completions; {count} times: "
                    f"{reason}"
                )
            failures += reasons
            failed |= np.array([bool(outcome.reason) for outcome in outcomes], bool)
            parts[name] = np.array([outcome.score for outcome in outcomes], np.float64)
            for part in sorted({part for outcome in outcomes for part in outcome.parts}):
                parts[f"{name}/{part}"] = np.array([outcome.parts.get(part, 0.0) for outcome in outcomes], np.float64)
            total += weight * parts[name]
            for i, outcome in enumerate(outcomes):
                steps[i] += tuple((end, weight * score) for end, score in outcome.steps)
        for name, kind in self._lengths.items():
            parts[name] = _length_scores(items, parts[kind.of] > 0)
            total += kind.weight * parts[name]
        return Scores(total=total, parts=parts, failed=failed, failures=dict(failures), steps=steps)


def _asked(reward: Reward, items: Sequence[Item]) -> Sequence[Outcome]:
    try:
        outcomes = reward(items)
    except Exception as error:  # whatever a reward raises is its failure, told and counted, not the run's
        return [Outcome(0.0, _told(error))] * len(items)
    if len(outcomes) != len(items):
        return [Outcome(0.0, f"{len(outcomes)} scores for {len(items)} completions")] * len(items)
    return outcomes


def _sound(outcome: Outcome) -> Outcome:
    """The outcome, or a failure where it is not made of finite numbers."""
    if outcome.reason:
        return Outcome(0.0, outcome.reason)
    try:
        for value in (outcome.score, *outcome.parts.values(), *(score for _, score in outcome.steps)):
            rules.checked(value)
    except ValueError as error:
        return Outcome(0.0, str(error))
    return outcome


def _told(error: Exception) -> str:
    """One short line: what is counted by it must not differ from item to item by a long text.

    Raises: the error itself where it is what ends a run: a signal (`training.interrupt.Stopped`) may come at any place.
    """
    if hasattr(error, "exit_code"):
        raise error
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


def _each(function: Callable[[Item], Any], beat: Callable[[], None]) -> Reward:
    """A reward from a function of one item, whose exceptions fail that item alone."""

    def outcome(item: Item) -> Outcome:
        beat()
        try:
            result = function(item)
            given = result if isinstance(result, tuple) else (result,)
            score, parts, steps = [*given, *[{}, ()][len(given) - 1 :]]
            return Outcome(
                float(score),
                parts={str(part): float(value) for part, value in parts.items()},
                steps=tuple((int(end), float(value)) for end, value in steps),
            )
        except Exception as error:
            return Outcome(0.0, _told(error))

    return lambda items: [outcome(item) for item in items]


def _length_scores(items: Sequence[Item], right: np.ndarray) -> np.ndarray:
    """See `kinds.Length`: float64 [B]; a group whose completions are equally long gets 0."""
    tokens, groups = np.array([i.tokens for i in items], np.float64), np.array([i.group for i in items])
    scores = np.zeros(len(items))
    for group in np.unique(groups):
        rows = groups == group
        low, high = tokens[rows].min(), tokens[rows].max()
        if low < high:
            scores[rows] = 0.5 - (tokens[rows] - low) / (high - low)
    return np.where(right, scores, np.minimum(scores, 0.0))


@contextmanager
def open_rewards(
    kinds: Sequence[RewardKind],
    *,
    allow_unsafe_code: bool = False,
    workers: int = 2,
    open_model: OpenModel | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Iterator[Scorer]:
    """The scorer of some rewards. What they need is started here, so that what is missing is said before a run begins,
    and ended with the context, also by an exception.

    Args:
        kinds: what is rewarded; their names must differ.
        allow_unsafe_code: run code of completions also where this machine cannot isolate it (`rewards/code.py`).
        workers: processes of each reward that has processes.
        open_model: opens reward models; needed where `kinds` has one.
        beat: called whenever something of the work is done, for a watchdog.

    Raises: ValueError for what cannot be opened, with the remedy.
    """
    require(bool(kinds), "open_rewards", "kinds", kinds, "give at least one reward")
    require(workers >= 1, "open_rewards", "workers", workers, "must be at least 1")
    names = [name_of(kind) for kind in kinds]
    for kind, name in zip(kinds, names, strict=True):
        require(
            names.count(name) == 1,
            type(kind).__name__,
            "name",
            kind.name,
            f"two rewards are called {name!r}: name them",
        )
        if isinstance(kind, kinds_.Length):
            others = [n for n, k in zip(names, kinds, strict=True) if not isinstance(k, kinds_.Length)]
            require(kind.of in others, "Length", "of", kind.of, f"must be one of the other rewards: {others}")
    with ExitStack() as stack:
        rewards = {
            name: (_opened(kind, stack, allow_unsafe_code, workers, open_model, beat), kind.weight)
            for name, kind in zip(names, kinds, strict=True)
            if not isinstance(kind, kinds_.Length)
        }
        lengths = {name: k for name, k in zip(names, kinds, strict=True) if isinstance(k, kinds_.Length)}
        only = {name: k.parts for name, k in zip(names, kinds, strict=True) if isinstance(k, kinds_.Only)}
        yield Scorer(rewards, lengths, only, beat)


def _opened(
    kind: RewardKind, stack: ExitStack, allow_unsafe_code: bool, workers: int, open_model: OpenModel | None,
    beat: Callable[[], None],
) -> Reward:  # fmt: skip
    """The reward of one kind; what has to be closed goes onto the stack."""
    match kind:
        case kinds_.Only(reward=reward):
            return _opened(reward, stack, allow_unsafe_code, workers, open_model, beat)
        case kinds_.Accuracy(verifier="math", seconds=seconds):
            pool = stack.enter_context(math_pool.MathPool(workers, seconds))
            return lambda items: math_pool.math_accuracy(pool, items)
        case kinds_.Accuracy(verifier=verifier):
            by_rule = {"exact": rules.accuracy, "plain": rules.plain_accuracy, "countdown": rules.countdown}
            return _each(lambda item: by_rule[verifier](item.problem, item.completion), beat)
        case kinds_.Format():
            return _each(lambda item: rules.has_format(item.completion), beat)
        case kinds_.Language(language=language):
            return _each(lambda item: rules.language_share(item.completion, language), beat)
        case kinds_.Overlong(limit=limit, buffer=buffer):
            return _each(lambda item: rules.overlong_penalty(item.tokens, limit, buffer), beat)
        case kinds_.Code():
            sandbox = stack.enter_context(Sandbox(code.limits_of(kind), allow_unsafe=allow_unsafe_code))
            return stack.enter_context(code.CodeReward(kind, sandbox, workers))
        case kinds_.Judge():
            return stack.enter_context(judge.JudgeReward(kind))
        case kinds_.Custom(function=where):
            function = _found(where)
            return _each(lambda item: function(item.problem, item.completion), beat)
        case kinds_.ModelReward(path=path):
            if open_model is None:
                raise ValueError(f"ModelReward.path = {path!r}: open_rewards needs open_model to open reward models")
            model = open_model(path)
            if hasattr(model, "close"):
                stack.callback(model.close)
            return lambda items: [Outcome(float(score)) for score in model(list(items))]
    raise ValueError(f"{kind!r} is no kind of reward")


def _found(where: str) -> Callable[[Problem, str], Any]:
    """The function at "package.module:function"."""
    module, _, name = where.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"Custom.function = {where!r}: {error}: is its folder on the Python path?") from None
    require(callable(function), "Custom", "function", where, f"the module {module} has no function {name}")
    assert callable(function)
    return function
