"""Generation from caches: slots that requests share, prefill in chunks, decoding that stays on the device.

A prompt is prefilled alone, by itself, into a slot; all slots decode together, several steps at a time, and a slot whose
request has ended is refilled at once. Shapes depend on the number of slots, the places of a slot and a few widths of
chunks only, so programs are few, and a request's result depends on no other: every operation of a step treats rows alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import platform
from deepseek_jax.infer import programs
from deepseek_jax.infer.requests import Generation, Request, check
from deepseek_jax.infer.running import Job, Running
from deepseek_jax.infer.sampling import DRAWS, Sampling, settings
from deepseek_jax.layers.experts import FEW_ROWS
from deepseek_jax.models.cached import init_cache, unstack
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import degree


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
        decode_steps: int = 8, prefill_rows: int = 1, vocab_size: int | None = None, tokenizer: Any = None,
        speculate: bool = False, record_experts: bool = False, record_kept: bool = False, loop_layers: bool = False,
        consume: bool = False,
    ):  # fmt: skip
        """
        Args:
            model: the model.
            variables: its parameters and, where it has them, selection biases. The engine takes a copy, layer by layer,
                in the compute dtype.
            slots: requests that are decoded together.
            places: tokens of prompt and continuation that a slot holds.
            chunk: most tokens of a prompt that are run at once; rounded up to a power of two, at least 8, at most `places`.
            decode_steps: steps of all slots before the host looks at their tokens.
            prefill_rows: prompts of like lengths that are run at once; fewer are padded to so many, so that a prompt's
                programs do not depend on what waits beside it.
            vocab_size: ids from here on are never chosen, where the tokenizer has fewer than the model has rows; by default
                the tokenizer's, where one is given.
            tokenizer: gives `Generation.text`, and knows `Sampling.stop` by it.
            speculate: decode with the model's first multi-token module: the same tokens in fewer steps.
            record_experts: fill `Generation.experts`.
            record_kept: fill `Generation.kept`: ⌈W / 8⌉ bytes a new token. Refuses a repetition penalty.
            loop_layers: run layers in a loop: programs of sixty layers compile in the time of two. May run slower: kernels
                have each layer's weights copied out of their stack in every step.
            consume: free `variables` while taking the copy.

        Raises:
            ValueError: a number below 1, more places than the model has positions, or a model that cannot do what is asked.
        """
        config = model.config
        choosable: int = vocab_size if vocab_size is not None else getattr(tokenizer, "vocab_size", config.vocab_size)
        numbers = dict(
            slots=slots, places=places, chunk=chunk, decode_steps=decode_steps, prefill_rows=prefill_rows,
            vocab_size=choosable,
        )  # fmt: skip
        for name, value in numbers.items():
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
        self.chunk = min(_power_of_two(chunk), places)
        self.vocab_size = min(choosable, config.vocab_size)
        self._rows = -(-prefill_rows // degree("batch")) * degree("batch")
        self.speculate, self.record_experts, self.record_kept = speculate, record_experts, record_kept
        on_one_gpu = platform.target() == "gpu" and jax.sharding.get_abstract_mesh().size <= 1
        self._looped = loop_layers
        self._few_rows = on_one_gpu and not loop_layers and slots * (1 + speculate) <= FEW_ROWS
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Running] = {}
        self._state: programs.Slots | None = None
        self.weights = None
        if variables is not None:
            self.load(variables, consume=consume)

    def load(self, variables: Any, *, consume: bool = False) -> None:
        """Takes a copy of these variables, which generates from now on; `consume` frees them meanwhile.

        Raises: ValueError while requests wait or run: what they have came from other weights.
        """
        if self.busy:
            raise ValueError(f"{len(self._running)} requests run and {self.waiting} wait: let them end, or cancel them")
        self.weights = None  # gone before the new ones come
        self.weights = unstack(self.model, variables, few_rows=self._few_rows, looped=self._looped, consume=consume)

    def unload(self) -> None:
        """Lets go of weights and caches until `load`; no request may wait or run."""
        if self.busy:
            raise ValueError("requests wait or run: let them end, or cancel them")
        self.weights = self._state = None

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
            self._check(request, f"prompt {i}")
        generations = [generation for request in requests for generation in self.submit(request)]
        while any(generation.finish_reason is None for generation in generations):
            self.step()
        return generations

    def submit(self, request: Request) -> list[Generation]:
        """Puts a request into the queue: its samples, which grow with every `step`.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, one that does not fit a slot, or an impossible
                wish.
        """
        self._check(request, "the prompt")
        job = Job(request, self.vocab_size, self.model.config.vocab_size)
        self._waiting.append(job)
        return list(job.generations)

    def cancel(self, generation: Generation) -> None:
        """Ends a generation, wherever it is; its slot is free at once."""
        if generation.finish_reason is None:
            generation.finish_reason = "cancelled"
        for slot, running in list(self._running.items()):
            if running.generation is generation:
                self._running.pop(slot).end("cancelled")
        for job in list(self._waiting):
            if all(g.finish_reason == "cancelled" for g in job.generations[job.entered :]):
                self._waiting.remove(job)
                job.prefilled = None

    def step(self) -> None:
        """Fills free slots from the queue, then decodes `decode_steps` steps of every slot.

        Whatever is raised here (Ctrl-C, memory that runs out) cancels all requests: what the slots hold is then unknown.
        """
        try:
            self._step()
        except BaseException:
            for job in (*self._waiting, *(running.job for running in self._running.values())):
                for generation in job.generations:
                    generation.finish_reason = generation.finish_reason or "cancelled"
            self._waiting.clear()
            self._running.clear()
            self._state = None
            raise

    def _step(self) -> None:
        if self._state is None:
            self._state = self._empty()
        firsts, out = self._admit(), None
        if any(running.job.request.sampling.max_new_tokens > 1 for running in self._running.values()):
            resting = np.array([slot not in self._running for slot in range(self.slots)])
            draws = max((r.job.request.sampling.draws for r in self._running.values()), key=DRAWS.index)
            self._state, out = programs.decode(
                self.model, self.decode_steps, draws, self.record_experts, self.weights, self._state, resting,
                record_kept=self.record_kept,
            )  # fmt: skip
        firsts, out = jax.device_get((firsts, out))
        for slot, token in firsts.items():
            self._running[slot].take(*token)
        for slot, running in list(self._running.items()):
            if out is not None:
                running.collect(out, slot, drafts=self.speculate)
            if running.generation.finish_reason is not None:
                del self._running[slot]

    def _admit(self) -> dict[int, Any]:
        """Prefills waiting prompts into free slots; slot -> first token and its log-probabilities, on the device."""
        entries: list[tuple[int, Job, int]] = []
        left: list[Job] = []  # the queue, with all their samples in slots
        for slot in range(self.slots):
            while self._waiting and slot not in self._running:
                job = self._waiting[0]
                if (generation := job.generations[job.entered]).finish_reason is None:
                    entries.append((slot, job, job.entered))
                    self._running[slot] = Running(job, generation, self.tokenizer)
                job.entered += 1
                if job.entered == len(job.generations):
                    left.append(self._waiting.popleft())
        alike: dict[int, list[Job]] = {}  # by padded length: prompts with the same programs
        for job in dict.fromkeys(job for _, job, _ in entries if job.prefilled is None):
            full, rest = divmod(len(job.prompt), self.chunk)
            alike.setdefault(full * self.chunk + (self._width(rest) if rest else 0), []).append(job)
        for jobs in alike.values():
            for start in range(0, len(jobs), self._rows):
                self._prefill(jobs[start : start + self._rows])
        firsts = {slot: self._enter(slot, job, sample) for slot, job, sample in entries}
        for job in left:
            job.prefilled = None
        return firsts

    def _enter(self, slot: int, job: Job, sample: int) -> Any:
        sampling = job.request.sampling
        self._state, first = programs.enter(
            self.model, sampling.draws, self.record_kept, self.weights, self._state, job.prefilled, job.row, slot,
            np.int32(len(job.prompt)), job.seen[None], settings([sampling], job.allowed[None], [sample], job.salt),
        )  # fmt: skip
        return first

    def _width(self, tokens: int) -> int:
        """Of the chunk that so many tokens are run in."""
        return min(_power_of_two(tokens), self.chunk)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Runs prompts whose chunks have the same widths, chunk by chunk."""
        rows, cache, hidden = self._rows, None, None
        for start in range(0, max(len(job.prompt) for job in jobs), self.chunk):
            width = self._width(max(len(job.prompt) for job in jobs) - start)
            tokens = np.zeros((rows, width), np.int32)
            positions = np.full((rows, width), self.places, np.int32)
            following = np.full((rows, width), -1, np.int32)
            last = np.zeros(rows, np.int32)
            for row, job in enumerate(jobs):
                part = job.prompt[start : start + self.chunk]
                after = job.prompt[start + 1 : start + len(part) + 1]
                tokens[row, : len(part)] = part
                positions[row, : len(part)] = np.arange(start, start + len(part))
                following[row, : len(after)] = after
                last[row] = len(part) - 1
            hidden, cache, experts = programs.prefill(
                self.model, self.places, self.speculate, self.weights, tokens, positions, cache, following, last
            )
            if self.record_experts:
                for row, job in enumerate(jobs):
                    job.experts.append((experts, int(last[row]) + 1))
        assert cache is not None and hidden is not None
        for row, job in enumerate(jobs):
            job.prefilled, job.row = programs.Prefilled(cache, hidden), row

    def _empty(self) -> programs.Slots:
        B, W = self.slots, self.model.config.vocab_size
        return programs.Slots(
            cache=init_cache(self.model.config, B, self.places, mtp=self.speculate, looped=self._looped),
            token=jnp.zeros(B, jnp.int32),
            place=jnp.full(B, self.places, jnp.int32),
            step=jnp.zeros(B, jnp.int32),
            seen=jnp.zeros((B, W), bool),
            given=jax.tree.map(jnp.asarray, settings([Sampling()] * B, np.ones((B, W), bool))),
            draft=jnp.zeros(B, jnp.int32) if self.speculate else None,
        )

    def _check(self, request: Request, name: str) -> None:
        check(
            request, name, vocabulary=self.model.config.vocab_size, choosable=self.vocab_size, places=self.places,
            texts=self.tokenizer is not None, kept=self.record_kept,
        )  # fmt: skip


def _power_of_two(n: int) -> int:
    return max(1 << (n - 1).bit_length(), 8)


__all__ = ["Engine", "Generation", "Request", "Sampling"]
