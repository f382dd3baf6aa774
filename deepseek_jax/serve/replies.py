"""What a client gets: the engine's deltas as objects of the OpenAI API, whole or in chunks."""

from __future__ import annotations

import json
import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from deepseek_jax.serve.calls import Call, Served
from deepseek_jax.serve.parts import Parts, Splitter
from deepseek_jax.serve.worker import Delta

_LOWEST_LOGPROB = -9999.0  # as the OpenAI API says it: JSON has no infinities


@dataclass
class Choice:
    """One answer as it grows."""

    stop_ids: tuple[int, ...]
    splitter: Splitter | None
    """None outside chats."""
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    n_tokens: int = 0
    finish_reason: str | None = None
    tokens: list[int] = field(default_factory=list)
    """Without the token that ended the answer; so are the log-probabilities."""
    logprobs: list[float] = field(default_factory=list)

    def add(self, delta: Delta) -> tuple[Parts, slice]:
        """Takes a delta in; returns its text, split, and which of `tokens` are new."""
        last, before = delta.finish_reason is not None, len(self.tokens)
        parts = Parts("", delta.text, []) if self.splitter is None else self.splitter.feed(delta.text, last=last)
        self.reasoning += parts.reasoning
        self.text += parts.content
        # Clients tell calls apart by their ids, over a whole conversation; a template only numbers those of one answer.
        parts = parts._replace(tool_calls=[{**call, "id": f"call_{uuid.uuid4().hex}"} for call in parts.tool_calls])
        self.tool_calls += parts.tool_calls
        self.n_tokens += len(delta.tokens)
        ended_by_id = delta.finish_reason == "stop" and delta.tokens and delta.tokens[-1] in self.stop_ids
        shown = len(delta.tokens) - bool(ended_by_id)
        self.tokens += delta.tokens[:shown]
        self.logprobs += delta.logprobs[:shown]
        if last:
            self.finish_reason = "tool_calls" if self.tool_calls else delta.finish_reason
        return parts, slice(before, len(self.tokens))


class Reply:
    """The answer to one call."""

    def __init__(self, call: Call, served: Served):
        self.call, self.served = call, served
        prefix, kind = ("chatcmpl", "chat.completion") if call.chat else ("cmpl", "text_completion")
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        self._choices = [
            Choice(request.sampling.stop_ids, Splitter(served.template, call.thinking) if call.chat else None)
            for request in call.requests
            for _ in range(request.samples)
        ]
        # Characters of the tokens told, for completions with log-probabilities.
        self._offsets = [0] * len(self._choices)
        self._whole = [Delta(index, "", [], [], None) for index in range(len(self._choices))]

    def add(self, delta: Delta) -> None:
        """Keeps a delta for the whole answer."""
        so_far = self._whole[delta.index]
        self._whole[delta.index] = Delta(
            delta.index, so_far.text + delta.text, so_far.tokens + delta.tokens, so_far.logprobs + delta.logprobs,
            delta.finish_reason,
        )  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The answer, after every delta. It is split once: the end may show that a model has thought."""
        choices = []
        for index, choice in enumerate(self._choices):
            choice.add(self._whole[index])
            body: dict[str, Any] = {"index": index}
            if self.call.chat:
                message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
                if choice.reasoning:
                    message["reasoning_content"] = choice.reasoning
                if choice.tool_calls:
                    message |= {"content": choice.text or None, "tool_calls": choice.tool_calls}
                body["message"] = message
            else:
                body["text"] = choice.text
            body |= {"logprobs": self._logprobs(index, slice(None)), "finish_reason": choice.finish_reason}
            choices.append(body)
        return {**self._head, "model": self.served.name, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first delta: in chats, who speaks."""
        if not self.call.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, {"delta": delta}, None, None) for i in range(len(self._choices))]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks that tell a delta: none where it holds nothing to show."""
        choice = self._choices[delta.index]
        parts, new = choice.add(delta)
        body: dict[str, Any] = {}
        if not self.call.chat:
            body["text"] = parts.content
        else:
            said: dict[str, Any] = {}
            if parts.reasoning:
                said["reasoning_content"] = parts.reasoning
            if parts.content:
                said["content"] = parts.content
            if parts.tool_calls:
                said["tool_calls"] = [{"index": i, **call} for i, call in enumerate(parts.tool_calls)]
            body["delta"] = said
        empty = not (parts.reasoning or parts.content or parts.tool_calls or choice.finish_reason)
        if empty and not (self.call.logprobs and choice.tokens[new]):
            return []
        return [self._chunk(delta.index, body, self._logprobs(delta.index, new), choice.finish_reason)]

    def closing(self) -> list[dict[str, Any]]:
        """The chunks after the last delta: the usage, where the call asks for it."""
        if not self.call.include_usage:
            return []
        return [{**self._chunk_head(), "choices": [], "usage": self._usage()}]

    def _chunk(self, index: int, body: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.call.include_usage else {}
        return {**self._chunk_head(), "choices": [choice], **usage}

    def _chunk_head(self) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self.call.chat else {}
        return {**self._head, **kind, "model": self.served.name}

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.call.prompt_tokens, sum(choice.n_tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _logprobs(self, index: int, which: slice) -> dict[str, Any] | None:
        """Log-probabilities of the tokens `which` of a choice, in the form of the endpoint."""
        if not self.call.logprobs:
            return None
        choice = self._choices[index]
        texts = [self.served.tokenizer.decode([token]) for token in choice.tokens[which]]
        numbers = [number if math.isfinite(number) else _LOWEST_LOGPROB for number in choice.logprobs[which]]
        if self.call.chat:
            content = [
                {"token": text, "logprob": number, "bytes": self._bytes(token), "top_logprobs": []}
                for token, text, number in zip(choice.tokens[which], texts, numbers, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {"tokens": texts, "token_logprobs": numbers, "top_logprobs": None, "text_offset": offsets}

    def _bytes(self, token: int) -> list[int] | None:
        try:
            return list(self.served.tokenizer.token_bytes(token))
        except ValueError:  # a SentencePiece vocabulary: a token is not always the same bytes
            return None


def event(body: dict[str, Any] | str) -> bytes:
    """One server-sent event: an object as JSON, or a word such as `[DONE]`."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
