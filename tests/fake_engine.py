"""An engine without a model, for what stands in front of one: it says given texts, a token a step."""

import threading
import time
from collections import deque

from deepseek_jax.data.tokenizer import Tokenizer, byte_tokenizer


class FakeGeneration:
    def __init__(self, request, sample):
        self.request, self.sample = request, sample
        self.tokens, self.logprobs, self.text, self.finish_reason = [], [], "", None


class FakeEngine:
    """As `infer.engine.Engine`, from outside.

    Fields:
        going: cleared, no step makes a token, though commands are still taken.
        failure: raised by the next step.
    """

    def __init__(self, tokenizer, answer, slots=2, places=256):
        """`answer` is the text, or a function of a FakeGeneration that gives it."""
        self.tokenizer, self.answer, self.slots, self.places = tokenizer, answer, slots, places
        self.queue, self.running, self.cancelled = deque(), [], []
        self.going, self.failure = threading.Event(), None
        self.going.set()

    @property
    def busy(self):
        return bool(self.queue or self.running)

    @property
    def waiting(self):
        return len(self.queue)

    def submit(self, request):
        if any(token >= self.tokenizer.vocab_size for token in request.prompt):
            raise ValueError(f"prompt has ids outside the vocabulary of {self.tokenizer.vocab_size}")
        made = [FakeGeneration(request, sample) for sample in range(request.samples)]
        for generation in made:
            text = self.answer(generation) if callable(self.answer) else self.answer
            generation.script = [*self.tokenizer.encode(text, special=True), self.tokenizer.eos_id]
        self.queue += made
        return made

    def cancel(self, generation):
        generation.finish_reason = "cancelled"
        (self.queue if generation in self.queue else self.running).remove(generation)
        self.cancelled.append(generation)

    def step(self):
        if self.failure is not None:
            raise self.failure
        if not self.going.is_set():
            time.sleep(0.002)
            return
        while self.queue and len(self.running) < self.slots:
            self.running.append(self.queue.popleft())
        for generation in list(self.running):
            self._take(generation)
            if generation.finish_reason is not None:
                self.running.remove(generation)

    def _take(self, generation):
        sampling, tokens = generation.request.sampling, generation.tokens
        tokens.append(generation.script[len(tokens)])
        generation.logprobs.append(-0.5)
        ended = tokens[-1] in sampling.stop_ids
        text = self.tokenizer.decode(tokens[: len(tokens) - ended])
        cut = min((text.find(stop) for stop in sampling.stop if stop in text), default=-1)
        if not text.endswith("\ufffd"):
            generation.text = text if cut < 0 else text[:cut]
        if ended or cut >= 0:
            generation.finish_reason = "stop"
        elif len(tokens) >= sampling.max_new_tokens:
            generation.finish_reason = "length"


def tokenizer_with(*names):
    """The byte tokenizer with further tokens."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_buffer(byte_tokenizer()._json_bytes)
    backend.add_special_tokens(list(names))
    return Tokenizer(backend.to_str().encode())
