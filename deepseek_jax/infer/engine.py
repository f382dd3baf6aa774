"""Generation from caches: slots that requests share, prefill in chunks, decoding that stays on the device.

A prompt is prefilled alone, by itself, into a slot; all slots decode together, several steps at a time, and a slot whose
request has ended is refilled at once. Shapes depend on the number of slots, the places of a slot and a few widths of
chunks only, so programs are few, and a request's result depends on no other: every operation of a step treats rows alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import platform
from deepseek_jax.infer import programs
from deepseek_jax.infer.requests import Generation, Request, check
from deepseek_jax.infer.sampling import DRAWS, Sampling, settings
from deepseek_jax.layers.experts import FEW_ROWS
from deepseek_jax.models.cached import init_cache, unstack
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import degree


@dataclass(eq=False)
class _Job:
    """A request on its way into slots."""

    request: Request
    generations: list[Generation]
    entered: int = 0
    prefilled: programs.Prefilled | None = None
    experts: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Running:
    """A generation in a slot."""

    job: _Job
    generation: Generation
    stream: Any
    experts: list[np.ndarray] = field(default_factory=list)


class Engine:
    """A model with caches, ready for requests.

    ```python
    engine = Engine(model, variables, slots=8, places=1024)
    results = engine.generate([Request(prompt=ids, sampling=Sampling(max_new_tokens=64)), …])
    ```

    or, one step at a time, `submit`, `step` while `busy`, `cancel`. One thread uses an engine at a time.
    """

    def __init__(
        self, model: DeepSeek, variables: Any, *, slots: int = 8, places: int = 1024, chunk: int = 256,
        decode_steps: int = 8, vocab_size: int | None = None, tokenizer: Any = None, speculate: bool = False,
        record_experts: bool = False, consume: bool = False,
    ):  # fmt: skip
        """
        Args:
            model: the model.
            variables: its parameters and, where it has them, selection biases. The engine takes a copy, layer by layer,
                in the compute dtype.
            slots: requests that are decoded together.
            places: tokens of prompt and continuation that a slot holds.
            chunk: most tokens of a prompt that are run at once.
            decode_steps: steps of all slots before the host looks at their tokens.
            vocab_size: ids from here on are never chosen, where the tokenizer has fewer than the model has rows.
            tokenizer: gives `Generation.text`, and knows `Sampling.stop` by it.
            speculate: decode with the model's first multi-token module: the same tokens in fewer steps.
            record_experts: fill `Generation.experts`.
            consume: free `variables` while taking the copy.

        Raises:
            ValueError: a number below 1, more places than the model has positions, or a model that cannot do what is asked.
        """
        config = model.config
        for name, value in (("slots", slots), ("places", places), ("chunk", chunk), ("decode_steps", decode_steps)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if places > config.max_position_embeddings:
            raise ValueError(
                f"places = {places}: {config.name} has max_position_embeddings = {config.max_position_embeddings}"
            )
        if speculate and not config.num_nextn_predict_layers:
            raise ValueError(
                f"speculate = True: {config.name} has no multi-token module (num_nextn_predict_layers = 0)"
            )
        if record_experts and not config.num_moe_layers:
            raise ValueError(f"record_experts = True: {config.name} has no experts")
        if slots % degree("batch"):
            raise ValueError(f"slots = {slots}: the mesh splits a batch in {degree('batch')}; give a multiple of it")
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.places, self.decode_steps = slots, places, decode_steps
        self.chunk = min(_power_of_two(chunk), _power_of_two(places))
        self.vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
        self.speculate, self.record_experts = speculate, record_experts
        on_one_gpu = platform.target() == "gpu" and jax.sharding.get_abstract_mesh().size <= 1
        few_rows = on_one_gpu and slots * (1 + speculate) <= FEW_ROWS
        self.weights = None
        if variables is not None:
            self.weights = unstack(model, variables, few_rows=few_rows, consume=consume)
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Running] = {}
        self._state: programs.Slots | None = None

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Requests that have not all their samples in slots."""
        return len(self._waiting)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Continues every request, in the order given, the samples of each one after the other.

        Raises:
            ValueError: as `submit`, naming the request; nothing has run then.
        """
        for i, request in enumerate(requests):
            self._check(i, request)
        generations = [generation for request in requests for generation in self.submit(request)]
        while self.busy:
            self.step()
        return generations

    def submit(self, request: Request) -> list[Generation]:
        """Puts a request into the queue: its samples, which grow with every `step`.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, one that does not fit a slot, or an impossible
                wish.
        """
        self._check(0, request)
        generations = [Generation() for _ in range(request.samples)]
        self._waiting.append(_Job(request, generations))
        return generations

    def cancel(self, generation: Generation) -> None:
        """Ends a generation, wherever it is; its slot is free at once."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"
        for slot, running in list(self._running.items()):
            if running.generation is generation:
                self._end(slot, "cancelled")
        for job in list(self._waiting):
            if all(g.finish_reason == "cancelled" for g in job.generations[job.entered :]):
                self._waiting.remove(job)

    def step(self) -> None:
        """Fills free slots from the queue, then decodes `decode_steps` steps of every slot."""
        if self._state is None:
            self._state = self._empty()
        firsts = self._admit()
        if not self._running:
            return
        resting = np.array([slot not in self._running for slot in range(self.slots)])
        draws = max((r.job.request.sampling.draws for r in self._running.values()), key=DRAWS.index)
        self._state, out = programs.decode(
            self.model, self.decode_steps, draws, self.record_experts, self.weights, self._state, resting
        )
        firsts, out = jax.device_get((firsts, out))
        for slot, token in firsts.items():
            self._take(slot, *token)
        for slot in list(self._running):
            self._collect(slot, out)

    def _admit(self) -> dict[int, Any]:
        """Prefills waiting prompts into free slots; slot -> first token and its log-probabilities, on the device."""
        firsts: dict[int, Any] = {}
        for slot in range(self.slots):
            while self._waiting and slot not in self._running:
                job = self._waiting[0]
                sample, generation = job.entered, job.generations[job.entered]
                job.entered += 1
                if job.entered == len(job.generations):
                    self._waiting.popleft()
                if generation.finish_reason is None:
                    firsts[slot] = self._enter(slot, job, sample)
        return firsts

    def _enter(self, slot: int, job: _Job, sample: int) -> Any:
        request, W = job.request, self.model.config.vocab_size
        if job.prefilled is None:
            job.prefilled = self._prefill(job)
        seen = np.zeros((1, W), bool)
        seen[0, np.asarray(request.prompt)] = True
        allowed = np.arange(W)[None] < self.vocab_size
        if request.allowed is not None:
            allowed = allowed & request.allowed[None]
        self._state, *first = programs.enter(
            self.model, request.sampling.draws, self.weights, self._state, job.prefilled, slot,
            np.int32(len(request.prompt)), seen, settings([request.sampling], allowed, [sample]),
        )  # fmt: skip
        if job.entered == len(job.generations):
            job.prefilled = None
        self._running[slot] = _Running(job, job.generations[sample], self._stream(request))
        return first

    def _prefill(self, job: _Job) -> programs.Prefilled:
        """Runs a prompt, chunk by chunk."""
        prompt, rows = np.asarray(job.request.prompt, np.int32), degree("batch")
        cache = hidden = None
        for start in range(0, len(prompt), self.chunk):
            part = prompt[start : start + self.chunk]
            width = min(_power_of_two(len(part)), self.chunk)
            tokens = np.zeros((rows, width), np.int32)
            tokens[:, : len(part)] = part
            positions = np.full((rows, width), self.places, np.int32)
            positions[:, : len(part)] = np.arange(start, start + len(part))
            following = np.full((rows, width), -1, np.int32)
            after = prompt[start + 1 : start + len(part) + 1]
            following[:, : len(after)] = after
            hidden, cache, experts = programs.prefill(
                self.model, self.places, self.speculate, self.weights, tokens, positions, cache, following
            )
            hidden = hidden[:, len(part) - 1]
            if self.record_experts:
                job.experts.append(experts[: len(part)])
        assert cache is not None and hidden is not None
        return programs.Prefilled(cache, hidden)

    def _collect(self, slot: int, out: programs.Decoded) -> None:
        """Takes what some steps gave a slot, up to its end."""
        for step in range(self.decode_steps):
            running = self._running[slot]
            count = int(out.counts[step, slot])
            running.generation.drafts += self.speculate
            running.generation.accepted += count - 1
            if out.experts is not None:
                running.experts.extend(out.experts[step, :, slot, j] for j in range(count))
            for j in range(count):
                token = (column[step, slot, j] for column in (out.tokens, out.logprobs, out.sampled_logprobs))
                self._take(slot, *token)
                if slot not in self._running:
                    return

    def _take(self, slot: int, token: Any, logprob: Any, sampled_logprob: Any) -> None:
        """Adds a token to a slot's generation, and ends it where that was the last."""
        running = self._running[slot]
        generation, sampling = running.generation, running.job.request.sampling
        generation.tokens.append(int(token))
        generation.logprobs.append(float(logprob))
        generation.sampled_logprobs.append(float(sampled_logprob))
        stopped = int(token) in sampling.stop_ids
        if running.stream is not None and not stopped:
            running.stream.push([int(token)])
            generation.text, stopped = running.stream.text, running.stream.stopped
        if stopped:
            self._end(slot, "stop")
        elif len(generation.tokens) >= sampling.max_new_tokens:
            self._end(slot, "length")

    def _end(self, slot: int, reason: Literal["stop", "length", "cancelled"]) -> None:
        running = self._running.pop(slot)
        generation = running.generation
        generation.finish_reason = reason
        if running.stream is not None:
            running.stream.finish()
            generation.text = running.stream.text
        if self.record_experts:
            rows = [*jax.device_get(running.job.experts), np.stack(running.experts)[: len(generation.tokens) - 1]]
            generation.experts = np.concatenate([row for row in rows if len(row)])

    def _stream(self, request: Request) -> Any:
        if self.tokenizer is None:
            return None
        from deepseek_jax.data.stream import TextStream

        return TextStream(self.tokenizer, request.sampling.stop)

    def _empty(self) -> programs.Slots:
        B, W = self.slots, self.model.config.vocab_size
        return programs.Slots(
            cache=init_cache(self.model.config, B, self.places, mtp=self.speculate),
            token=jnp.zeros(B, jnp.int32),
            place=jnp.full(B, self.places, jnp.int32),
            step=jnp.zeros(B, jnp.int32),
            seen=jnp.zeros((B, W), bool),
            given=jax.tree.map(jnp.asarray, settings([Sampling()] * B, np.ones((B, W), bool))),
            draft=jnp.zeros(B, jnp.int32) if self.speculate else None,
        )

    def _check(self, number: int, request: Request) -> None:
        check(
            request, f"prompt {number}", vocabulary=self.model.config.vocab_size, choosable=self.vocab_size,
            places=self.places, texts=self.tokenizer is not None,
        )  # fmt: skip


def _power_of_two(n: int) -> int:
    return max(1 << (n - 1).bit_length(), 8)


__all__ = ["Engine", "Generation", "Request", "Sampling"]
