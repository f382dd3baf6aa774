"""From a `ChatData` to batches: conversations read, encoded with their masks, packed into windows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from deepseek_jax.chat.data import ChatData, ChatSource
from deepseek_jax.chat.packing import ChatWindows, Encodings
from deepseek_jax.chat.registry import get_template
from deepseek_jax.chat.rows import Conversation, LeftOut, conversation_of, encode_conversation
from deepseek_jax.chat.template import Template
from deepseek_jax.data.corpus import Document
from deepseek_jax.data.pipeline import Mixture, batches
from deepseek_jax.data.progress import Report
from deepseek_jax.data.reading import Scan, held_out_below
from deepseek_jax.data.rows import read_rows
from deepseek_jax.data.tokenizer import BYTES, Tokenizer, byte_tokenizer, keep_tokenizer, load_tokenizer
from deepseek_jax.storage import AnyPath, path

_logger = logging.getLogger(__name__)

TOO_LONG, CUT, NO_ANSWER_LEFT = "longer than seq_len + 1", "cut to seq_len + 1", "cut before its answer"
_NAMED = 5  # places remembered for each reason


@dataclasses.dataclass
class Found:
    """One source: encoded conversations and what was left out.

    Fields:
        encodings: of all conversations.
        sides: of each, a number in [0, 1); it is held out where that is low.
        held_out: which are.
        skipped: reason -> how many rows were left out for it; places: reason -> the first few, with what was wrong.
        cut: how many lost their end.
    """

    encodings: Encodings = dataclasses.field(default_factory=Encodings)
    sides: list[float] = dataclasses.field(default_factory=list)
    held_out: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    cut: int = 0

    def skip(self, reason: str, where: str) -> None:
        """Counts a row that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < _NAMED:
            places.append(where)

    def left_out(self) -> str:
        """In words: how many for which reason, and where the first one is."""
        parts = [f"{count:,} {reason} ({self.places[reason][0]})" for reason, count in sorted(self.skipped.items())]
        return "; ".join(parts) or "nothing"


