"""What the files of a tokenizer say: the bytes that its ids stand for, and the tokens that begin and end a document."""

from __future__ import annotations

import functools
import json
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table): printable ones for
    themselves, the others for the characters from U+0100 on, in order."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))


def bytes_of_ids(backend: Any, vocab_size: int) -> list[bytes] | None:
    """The bytes that each id stands for, [vocab_size]; None where the vocabulary is not a byte-level one.

    Args:
        backend: a `tokenizers.Tokenizer`.
        vocab_size: largest id + 1; ids that no token has are no bytes.
    """
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    found = [b""] * vocab_size
    for entry, i in backend.get_vocab(with_added_tokens=False).items():
        known = all(character in byte_of for character in entry)
        found[i] = bytes(byte_of[character] for character in entry) if known else entry.encode()
    # An added token is its own text. The library takes it for bytes where it can, so that DeepSeek LLM's token "ø"
    # would be decoded to half a character.
    for i, token in backend.get_added_tokens_decoder().items():
        found[i] = token.content.encode()
    return found


def stated_tokens(folder: Any) -> dict[str, str | int]:
    """What a folder's files say of "bos_token" and "eos_token": names from tokenizer_config.json, or else ids from
    config.json.

    Args:
        folder: an `epath.Path`.
    Raises: ValueError when one of the files is no JSON.
    """
    stated: dict[str, str | int] = {}
    for name, suffix in (("config.json", "_id"), (TOKENIZER_CONFIG, "")):
        file = folder / name
        if not file.exists():
            continue
        try:
            content = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}): mend it or remove it") from None
        for key in ("bos_token", "eos_token"):
            value = content.get(key + suffix)
            value = value.get("content") if isinstance(value, dict) else value  # an AddedToken with its flags
            value = value[0] if isinstance(value, list) and value else value  # Llama 3 lists several that end a text
            if isinstance(value, str | int):
                stated[key] = value
    return stated
