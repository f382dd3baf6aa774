"""Reinforcement learning: sample, score, compare within a group, update, and again.

DeepSeekMath (arXiv 2402.03300), section 4.1; R1 (arXiv 2501.12948), section 2.2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import storage
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.rules import degree
from deepseek_jax.posttrain.advantage import group_advantages, process_advantages
from deepseek_jax.posttrain.begin import open_start
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.grpo_log import joined, means, of_lengths, of_rewards, rows_of, show
from deepseek_jax.posttrain.policy import (
    PolicyState,
    Rollouts,
    abstract_policy,
    begin_policy,
    make_logprobs,
    make_update,
    variables_of,
)
from deepseek_jax.posttrain.process import flat_steps
from deepseek_jax.posttrain.prompts import Problems, Prompter
from deepseek_jax.posttrain.reward_model import open_reward_model
from deepseek_jax.posttrain.rewards import OpenModel, RewardsFailed, Scores, open_rewards
from deepseek_jax.posttrain.rollout import pack
from deepseek_jax.posttrain.rows import few_lengths, placed
from deepseek_jax.posttrain.sampler import Completion, Sampler
from deepseek_jax.posttrain.session import Line, PostRun, Session
from deepseek_jax.posttrain.tasks import Problem
from deepseek_jax.training.interrupt import Stopped
from deepseek_jax.training.trouble import TrainingFailed

_FREE = ("steps", "max_barren_steps", "slots", "eval_problems", "shown", "reward_workers")


class NothingToLearn(TrainingFailed):
    """For many steps no problem had completions of different rewards: the policy solves all, or none."""

    exit_code = 77


def grpo(
    config: GRPO, run_dir: storage.AnyPath, *, open_model: OpenModel | None = None, progress: bool = True
) -> PostRun:
    """Teach a policy by rewards, or continue the run in `run_dir` from its last good checkpoint.

    The folder is a run folder (`open_model`, `deepseek-jax chat`, `convert`): manifest.json, tokenizer.json, checkpoints/,
    metrics.jsonl (a line a step), rollouts/ (a readable file a step).

    Args:
        config: of the run.
        run_dir: its folder.
        open_model: opens reward models (`rewards.ModelReward`); None: those that `dsj.prefer` trains.
        progress: whether progress goes to stderr.

    Raises:
        ValueError: what cannot be run, before the first step.
        Stopped: a signal came; all progress is saved, and the same call goes on.
        RewardsFailed: a reward could be worked out for no completion of a step.
        NothingToLearn: see there.
        NotFinite, SaveFailed: as `train`.
    """
    with Session("grpo", config, run_dir, steps=config.steps, free=_FREE, progress=progress) as session:
        start = open_start(config, session.mesh)
        prompter = Prompter.of(start.tokenizer, start.template)
        train, test = (Problems(config.problems, split, config.seed) for split in ("train", "test"))
        model = start.model.config
        longest = config.max_prompt_tokens + config.max_new_tokens
        config.check(
            longest <= model.max_position_embeddings, "max_new_tokens",
            f"with max_prompt_tokens = {config.max_prompt_tokens} must not exceed the model's max_position_embeddings = "
            f"{model.max_position_embeddings}",
        )  # fmt: skip
        rows = config.completions // (config.updates * config.pieces)
        config.check(
            rows % degree("batch") == 0, "prompts",
            f"{rows} completions of a piece cannot be split over the {degree('batch')} devices that share a batch",
        )  # fmt: skip
        with open_rewards(
            config.rewards, allow_unsafe_code=config.allow_unsafe_code, workers=config.reward_workers,
            open_model=open_model or partial(open_reward_model, mesh=session.mesh),
            beat=lambda: session.watchdog.beat("working out rewards"),
        ) as scorer:  # fmt: skip
            learner = _Learner(config, session, start.model, prompter, train, test, scorer)
            kl = config.loss.kl > 0
            shapes = abstract_policy(model, config.optimizer, session.mesh, reference=kl)

            def make() -> PolicyState:
                return begin_policy(config.optimizer, start.load(), shapes, reference=kl)

            facts = {"problems": train.fingerprint}
            state = session.begin(model, start.tokenizer, start.template, shapes, make, train, facts)
            return session.run(state, learner.step, learner.evaluate)


class _Learner:
    """A step of GRPO, and what it is made with."""

    def __init__(
        self, config: GRPO, session: Session, model: Any, prompter: Prompter, train: Problems, test: Problems, scorer: Any
    ):  # fmt: skip
        self.config, self.session, self.model, self.scorer = config, session, model, scorer
        self.train, self.test = train, test
        self.sampler = Sampler(
            model, prompter, max_prompt_tokens=config.max_prompt_tokens, max_new_tokens=config.max_new_tokens,
            slots=min(config.slots, config.completions), keep_routing=config.keep_routing,
            keep_sampling_mask=config.keep_sampling_mask,
            mesh=None if config.generation_mesh is None else make_mesh(config.generation_mesh),
        )  # fmt: skip
        self.update = make_update(
            model, config.loss, config.optimizer, temperature=config.temperature, chunk=config.loss_chunk,
            pieces=config.pieces,
        )  # fmt: skip
        self.logprobs = make_logprobs(model, config.temperature, config.loss_chunk)
        self.barren = 0

    def step(self, state: PolicyState) -> tuple[PolicyState, Line]:
        """Rollouts and updates. Nothing is given away before the first update."""
        config, session, number = self.config, self.session, self.session.step
        began = time.perf_counter()
        completions, scores, line = self._rollouts(state)
        self.sampler.release()
        rolled = time.perf_counter()
        length = self._length(completions)
        advantages, alike = self._advantages(completions, scores, length)
        self._count_barren(bool(alike.all()))
        line |= of_rewards(scores, alike, config.samples) | of_lengths(completions)
        if config.shown and jax.process_index() == 0:
            show(session.run_dir, number + 1, config.shown, completions, scores, advantages)
        rollouts = self._packed(completions, scores, advantages, length)
        rate = jnp.float32(config.rate.at(number, config.steps))
        parts = self._parts(state, rollouts, number)
        update = session.compiled(self.update, state, parts[0], rate)
        session.stopping()
        metrics = []
        for part in parts:
            session.watchdog.beat(f"updates of step {number + 1}")
            state, figures = update(state, part, rate)
            metrics.append(figures)
        metrics = jax.device_get(metrics)
        if config.reference_every is not None and (number + 1) % config.reference_every == 0:
            state = replace(state, reference=jax.tree.map(lambda x: jnp.array(x, copy=True), state.params))
        ended = time.perf_counter()
        tokens = sum(len(c.generation.tokens) for c in completions)
        line |= {name: np.mean([m[name] for m in metrics]) for name in metrics[0] if name != "applied"}
        line["sampler_drift_max"] = max(float(m["sampler_drift_max"]) for m in metrics)
        return state, line | {
            "applied": all(bool(m["applied"]) for m in metrics),
            "learning_rate": float(rate),
            "tokens": tokens,
            "rollout_seconds": rolled - began,
            "update_seconds": ended - rolled,
            "rollout_share": (rolled - began) / (ended - began),
            "update_tokens_per_second": tokens / (ended - rolled),
        }

    def evaluate(self, state: PolicyState) -> Line:
        """Mean rewards and lengths of greedy answers to problems of the test split."""
        config = self.config
        self.sampler.load(variables_of(state.params, state.router))
        self.test.set_state({"next": 0})
        problems, _ = self.sampler.draw(self.test, config.eval_problems)
        completions = self.sampler.complete(problems, 1, "evaluation", temperature=0.0, beat=self._beat)
        scores = self.scorer.score([c.item(i) for i, c in enumerate(completions)])
        lengths = [len(c.generation.tokens) for c in completions]
        return {
            **means(scores),
            "length": float(np.mean(lengths)),
            "truncated": float(np.mean([c.truncated for c in completions])),
        }

    def _rollouts(self, state: PolicyState) -> tuple[list[Completion], Scores, Line]:
        """`completions` completions, groups one after the other, with their rewards. Groups whose rewards are all alike are
        replaced as long as rounds are left, and fill up what is missing then."""
        config, step = self.config, self.session.step
        began = time.perf_counter()
        self.session.aside(lambda: self.sampler.load(variables_of(state.params, state.router)))
        useful: list[tuple[list[Completion], Scores]] = []
        alike: list[tuple[list[Completion], Scores]] = []
        failures: dict[str, int] = {}
        skipped = sampled = 0
        scoring = 0.0
        for round_ in range(config.refills + 1):
            # Drawn here, in the main thread: one that is left behind by a signal must not move the position on.
            problems, passed_over = self.sampler.draw(self.train, config.prompts - len(useful))
            try:
                completions, scores, seconds = self.session.aside(partial(self._scored, problems, f"{step}/{round_}"))
            except RewardsFailed as error:
                if not useful and not alike:
                    raise
                failures[f"round {round_ + 1}: {error}"] = 1  # what the rounds before gave is enough for the step
                break
            skipped, sampled = skipped + passed_over, sampled + sum(len(c.generation.tokens) for c in completions)
            scoring += seconds
            for reason, count in scores.failures.items():
                failures[reason] = failures.get(reason, 0) + count
            for first in range(0, len(completions), config.samples):
                rows = slice(first, first + config.samples)
                its = rows_of(scores, rows)
                known = its.total[~its.failed]
                if config.advantages == "process":
                    known = np.array([score for steps in its.steps for _, score in steps])
                varied = known.size > 1 and float(np.std(known)) >= 1e-6
                (useful if varied else alike).append((completions[rows], its))
            if len(useful) == config.prompts:
                break
        found = len(useful)
        groups = [*useful, *alike][: config.prompts]
        seconds = time.perf_counter() - began
        return (
            [c for group, _ in groups for c in group],
            joined([its for _, its in groups]),
            {
                "zero_variance": len(alike) / (len(alike) + found),
                "rounds": round_ + 1,
                "prompts_too_long": skipped,
                "reward_failures": failures,
                "reward_seconds": scoring,
                "rollout_tokens_per_second": sampled / max(seconds - scoring, 1e-9),
            },
        )

    def _scored(self, problems: Sequence[Problem], round_: str) -> tuple[list[Completion], Scores, float]:
        """Completions of problems, their rewards, and the seconds that these took."""
        config = self.config
        completions = self.sampler.complete(
            problems, config.samples, f"{config.seed}/{round_}", temperature=config.temperature, top_p=config.top_p,
            top_k=config.top_k, beat=self._beat,
        )  # fmt: skip
        began = time.perf_counter()
        scores = self.scorer.score([c.item(i // config.samples) for i, c in enumerate(completions)])
        return completions, scores, time.perf_counter() - began

    def _advantages(
        self, completions: Sequence[Completion], scores: Scores, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Float [B], or [B, T] from rewards of steps; bool [B]: rows of groups that teach nothing."""
        config = self.config
        groups = jnp.repeat(jnp.arange(config.prompts), config.samples)
        if config.advantages != "process":
            totals, known = jnp.asarray(scores.total, jnp.float32), jnp.asarray(~scores.failed)
            return jax.device_get(group_advantages(totals, groups, config.prompts, config.advantages, known))
        steps = [() if failed else its for its, failed in zip(scores.steps, scores.failed, strict=True)]
        score, row, place = map(jnp.asarray, flat_steps(self.sampler, completions, steps))
        advantages = np.asarray(process_advantages(score, row, place, groups, config.prompts, length))
        varied = (advantages != 0).any(axis=1).reshape(config.prompts, -1).any(axis=1)
        return advantages, np.repeat(~varied, config.samples)

    def _length(self, completions: Sequence[Completion]) -> int:
        """Places of a row: few different ones, so that few programs are compiled."""
        needed = max(len(c.prompt) + len(c.generation.tokens) for c in completions) - 1
        longest = self.config.max_prompt_tokens + self.config.max_new_tokens - 1
        return few_lengths(needed, longest)

    def _packed(
        self, completions: Sequence[Completion], scores: Scores, advantages: np.ndarray, length: int
    ) -> Rollouts:
        config, tokenizer = self.config, self.sampler.prompter.tokenizer
        rollouts = pack(
            [c.prompt for c in completions], [c.generation for c in completions], advantages, length,
            pad_id=tokenizer.pad_id,
        )  # fmt: skip
        left_out = scores.failed | np.array([c.truncated and config.truncated == "mask" for c in completions])
        return replace(rollouts, mask=rollouts.mask & ~left_out[:, None])

    def _parts(self, state: PolicyState, rollouts: Rollouts, number: int) -> list[Rollouts]:
        """The completions of each update, on the mesh; with old log-probabilities where there are several."""
        config = self.config
        order = np.arange(config.completions)
        if config.updates > 1:
            order = np.random.default_rng((config.seed, number)).permutation(order)
        size = config.completions // config.updates
        parts = []
        for first in range(0, config.completions, size):
            rows = order[first : first + size]
            parts.append(placed(jax.tree.map(lambda x, rows=rows: x[rows], rollouts), self.session.mesh))
        if config.updates == 1:
            return parts
        variables = variables_of(state.params, state.router)
        logprobs = self.session.compiled(self.logprobs, variables, parts[0])
        return [replace(part, old_logprobs=logprobs(variables, part)[0]) for part in parts]

    def _beat(self) -> None:
        self.session.watchdog.beat(f"rollouts of step {self.session.step + 1}")
        if self.session.interrupt.requested and jax.process_count() == 1:  # this thread has been left behind
            raise Stopped(f"{self.session.interrupt.requested} came")

    def _count_barren(self, barren: bool) -> None:
        self.barren = self.barren + 1 if barren else 0
        if self.barren >= self.config.max_barren_steps:
            raise NothingToLearn(
                f"for {self.barren} steps in a row the completions of every problem had the same reward, up to step "
                f"{self.session.step + 1}: the policy solves all of these problems, or none. Look into the folder rollouts; "
                f"give other problems, or a base that solves some. GRPO.max_barren_steps sets the limit"
            )
