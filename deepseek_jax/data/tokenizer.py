"""Tokenizers: byte-level BPE as DeepSeek-V3 does it (report, Section 4.1), trained here or read from a tokenizer.json.

The library `tokenizers` does the work. This wrapper fixes what a pipeline must never get wrong: a text that spells a
special token is text, decoding gives back the exact text, and a tokenizer is known by the hash of its file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.vocabulary import TOKENIZER_CONFIG, byte_characters, bytes_of_ids, stated_tokens
from deepseek_jax.storage import path as storage_path
from deepseek_jax.storage import write_atomic

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
SPECIAL_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN)  # ids 0, 1, 2 as in V3
FIM_TOKENS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")  # the last ids of tokenizers trained for FIM
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
BYTES = "bytes"  # the name of the tokenizer without merges

# V3's pre-tokenizer: three splits in sequence. Numbers in groups of at most three digits; runs of Chinese characters
# and kana; then words (with the one character before them), punctuation (with the line breaks after it), white space.
_V3_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)


class Tokenizer:
    """Text to ids and back.

    Fields:
        vocab_size: largest id + 1.
        bos_id, eos_id: ids of the tokens that begin and end a document.
        pad_id: id of the padding token, or `eos_id` where the tokenizer has none.
        special: name -> id of every token that stands for something other than its text. Published files flag only
            some of them as special; here a name that begins with `<` or `｜` is one too (`<｜User｜>`, `<think>`).
        hidden_ids: ids that `decode` leaves out with `skip_special`: those that the file itself flags as special.
            Think tags and the tokens of tool calls are not among them.
        fim_ids: ids of the tokens that begin a text with a hole, stand for the hole, and end it; None where the
            tokenizer has no such tokens.
        sha256: hex hash of the tokenizer.json.
    """

    def __init__(self, json_bytes: bytes, bos_token: str | int = BOS_TOKEN, eos_token: str | int = EOS_TOKEN):
        """Reads the content of a tokenizer.json; `load_tokenizer` and `train_bpe` are the usual ways in. A token is
        given by its name or its id.

        Raises: ValueError when the content is no tokenizer, or when it lacks `bos_token` or `eos_token`.
        """
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(json_bytes)
        except Exception as error:  # the library raises a bare Exception
            version = tokenizers.__version__
            raise ValueError(f"not a tokenizer.json that `tokenizers` {version} reads: {error}") from None
        # A file may carry the padding and truncation of the model it came from; a corpus wants neither.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {t.content: i for i, t in added.items() if t.special or t.content[0] in "<｜"}
        self.hidden_ids = frozenset(i for i, t in added.items() if t.special)
        # Special tokens are found by `encode` below; the library is to take every text as text. It does for tokens
        # that it knows as special, and this call tells it of the others; no token is added.
        self._tokenizer.add_special_tokens(list(self.special))
        self._tokenizer.encode_special_tokens = True
        names = sorted(self.special, key=len, reverse=True)  # the longest name wins where one begins another
        self._names = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        self._json_bytes = json_bytes
        self.sha256 = hashlib.sha256(json_bytes).hexdigest()
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._id(bos_token, "bos_token")
        self.eos_id = self._id(eos_token, "eos_token")
        pad_id = self._tokenizer.token_to_id(PAD_TOKEN)
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        fim_ids = tuple(i for token in FIM_TOKENS if (i := self._tokenizer.token_to_id(token)) is not None)
        self.fim_ids: tuple[int, ...] | None = fim_ids if len(fim_ids) == len(FIM_TOKENS) else None
        self._byte_ids = self._ids_of_bytes()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of one text; no BOS or EOS is added.

        Args:
            text: any text without lone surrogates.
            special: whether the names of special tokens in the text become these tokens (chat templates) or stay
                text (documents, and anything a user typed).
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text, on all cores; see `encode`."""
        if special:
            return [self._encode_with_names(text) for text in texts]
        if self._byte_ids is not None:  # the library takes a hundred times as long for it
            return [self._byte_ids[np.frombuffer(text.encode(), np.uint8)].tolist() for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def split_names(self, text: str) -> list[str]:
        """The text cut before and after each name of a special token. No part is empty."""
        return [part for part in (self._names.split(text) if self._names else [text]) if part]

    def _encode_with_names(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split_names(text):
            ids += [self.special[part]] if part in self.special else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids, special tokens by name unless skipped. `decode(encode(text)) == text`; ids that end
        within a character give U+FFFD in its place.

        Raises: ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids {outside[:5]} are outside the tokenizer's vocabulary of {self.vocab_size}")
        if skip_special:
            ids = [i for i in ids if i not in self.hidden_ids]
        if self._bytes_of is None:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        return b"".join(self._bytes_of[i] for i in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id, which may begin or end within a character; of a special token, those of its name.

        Raises: ValueError for an id outside the vocabulary, and where ids are no fixed bytes (SentencePiece).
        """
        if self._bytes_of is None:
            raise ValueError("this tokenizer is not a byte-level one: its ids stand for no fixed bytes; use `decode`")
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"id {token_id} is outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._bytes_of[token_id]

    @functools.cached_property
    def _bytes_of(self) -> list[bytes] | None:
        return bytes_of_ids(self._tokenizer, self.vocab_size)

    def strings(self) -> dict[int, str]:
        """The text of each id of a byte-level vocabulary; ids that are special, or no whole characters, left out."""
        special = set(self.special.values())
        found = {}
        for i, entry in enumerate(self._bytes_of or ()):
            if entry and i not in special:
                with contextlib.suppress(UnicodeDecodeError):
                    found[i] = entry.decode()
        return found

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [vocab_size]; 0 for special tokens. For byte-level tokenizers
        (DeepSeek's, Qwen's, Llama 3's), whose every id is a fixed string of bytes: the sum over any part of a text is
        exact, also where the part begins or ends within a character."""
        lengths = np.zeros(self.vocab_size, np.int32)
        # In a byte-level vocabulary each character of an entry stands for one byte.
        for entry, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(entry)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.content in self.special else len(added.content.encode())
        return lengths

    def save(self, path: str | os.PathLike[str]) -> Any:
        """Writes the tokenizer.json, byte for byte as it was read, so that its hash stays; and beside it, where the
        tokens that begin and end a document are not DeepSeek's, a tokenizer_config.json that names them. Returns the
        path of the first."""
        bos, eos = (self._tokenizer.id_to_token(i) for i in (self.bos_id, self.eos_id))
        if (bos, eos) != (BOS_TOKEN, EOS_TOKEN):
            names = json.dumps({"bos_token": bos, "eos_token": eos}, ensure_ascii=False)
            write_atomic(storage_path(path).parent / TOKENIZER_CONFIG, names + "\n")
        return write_atomic(path, self._json_bytes)

    def require_fits(self, model_vocab_size: int) -> None:
        """Raises ValueError when some id of this tokenizer is no row of a model's embedding."""
        if self.vocab_size > model_vocab_size:
            raise ValueError(
                f"vocab_size={model_vocab_size} of the model is smaller than the tokenizer's {self.vocab_size}: "
                f"give the model at least {self.vocab_size}, or train a smaller tokenizer"
            )

    def _ids_of_bytes(self) -> np.ndarray | None:
        """The id of each byte, [256], where the tokenizer has bytes and special tokens alone."""
        special = self._tokenizer.get_added_tokens_decoder()
        plain = {t: i for t, i in self._tokenizer.get_vocab(with_added_tokens=False).items() if i not in special}
        if sorted(plain) != sorted(byte_characters()):
            return None
        return np.array([plain[character] for character in byte_characters()], np.int32)

    def _id(self, token: str | int, name: str) -> int:
        name_of = self._tokenizer.id_to_token(token) if isinstance(token, int) else token
        token_id = None if name_of is None else self._tokenizer.token_to_id(name_of)
        if token_id is None:
            raise ValueError(f"{name}={token!r} is not in the tokenizer's vocabulary; name the token it uses instead")
        return token_id


def load_tokenizer(
    path: str | os.PathLike[str], *, bos_token: str | None = None, eos_token: str | None = None
) -> Tokenizer:
    """Reads a tokenizer.json: one trained here, DeepSeek's own, or any other.

    Args:
        path: the file, or a folder that holds tokenizer.json.
        bos_token, eos_token: names of the tokens that begin and end a document. By default those that
            tokenizer_config.json or config.json state beside the file, and DeepSeek's where neither does.
    Raises: ValueError when there is no such file, and as `Tokenizer`.
    """
    file = storage_path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.exists():
        raise ValueError(f"tokenizer={str(path)!r}: no such file; give the path of a tokenizer.json")
    try:
        stated = stated_tokens(file.parent) if bos_token is None or eos_token is None else {}
        bos, eos = bos_token or stated.get("bos_token"), eos_token or stated.get("eos_token")
        return Tokenizer(file.read_bytes(), BOS_TOKEN if bos is None else bos, EOS_TOKEN if eos is None else eos)
    except ValueError as error:
        raise ValueError(f"tokenizer={str(path)!r}: {error}") from None


def keep_tokenizer(tokenizer: Tokenizer, file: Any, otherwise: str) -> None:
    """The tokenizer in a run's folder: written by the first start, the same for all that go on.

    Raises: ValueError where it is another, `otherwise` saying than what and what to do.
    """
    if not file.exists():
        tokenizer.save(file)
    elif load_tokenizer(file).sha256 != tokenizer.sha256:
        raise ValueError(f"{file} is another tokenizer than {otherwise}")


def byte_tokenizer(*, fim: bool = False) -> Tokenizer:
    """The tokenizer without merges: special tokens at 0 to 2, byte b at b + 3, and with `fim` FIM_TOKENS at the end."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    entries = [*SPECIAL_TOKENS, *byte_characters()]
    tokenizer = Backend(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *(FIM_TOKENS if fim else ())])
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


def with_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with further special tokens after its last id, in their order; those that it has stay where they are.

    They are flagged as the published files flag control tokens: `decode` shows them, as it must `<think>`.

    Args:
        tokenizer: any.
        names: such as "<｜User｜>" or "<think>"; `chat.TOKENS` are those of V3's and R1's templates.
    Raises: ValueError for a name that is no token's, or is given twice.
    """
    bad = [name for name in names if not re.fullmatch(r"<[^<>\s]+>", name)]
    if bad or len(set(names)) != len(names):
        raise ValueError(f"names={list(names)}: give different names of the form <…>, such as '<｜User｜>'")
    content = json.loads(tokenizer._json_bytes)
    missing = [name for name in names if tokenizer._tokenizer.token_to_id(name) is None]
    if not missing:
        return tokenizer
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [
        {"id": tokenizer.vocab_size + i, "content": name, **flags} for i, name in enumerate(missing)
    ]
    extended = json.dumps(content, indent=2, ensure_ascii=False).encode()
    return Tokenizer(extended, bos_token=tokenizer.bos_id, eos_token=tokenizer.eos_id)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str],
    *,
    fim: bool = False,
    progress: bool | None = None,
) -> Tokenizer:
    """Trains a byte-level BPE with V3's pre-tokenizer and special tokens, and writes it. The same texts give the same
    file.

    Args:
        texts: what it is trained on; about 10 MB takes seconds.
        vocab_size: ids wanted, at least 259 (3 special tokens, 256 bytes), and 3 more with `fim`. A small corpus may
            give fewer: only pairs seen twice are merged.
        path: where the tokenizer.json goes.
        fim: whether the last three ids are FIM_TOKENS. (V3 has them near the end too.)
        progress: whether a bar is shown; None shows it on a terminal.
    Raises: ValueError for a vocabulary too small, or texts that are empty.
    """
    from tokenizers import trainers

    least = MIN_VOCAB_SIZE + len(FIM_TOKENS) * fim
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}: {least - 256} special tokens and 256 bytes need at least {least}")
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("texts: no text to train a tokenizer on; give at least one document")
    tokenizer = _untrained_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(FIM_TOKENS) * fim,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(byte_characters()),  # ids follow this order
        show_progress=sys.stderr.isatty() if progress is None else progress,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if fim:
        tokenizer.add_special_tokens(list(FIM_TOKENS))
    write_atomic(path, tokenizer.to_str(pretty=True))
    return load_tokenizer(path)


def _untrained_bpe() -> Any:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _V3_SPLITS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
