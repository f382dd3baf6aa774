"""What the engine keeps on the host of a request on its way, and of a generation in a slot."""

from __future__ import annotations

import zlib
from typing import Any, Literal

import jax
import numpy as np

from deepseek_jax.infer.programs import Prefilled
from deepseek_jax.infer.requests import Generation, Request


class Job:
    """A request on its way into slots, with arrays of its own: the caller may change what it gave."""

    def __init__(self, request: Request, choosable: int, vocabulary: int):
        self.request = request
        self.generations = [Generation() for _ in range(request.samples)]
        self.prompt = np.array(request.prompt, np.int32)
        self.salt = zlib.crc32(self.prompt.tobytes())
        self.seen = np.zeros(vocabulary, bool)
        self.seen[self.prompt] = True
        self.allowed = np.arange(vocabulary) < choosable
        if request.allowed is not None:
            self.allowed &= np.asarray(request.allowed)
        self.entered = 0
        self.prefilled: Prefilled | None = None
        self.row = 0
        """Which of the prefilled prompts this one is."""
        self.experts: list[tuple[Any, int]] = []
        """Of each chunk of the prompts, and how many tokens of it are this one's."""


class Running:
    """A generation in a slot."""

    def __init__(self, job: Job, generation: Generation, tokenizer: Any):
        self.job, self.generation = job, generation
        self._experts: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        self._stream: Any = None
        if tokenizer is not None:
            from deepseek_jax.data.stream import TextStream

            self._stream = TextStream(tokenizer, job.request.sampling.stop)

    def collect(self, out: Any, slot: int, *, drafts: bool) -> None:
        """Takes what some steps gave the slot (`programs.Decoded`, on the host), up to the generation's end."""
        columns = [c for c in (out.tokens, out.logprobs, out.sampled_logprobs, out.kept) if c is not None]
        for step in range(out.tokens.shape[0]):
            count = int(out.counts[step, slot])
            if self.generation.finish_reason is None and out.experts is not None:
                self._experts.extend(out.experts[step, :, slot, j] for j in range(count))
            for j in range(count):
                if self.generation.finish_reason is not None:
                    return
                self.generation.accepted += j
                self.take(*(column[step, slot, j] for column in columns))
                if j == 0 and drafts and self.generation.finish_reason is None:  # a draft that can still be of use
                    self.generation.drafts += 1

    def take(self, token: Any, logprob: Any, sampled_logprob: Any, kept: Any = None) -> None:
        """Adds a token, and ends the generation where it was the last."""
        generation, sampling = self.generation, self.job.request.sampling
        generation.tokens.append(int(token))
        generation.logprobs.append(float(logprob))
        generation.sampled_logprobs.append(float(sampled_logprob))
        if kept is not None:
            self._kept.append(kept)
        stopped = int(token) in sampling.stop_ids
        if self._stream is not None and not stopped:
            generation.text += self._stream.push([int(token)])
            stopped = self._stream.stopped
        if stopped:
            self.end("stop")
        elif len(generation.tokens) >= sampling.max_new_tokens:
            self.end("length")

    def end(self, reason: Literal["stop", "length", "cancelled"]) -> None:
        """Ends the generation: its text and records are whole now."""
        generation = self.generation
        generation.finish_reason = reason
        if self._stream is not None:
            generation.text += self._stream.finish()
        if self.job.experts:
            prompt = [chunk[self.job.row, :count] for chunk, count in jax.device_get(self.job.experts)]
            new = self._experts[: max(len(generation.tokens) - 1, 0)]
            generation.experts = np.concatenate([*prompt, *(row[None] for row in new)])
        if self._kept:
            generation.kept = np.stack(self._kept)
