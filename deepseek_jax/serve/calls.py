"""What a client asks for: bodies of the OpenAI API, read and checked, as requests to the engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from deepseek_jax.infer.engine import Request
from deepseek_jax.infer.sampling import Sampling
from deepseek_jax.serve.errors import ApiError, bad_field
from deepseek_jax.serve.fields import Fields, is_a
from deepseek_jax.serve.messages import read_messages, read_tools

# Fields that say who asks or where answers are kept, or that hint at caches: no answer depends on them.
_WITHOUT_EFFECT = (
    "user",
    "metadata",
    "safety_identifier",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
_COMPLETION_TOKENS = 16  # the OpenAI API's default for completions


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server offers, as far as a call is checked against it."""

    name: str
    """Of the model, in the API."""
    tokenizer: Any
    template: Any
    """Chat template, or None."""
    places: int
    """Tokens of prompt and answer together."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, ready for the engine."""

    requests: tuple[Request, ...]
    chat: bool
    stream: bool
    include_usage: bool
    """Whether a stream ends with the usage."""
    logprobs: bool
    thinking: bool = False

    @property
    def choices(self) -> int:
        return sum(request.samples for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)


def read_completion(body: dict[str, Any], served: Served) -> Call:
    """A call of /v1/completions.

    Raises: ApiError for whatever we would not answer as asked.
    """
    fields = Fields(body)
    _check_model(fields, served)
    prompts = _prompts(fields.require("prompt", str, list), served.tokenizer)
    fields.allow_only("echo", False)
    fields.allow_only("suffix", "")
    fields.allow_only("best_of", 1, why="is not supported (n draws several answers)")
    fields.allow_only("logprobs", 0, why="is not supported (0 gives the sampled tokens' log-probabilities)")
    stop_ids = (served.tokenizer.eos_id,)
    limit = fields.take("max_tokens", int, default=_COMPLETION_TOKENS)
    requests = _requests(fields, prompts, stop_ids, limit, "max_tokens", "prompt", served)
    stream, include_usage = _streaming(fields)
    fields.finish()
    logprobs = body.get("logprobs") is not None
    return Call(requests=requests, chat=False, stream=stream, include_usage=include_usage, logprobs=logprobs)


