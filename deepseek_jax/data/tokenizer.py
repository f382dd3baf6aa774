"""Tokenizers: byte-level BPE as DeepSeek-V3 does it (report, Section 4.1), trained here or read from a tokenizer.json.

The library `tokenizers` does the work. This wrapper fixes what a pipeline must never get wrong: a text that spells a
special token is text, decoding gives back the exact text, and a tokenizer is known by the hash of its file.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

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
        fim_ids: ids of the tokens that begin a text with a hole, stand for the hole, and end it; None where the
            tokenizer has no such tokens.
        sha256: hex hash of the tokenizer.json.
    """

    def __init__(self, json_bytes: bytes, bos_token: str = BOS_TOKEN, eos_token: str = EOS_TOKEN):
        """Reads the content of a tokenizer.json; `load_tokenizer` and `train_bpe` are the usual ways in.

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
        if self._byte_ids is not None and not special:  # the library takes a hundred times as long for it
            return [self._byte_ids[np.frombuffer(text.encode(), np.uint8)].tolist() for text in texts]
        self._tokenizer.encode_special_tokens = not special
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids, special tokens by name unless skipped. `decode(encode(text)) == text`; ids that end
        within a character give U+FFFD in its place.

        Raises: ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"ids {outside[:5]} are outside the tokenizer's vocabulary of {self.vocab_size}")
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def strings(self) -> dict[int, str]:
        """The text of each id of a byte-level vocabulary; ids that are special, or no whole characters, left out."""
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        special = {i for i, added in self._tokenizer.get_added_tokens_decoder().items() if added.special}
        found = {}
        for entry, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if i not in special and all(character in byte_of for character in entry):
                try:
                    found[i] = bytes(byte_of[character] for character in entry).decode()
                except UnicodeDecodeError:
                    continue
        return dict(sorted(found.items()))

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 [vocab_size]; 0 for special tokens. For byte-level tokenizers
        (DeepSeek's, Qwen's, Llama 3's), whose every id is a fixed string of bytes: the sum over any part of a text is
        exact, also where the part begins or ends within a character."""
        lengths = np.zeros(self.vocab_size, np.int32)
        # In a byte-level vocabulary each character of an entry stands for one byte.
        for entry, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(entry)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths

    def save(self, path: str | os.PathLike[str]) -> Any:
        """Writes the tokenizer.json, byte for byte as it was read, so that its hash stays. Returns the path."""
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
        if sorted(plain) != sorted(_byte_characters()):
            return None
        return np.array([plain[character] for character in _byte_characters()], np.int32)

    def _id(self, token: str, name: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{name}={token!r} is not in the tokenizer's vocabulary; name the token it uses instead")
        return token_id


def load_tokenizer(
    path: str | os.PathLike[str], *, bos_token: str = BOS_TOKEN, eos_token: str = EOS_TOKEN
) -> Tokenizer:
    """Reads a tokenizer.json: one trained here, DeepSeek's own, or any other that names its `bos_token`/`eos_token`.

    Args:
        path: the file, or a folder that holds tokenizer.json.
    Raises: ValueError when there is no such file, and as `Tokenizer`.
    """
    file = storage_path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.exists():
        raise ValueError(f"tokenizer={str(path)!r}: no such file; give the path of a tokenizer.json")
    try:
        return Tokenizer(file.read_bytes(), bos_token, eos_token)
    except ValueError as error:
        raise ValueError(f"tokenizer={str(path)!r}: {error}") from None


def byte_tokenizer(*, fim: bool = False) -> Tokenizer:
    """The tokenizer without merges: special tokens at 0 to 2, byte b at b + 3, and with `fim` FIM_TOKENS at the end."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    entries = [*SPECIAL_TOKENS, *_byte_characters()]
    tokenizer = Backend(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *(FIM_TOKENS if fim else ())])
    return Tokenizer(tokenizer.to_str(pretty=True).encode())


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
        initial_alphabet=sorted(_byte_characters()),  # ids follow this order
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


@functools.cache
def _byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table): printable ones for
    themselves, the others for the characters from U+0100 on, in order."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))
