"""Bytes with the control tokens of a chat model, flagged as the published files flag them: as not special."""

import json

from deepseek_jax.data.tokenizer import Tokenizer, byte_tokenizer

CHAT_TOKENS = (
    "<think>",
    "</think>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|EOT|>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
)


def chat_tokenizer(tokens: tuple[str, ...] = CHAT_TOKENS, **names: str) -> Tokenizer:
    """`byte_tokenizer(fim=True)` with `tokens` after its own; `names` as `Tokenizer`."""
    content = json.loads(byte_tokenizer(fim=True)._json_bytes)
    first = 259 + 3
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    content["added_tokens"] += [{"id": first + i, "content": name, **flags} for i, name in enumerate(tokens)]
    return Tokenizer(json.dumps(content, ensure_ascii=False).encode(), **names)