def read_chat(body: dict[str, Any], served: Served) -> Call:
    """A call of /v1/chat/completions.

    Raises: ApiError for whatever we would not answer as asked.
    """
    if served.template is None:
        raise ApiError(
            400,
            f"{served.name} has no chat template: call /v1/completions, or start the server with --template NAME",
            code="no_chat_template",
        )
    fields = Fields(body)
    _check_model(fields, served)
    template, tokenizer = served.template, served.tokenizer
    messages = read_messages(fields.require("messages", list))
    tools = read_tools(fields.take("tools", list, default=[]))
    if tools and not template.tools:
        raise bad_field("tools", f"chat template {template.name!r} knows no calls of tools: leave them out")
    options = Fields(fields.take("chat_template_kwargs", dict, default={}), "chat_template_kwargs.")
    thinking = options.take("thinking", bool, default=False)
    options.finish()
    choice = fields.take("tool_choice", str, dict, default="auto")
    if choice not in ("auto", "none"):
        raise bad_field("tool_choice", "only auto and none are supported: the model decides", "unsupported_parameter")
    if choice == "none":
        tools = []
    fields.allow_only("parallel_tool_calls", True)
    fields.allow_only("response_format", {"type": "text"})
    fields.allow_only("modalities", ["text"])
    fields.allow_only("store", False)
    logprobs = fields.take("logprobs", bool, default=False)
    fields.allow_only("top_logprobs", 0, why="is not supported (logprobs gives the sampled tokens' alone)")
    limit, limit_name = _chat_limit(fields)
    try:
        prompt = template.encode(tokenizer, messages, tools=tools, thinking=thinking, add_generation_prompt=True).ids
    except ValueError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None
    stop_ids = tuple(template.stop_ids(tokenizer))
    requests = _requests(fields, [prompt], stop_ids, limit, limit_name, "messages", served)
    stream, include_usage = _streaming(fields)
    fields.finish()
    return Call(
        requests=requests, chat=True, stream=stream, include_usage=include_usage, logprobs=logprobs,
        thinking=thinking,
    )  # fmt: skip


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.require("model", str)
    if name != served.name:
        raise ApiError(
            404, f"model {name!r} is not served here: this is {served.name!r}", param="model", code="model_not_found"
        )


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether with its usage."""
    stream = fields.take("stream", bool, default=False)
    given = fields.take("stream_options", dict)
    if given is not None and not stream:
        raise bad_field("stream_options", "only goes with stream = true")
    options = Fields(given or {}, "stream_options.")
    include_usage = options.take("include_usage", bool, default=False)
    options.ignore("include_obfuscation")  # padding against listeners on the line; chunks say the same without it
    options.finish()
    return stream, include_usage


def _chat_limit(fields: Fields) -> tuple[int | None, str]:
    """The most tokens of an answer, and the field that says so: `max_tokens` is the older name."""
    new, old = fields.take("max_completion_tokens", int), fields.take("max_tokens", int)
    if new is not None and old is not None and new != old:
        raise bad_field("max_tokens", f"{old} contradicts max_completion_tokens = {new}: give one of them")
    return (new, "max_completion_tokens") if old is None else (old, "max_tokens")


def _requests(
    fields: Fields, prompts: list[list[int]], stop_ids: tuple[int, ...], limit: int | None, limit_name: str,
    prompt_name: str, served: Served,
) -> tuple[Request, ...]:  # fmt: skip
    """A request a prompt; without a limit, an answer takes what its prompt leaves of a slot."""
    for name in ("frequency_penalty", "presence_penalty"):
        fields.allow_only(name, 0, why="is not supported (repetition_penalty is)")
    fields.allow_only("logit_bias", {})
    fields.ignore(*_WITHOUT_EFFECT)
    n = fields.take("n", int, default=1)
    if n < 1:
        raise bad_field("n", f"{n}: must be at least 1")
    given = {
        "temperature": fields.take("temperature", float, default=1.0),
        "top_p": fields.take("top_p", float, default=1.0),
        "top_k": fields.take("top_k", int, default=0),
        "min_p": fields.take("min_p", float, default=0.0),
        "repetition_penalty": fields.take("repetition_penalty", float, default=1.0),
        "seed": fields.take("seed", int, default=secrets.randbelow(2**32)),
    }
    if given["top_k"] >= 2**31:
        raise bad_field("top_k", f"{given['top_k']}: must be less than 2**31; 0 takes all")
    for name, value in given.items():  # one by one, so that an error names its field
        _checked(name, **{name: value})
    how = {**given, "stop_ids": stop_ids, "stop": _stop(fields)}
    requests = []
    for prompt in prompts:
        left = served.places - len(prompt)
        wanted = left if limit is None else limit
        if not prompt:
            raise bad_field(prompt_name, "is empty: give at least one token")
        if left < 1 or wanted > left:
            asked = "no room for an answer" if limit is None else f"{limit_name} = {limit}"
            raise bad_field(
                prompt_name,
                f"{len(prompt)} tokens and {asked} are more than the {served.places} places of a slot: shorten them, "
                "or start the server with more --places",
                "context_length_exceeded",
            )
        requests.append(Request(prompt=prompt, sampling=_checked(limit_name, max_new_tokens=wanted, **how), samples=n))
    return tuple(requests)


def _checked(name: str, **how: Any) -> Sampling:
    try:
        return Sampling(**how)
    except ValueError as error:
        raise bad_field(name, str(error)) from None


def _stop(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop", str, list, default=[])
    stop = [given] if isinstance(given, str) else given
    if not all(isinstance(text, str) and text for text in stop):
        raise bad_field("stop", "must be a string or an array of strings, none of them empty", "invalid_type")
    return tuple(stop)


def _prompts(prompt: str | list[Any], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt. Texts begin as documents do in training; ids are taken as they are."""
    if isinstance(prompt, str) or all(is_a(part, int) for part in prompt):
        prompt = [prompt]
    ids = []
    for part in prompt:
        if isinstance(part, str):
            ids.append([tokenizer.bos_id, *tokenizer.encode(part)])
        elif isinstance(part, list) and all(is_a(token, int) for token in part):
            ids.append(part)
        else:
            raise bad_field("prompt", "must be a string, an array of token ids, or an array of these", "invalid_type")
    return ids
