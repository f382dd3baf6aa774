"""Rollouts by the project's own engine, with the very weights that are trained."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax.infer.engine import Engine, Generation, Request, Sampling
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.mesh import use_mesh
from deepseek_jax.parallel.rules import degree, tree_shardings
from deepseek_jax.posttrain.prompts import Problems, Prompter
from deepseek_jax.posttrain.rewards import Item
from deepseek_jax.posttrain.rollout import require_same
from deepseek_jax.posttrain.tasks import Problem


@dataclass(frozen=True)
class Completion:
    """One sample of one problem.

    Fields:
        problem: what was asked.
        prompt: its ids.
        generation: what the policy wrote, ended.
        text: the same as text, as rewards read it.
    """

    problem: Problem
    prompt: list[int]
    generation: Generation
    text: str

    @property
    def truncated(self) -> bool:
        """Whether it was cut off at the limit instead of ending itself."""
        return self.generation.finish_reason == "length"

    def item(self, group: int) -> Item:
        """For a reward."""
        return Item(
            problem=self.problem, completion=self.text, tokens=len(self.generation.tokens), truncated=self.truncated,
            group=group,
        )  # fmt: skip


class Sampler:
    """An engine that is given new weights before it generates, and refuses to generate from others."""

    def __init__(
        self, model: DeepSeek, prompter: Prompter, *, max_prompt_tokens: int, max_new_tokens: int, slots: int,
        keep_routing: bool = False, keep_sampling_mask: bool = False, mesh: Mesh | None = None,
    ):  # fmt: skip
        """
        Args:
            model: of the policy.
            prompter: makes ids of problems and texts of completions.
            max_prompt_tokens: longer prompts are passed over.
            max_new_tokens: of a completion.
            slots: completions that are decoded at once.
            keep_routing: record the experts of every token.
            keep_sampling_mask: record what top_k, top_p and min_p left to draw from.
            mesh: layout of the rollouts; None: the ambient one, that of the updates.
        """
        self.mesh = mesh
        self.model, self.prompter = model, prompter
        self.max_prompt_tokens, self.max_new_tokens = max_prompt_tokens, max_new_tokens
        self._shardings = {} if mesh is None else tree_shardings(mesh, abstract_variables(model.config))
        with use_mesh(mesh):
            slots = -(-slots // degree("batch")) * degree("batch")  # what a mesh can split
            self.engine = Engine(
                model, None, slots=slots, places=max_prompt_tokens + max_new_tokens, chunk=min(max_prompt_tokens, 1024),
                decode_steps=min(max_new_tokens, 16), prefill_rows=min(8, slots),
                # The trainer's softmax has all rows of the head, so the sampler's has too.
                vocab_size=model.config.vocab_size, record_experts=keep_routing, record_kept=keep_sampling_mask,
            )  # fmt: skip

    def load(self, variables: Any) -> None:
        """Takes the trainer's weights, and makes sure that it has them.

        Raises: ValueError naming leaves that differ.
        """
        moved = variables
        if self.mesh is not None:
            moved = {name: jax.device_put(tree, self._shardings[name]) for name, tree in variables.items()}
        with use_mesh(self.mesh):
            self.engine.load(moved)
        if self.engine.weights is None:
            raise ValueError("the sampler has no weights: give it the trainer's before it generates")
        require_same(self.model, variables, self.engine.weights, self.mesh)

    def release(self) -> None:
        """Frees weights and caches, whose memory the update can have; `load` brings them back."""
        self.engine.unload()

    def draw(self, problems: Problems, count: int) -> tuple[list[Problem], int]:
        """The next problems whose prompts are not longer than `max_prompt_tokens`, and how many were passed over.

        Raises: ValueError where nearly all are longer.
        """
        taken: list[Problem] = []
        skipped = 0
        while len(taken) < count:
            [problem] = problems.take(1)
            if (length := len(self.prompter.ids(problem.prompt))) <= self.max_prompt_tokens:
                taken.append(problem)
                continue
            skipped += 1
            if skipped > 100 + 10 * len(taken):
                raise ValueError(
                    f"max_prompt_tokens = {self.max_prompt_tokens}: {skipped} prompts are longer, the last one has {length} "
                    f"tokens ({problem.prompt[:60]!r} …): raise it, or give other problems"
                )
        return taken, skipped

    def complete(
        self,
        problems: Sequence[Problem],
        samples: int,
        seed: str,
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        beat: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        """`samples` completions of each problem, one problem's after the other's.

        Args:
            problems: what is asked.
            samples: of each.
            seed: any text: with a problem's place it decides its noise.
            temperature, top_p, top_k: see `Sampling`.
            beat: called between steps of decoding; what it raises ends the rollout.

        Raises: ValueError for a prompt that does not fit.
        """
        requests = []
        for place, problem in enumerate(problems):
            ids = self.prompter.ids(problem.prompt)
            sampling = Sampling(
                max_new_tokens=self.max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                seed=zlib.crc32(f"{seed}/{place}".encode()), stop_ids=self.prompter.stop_ids,
            )  # fmt: skip
            requests.append(Request(prompt=ids, sampling=sampling, samples=samples))
        with use_mesh(self.mesh):
            groups = [self.engine.submit(request) for request in requests]
            try:
                while self.engine.busy:
                    self.engine.step()
                    beat()
            finally:
                for generation in (generation for group in groups for generation in group):
                    self.engine.cancel(generation)  # of those that have not ended
        return [
            Completion(problem, list(request.prompt), generation, self.prompter.text(generation.tokens))
            for problem, request, group in zip(problems, requests, groups, strict=True)
            for generation in group
        ]
