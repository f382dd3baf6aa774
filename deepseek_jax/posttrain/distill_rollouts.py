"""Batches that the student writes itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.posttrain.begin import Start
from deepseek_jax.posttrain.distill_config import OnPolicy
from deepseek_jax.posttrain.distill_step import Batch
from deepseek_jax.posttrain.grpo_log import means, of_lengths
from deepseek_jax.posttrain.policy import PolicyState, variables_of
from deepseek_jax.posttrain.prompts import Problems, Prompter
from deepseek_jax.posttrain.rewards import Scorer
from deepseek_jax.posttrain.rollout import pack
from deepseek_jax.posttrain.rows import few_lengths
from deepseek_jax.posttrain.sampler import Completion, Sampler
from deepseek_jax.posttrain.session import Line, Session


class Rollouts:
    """Completions of the student, sampled with the weights that are trained; the position is that of the problems."""

    evaluates = True

    def __init__(self, method: OnPolicy, seed: int, rows: int, session: Session, start: Start, scorer: Scorer | None):
        """
        Args:
            method: what is sampled.
            seed: of the run.
            rows: of a batch of an evaluation.
            session: that the run is in.
            start: the student.
            scorer: of the rewards of an evaluation; None: there are none.

        Raises: ValueError for problems that cannot be read, and a template that the tokenizer cannot write.
        """
        self.method, self.seed, self.rows, self.session, self.scorer = method, seed, rows, session, scorer
        self.position, self.test = (Problems(method.problems, split, seed) for split in ("train", "test"))
        self.sampler = Sampler(
            start.model, Prompter.of(start.tokenizer, start.template), max_prompt_tokens=method.max_prompt_tokens,
            max_new_tokens=method.max_new_tokens, slots=min(method.slots, method.rows),
        )  # fmt: skip
        self.facts: Line = {}

    def next(self, state: PolicyState) -> tuple[Batch, Line]:
        """A step's completions, by numpy, and figures of them.

        Raises: Stopped where a signal comes meanwhile.
        """
        method, seed = self.method, f"{self.seed}/{self.session.step}"
        # Here, not beside: a thread that is left behind by a signal must not move the position on.
        problems, skipped = self.sampler.draw(self.position, method.prompts)

        def sample() -> list[Completion]:
            self.sampler.load(variables_of(state.params, state.router))
            return self.sampler.complete(
                problems, method.samples, seed, temperature=method.temperature, beat=self._beat
            )

        completions = self.session.aside(sample)
        return self._packed(completions), {**of_lengths(completions), "prompts_too_long": skipped}

    def evaluation(self, state: PolicyState) -> tuple[Iterator[Batch], Line]:
        """Completions of problems of the test split, one each, sampled as in training and with the same noise at every
        evaluation; and the mean rewards of greedy answers."""
        method = self.method
        self.sampler.load(variables_of(state.params, state.router))
        self.test.set_state({"next": 0})
        problems, _ = self.sampler.draw(self.test, method.eval_problems)
        line: Line = {}
        if self.scorer is not None:
            greedy = self.sampler.complete(problems, 1, "evaluation", temperature=0.0, beat=self._beat)
            scores = self.scorer.score([c.item(i) for i, c in enumerate(greedy)])
            line = {
                **means(scores),
                **{f"greedy_{name}": float(of_lengths(greedy)[name]) for name in ("length_mean", "truncated")},
            }
        completions = self.sampler.complete(problems, 1, "evaluation", temperature=method.temperature, beat=self._beat)

        def batches() -> Iterator[Batch]:
            for first in range(0, len(completions), self.rows):
                part = completions[first : first + self.rows]
                batch = self._packed([*part, *[part[0]] * (self.rows - len(part))])
                yield batch.replace(mask=batch.mask & (np.arange(self.rows) < len(part))[:, None])  # type: ignore

        return batches(), line

    def _packed(self, completions: Sequence[Completion]) -> Batch:
        needed = max(len(c.prompt) + len(c.generation.tokens) for c in completions) - 1
        length = few_lengths(needed, self.method.places - 1)
        rows = pack(
            [c.prompt for c in completions], [c.generation for c in completions], np.zeros(len(completions)), length,
            pad_id=self.sampler.prompter.tokenizer.pad_id,
        )  # fmt: skip
        return Batch(rows.tokens, rows.mask)

    def _beat(self) -> None:
        self.session.watchdog.beat(f"rollouts of step {self.session.step + 1}")