@dataclasses.dataclass(frozen=True)
class Chats:
    """Conversations ready to be learned from: the interface of `data.dataset.Data`. All dicts go by the sources' names.

    Fields:
        config: what they were made from.
        template: name of their template.
        tokenizer: theirs.
        found: what each source holds.
        train: windows to train on. An epoch is the first `epoch_windows` of them.
        held_out: windows never trained on; sources without held-out conversations are not in it.
        fingerprint: hex hash of ids, masks, windows and weights: two runs with one fingerprint and one seed read the same
            batches.
    """

    config: ChatData
    template: str
    tokenizer: Tokenizer
    found: dict[str, Found]
    train: Mixture
    held_out: dict[str, ChatWindows]
    fingerprint: str

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Source -> reason -> how many of its rows were left out."""
        return {name: found.skipped for name, found in self.found.items()}

    @property
    def epoch_windows(self) -> float:
        """Windows of one epoch: those of each source as often as its weight says."""
        parts = zip(self.config.sources, self.train.sources, strict=True)
        return float(sum(Fraction(str(source.weight)) * len(windows) for source, windows in parts))

    def train_batches(self, batch_size: int, seed: int, **options: Any) -> Any:
        """An endless, resumable iterator of shuffled train batches; see `data.pipeline.batches`."""
        return batches(self.train if len(self.found) > 1 else self.train.sources[0], batch_size, seed, **options)

    def summary(self) -> dict[str, Any]:
        """What a manifest should say about the data: counts, ready for JSON."""
        bytes_of_token, sources = self.tokenizer.byte_lengths(), {}
        parts = zip(self.found.items(), self.config.sources, self.train.sources, self.train.shares, strict=True)
        for (name, found), source, train, share in parts:
            splits = {"train": train, "held_out": self.held_out.get(name)}
            sources[name] = {
                "kind": type(source).__name__,
                "weight": source.weight,
                "share": share,
                "splits": {split: _counts(found, of, bytes_of_token) for split, of in splits.items() if of is not None},
                "skipped": found.skipped,
                "skipped_places": found.places,
                CUT: found.cut,
            }
        return {
            "fingerprint": self.fingerprint,
            "template": self.template,
            "tokenizer_hash": self.tokenizer.sha256,
            "tokenizer_vocab_size": self.tokenizer.vocab_size,
            "epoch_windows": self.epoch_windows,
            "sources": sources,
        }


def _counts(found: Found, windows: ChatWindows, bytes_of_token: np.ndarray) -> dict[str, Any]:
    numbers = np.array([number for window in windows.plan for number in window])
    encodings = found.encodings
    tokens = int(encodings.lengths[numbers].sum())
    trained = int(encodings.sums(encodings.trained)[numbers].sum())
    text_bytes = int(encodings.sums(bytes_of_token[encodings.ids] * encodings.trained)[numbers].sum())
    return {
        "conversations": len(numbers),
        "windows": len(windows),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_text_bytes": text_bytes,
        "bytes_per_token": text_bytes / trained,
        "padding": 1 - tokens / (len(windows) * (windows.seq_len + 1)),
    }


def load_chats(
    config: ChatData,
    seq_len: int,
    run_dir: AnyPath | None,
    *,
    model_vocab_size: int | None = None,
    progress: bool = True,
) -> Chats:
    """Reads the sources, encodes every conversation, packs them.

    Args:
        config: what to read; template and tokenizer named.
        seq_len: tokens predicted in a window.
        run_dir: the run's folder, whose tokenizer.json is written, or compared. None writes none.
        model_vocab_size: the model's vocabulary, checked against the tokenizer's.
        progress: whether progress goes to stderr.
    Raises: ValueError for a source that is missing, ill-formed, or of which nothing can be learned; a template whose
        tokens the tokenizer lacks; a tokenizer too large for the model, or another than the run began with.
    """
    if config.template is None or config.tokenizer == "init":
        name = "template" if config.template is None else "tokenizer"
        raise ValueError(
            f"ChatData.{name} = {getattr(config, name)!r}: name one, or train with dsj.sft, which takes that of the model "
            f"that it begins with"
        )
    template = get_template(config.template)
    tokenizer = byte_tokenizer() if config.tokenizer == BYTES else load_tokenizer(config.tokenizer)
    _check_tokens(config, template, tokenizer)
    if model_vocab_size is not None:
        tokenizer.require_fits(model_vocab_size)
    found = {
        name: _read(name, source, config, seq_len, template, tokenizer, progress)
        for name, source in zip(config.names, config.sources, strict=True)
    }
    _hold_out(found, config.held_out_fraction)
    if run_dir is not None:
        keep_of_chats(tokenizer, run_dir, config)

    def windows(name: str, held_out: bool) -> ChatWindows:
        one, what = found[name], f"{'held-out' if held_out else 'train'} conversations of source {name!r}"
        numbers: Any = np.flatnonzero(one.held_out == held_out)
        return ChatWindows(one.encodings, numbers, seq_len, pad_id=tokenizer.pad_id, packing=config.packing, name=what)

    train = [windows(name, False) for name in found]
    # A mixture's weights are shares of the windows; ours are how often each is read.
    weights: Any = [
        Fraction(str(source.weight)) * len(part) for source, part in zip(config.sources, train, strict=True)
    ]
    return Chats(
        config=config,
        template=template.name,
        tokenizer=tokenizer,
        found=found,
        train=Mixture(train, weights),
        held_out={name: windows(name, True) for name, one in found.items() if one.held_out.any()},
        fingerprint=_fingerprint(config, found, tokenizer, seq_len),
    )


def keep_of_chats(tokenizer: Tokenizer, run_dir: AnyPath, config: ChatData) -> None:
    """`keep_tokenizer`, in the words of a `ChatData`."""
    given = f"tokenizer={config.tokenizer!r} gives now: undo that, or start a new run folder"
    keep_tokenizer(tokenizer, path(run_dir) / "tokenizer.json", given)


def _check_tokens(config: ChatData, template: Template, tokenizer: Tokenizer) -> None:
    """Refuse a template that this tokenizer cannot write, before every row is refused for it."""
    said: dict[str, Any] = {"role": "assistant", "content": "!"}
    said |= {} if template.thinks == "never" else {"reasoning_content": "?"}
    sample = Conversation([{"role": "user", "content": "?"}, said], None)
    try:
        encode_conversation(sample, template, tokenizer)
        template.stop_ids(tokenizer)
    except (LeftOut, ValueError) as error:
        why = error.detail if isinstance(error, LeftOut) else error
        raise ValueError(
            f"ChatData.template = {config.template!r} does not fit the tokenizer {config.tokenizer!r}: {why}. 'llm' needs "
            f"no token that a tokenizer trained here lacks; a base model gets those of 'v3' and 'r1' by "
            f"DataConfig.extra_tokens = chat.TOKENS"
        ) from None


def _read(
    name: str, source: ChatSource, config: ChatData, seq_len: int, template: Template, tokenizer: Tokenizer,
    progress: bool,
) -> Found:  # fmt: skip
    """One source, encoded."""
    found = Found()
    bytes_of_token = tokenizer.byte_lengths()
    with Report(f"encoding {name}", None, progress) as report:
        for where, conversation in _conversations(source, found):
            try:
                ids, trained = encode_conversation(
                    conversation, template, tokenizer, last_only=config.train_on == "last"
                )
                if len(ids) > seq_len + 1:
                    if config.too_long == "skip":
                        raise LeftOut(TOO_LONG, f"{len(ids):,} tokens, seq_len = {seq_len:,}")
                    ids, trained = ids[: seq_len + 1], trained[: seq_len + 1]
                    if not any(trained):
                        raise LeftOut(NO_ANSWER_LEFT)
                    found.cut += 1
            except LeftOut as why:
                found.skip(why.reason, _place(where, why))
                continue
            found.encodings.append(ids, trained)
            asked = json.dumps(conversation.question, sort_keys=True, ensure_ascii=False, default=str)
            found.sides.append(Document(where, asked).side)
            report(int(bytes_of_token[ids].sum()))
    if not found.sides:
        raise ValueError(f"source {name!r} holds nothing to learn from; left out: {found.left_out()}: {source}")
    if found.skipped or found.cut:
        cut = f"; {found.cut:,} {CUT}" if found.cut else ""
        _logger.warning("source %r: %d conversations; left out: %s%s", name, len(found.sides), found.left_out(), cut)
    return found


def _hold_out(found: dict[str, Found], fraction: float) -> None:
    """Decides what is held out, as for documents: one bound for all sources, so that a question which two of them share
    is on one side. A single question is trained on: one dialogue to be learned by heart is no mistake.

    Raises: ValueError where a source would have nothing to train on.
    """
    different = sorted({side for one in found.values() for side in one.sides})
    below = 0.0
    if fraction and len(different) > 1:
        scan = Scan(len(different), 0, "", tuple(different[:2]), different[-1], {}, {})
        below = held_out_below([scan], fraction)
    for name, one in found.items():
        one.held_out = np.asarray(one.sides) < below
        if one.held_out.all():
            raise ValueError(
                f"ChatData.held_out_fraction = {fraction!r}: it takes all {len(one.sides)} conversations of source "
                f"{name!r}; give the source more, or 0"
            )


def _conversations(source: ChatSource, found: Found) -> Iterator[tuple[str, Conversation]]:
    for where, row in read_rows(source.reads, found.skip, source.rows.fields):
        try:
            yield where, conversation_of(row, source.rows, where)
        except LeftOut as why:
            found.skip(why.reason, _place(where, why))


def _place(where: str, why: LeftOut) -> str:
    return f"{where}: {why.detail}" if why.detail else where


def _fingerprint(config: ChatData, found: dict[str, Found], tokenizer: Tokenizer, seq_len: int) -> str:
    """Of all that decides which windows come; the names of the sources and their places do not."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([tokenizer.sha256, seq_len, config.packing]).encode())
    for source, one in zip(config.sources, found.values(), strict=True):
        digest.update(repr(source.weight).encode())
        for part in (one.encodings.lengths, one.encodings.ids, one.encodings.trained, one.held_out):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
