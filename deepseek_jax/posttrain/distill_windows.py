"""Batches of given tokens, with what is stored of the teachers."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from deepseek_jax import storage
from deepseek_jax.chat.data import ChatData
from deepseek_jax.chat.dataset import Chats, load_chats
from deepseek_jax.data.dataset import Data, load
from deepseek_jax.data.pipeline import batches, held_out_batches
from deepseek_jax.posttrain.begin import Start, own_template
from deepseek_jax.posttrain.distill_config import Distill, FromLogits
from deepseek_jax.posttrain.distill_step import Batch
from deepseek_jax.posttrain.policy import PolicyState
from deepseek_jax.posttrain.session import Line
from deepseek_jax.posttrain.teachers import StoredTeacher
from deepseek_jax.training.loss import make_targets


class _Numbered:
    """The first windows of a source, each with its number among those of all sources."""

    def __init__(self, source: Any, first: int, count: int):
        self.source, self.first, self.count = source, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        return {**self.source[index], "number": np.asarray(self.first + index, np.int64)}


class Windows:
    """Windows of conversations or documents, shuffled; the position is that of the iterator."""

    def __init__(self, method: FromLogits, config: Distill, rows: int, start: Start, data: Chats | Data):
        """
        Args:
            method: what is read.
            config: of the run.
            rows: of a batch of an evaluation.
            start: the student.
            data: what `load_windows` gave.
        """
        self.method, self.rows, self.data = method, rows, data
        self.stores: list[StoredTeacher] = []
        """Of the teachers, where they are stored."""
        self._parts: list[_Numbered] = []
        train = [self._numbered(source, len(source)) for source in data.train.sources]
        self._held_out = [
            self._numbered(source, min(len(source), method.eval_sequences)) for source in data.held_out.values()
        ]
        mixture = copy.copy(data.train)
        mixture.sources = tuple(train)
        self.position = batches(mixture if len(train) > 1 else train[0], method.batch_size, config.seed)
        self.evaluates = bool(self._held_out)
        self.facts: Line = {"data_fingerprint": data.fingerprint}

    @property
    def count(self) -> int:
        """Windows, those of evaluations included."""
        return self._parts[-1].first + self._parts[-1].count

    def next(self, state: PolicyState) -> tuple[Batch, Line]:
        """The next windows, by numpy."""
        return self._batch(next(self.position)), {}

    def evaluation(self, state: PolicyState) -> tuple[Iterator[Batch], Line]:
        """Held-out windows."""
        return (self._batch(rows) for part in self._held_out for rows in held_out_batches(part, self.rows)), {}

    def of_numbers(self, numbers: Sequence[int]) -> Batch:
        """The windows of these numbers, without what is stored."""
        firsts = [part.first for part in self._parts]
        found = [self._parts[bisect.bisect_right(firsts, i) - 1] for i in numbers]
        windows = [part[i - part.first] for part, i in zip(found, numbers, strict=True)]
        # Those of training may have no segments where held-out ones have: one program for both.
        alone = {"segment_ids": np.ones(self.method.seq_len + 1, np.int32)}
        windows = [alone | window for window in windows]
        return self._batch({name: np.stack([w[name] for w in windows]) for name in windows[0]}, stored=False)

    def _numbered(self, source: Any, count: int) -> _Numbered:
        part = _Numbered(source, self.count if self._parts else 0, count)
        self._parts.append(part)
        return part

    def _batch(self, rows: dict[str, np.ndarray], stored: bool = True) -> Batch:
        segment_ids = rows.get("segment_ids")
        known = tuple(store.rows(rows["number"].tolist()) for store in self.stores) if stored and self.stores else None
        made: Any = Batch(
            tokens=rows["tokens"],  # type: ignore[arg-type]
            mask=jax.device_get(make_targets(rows, 0).counted[0]),
            segment_ids=None if segment_ids is None else segment_ids[:, :-1],  # type: ignore[arg-type]
            known=known,
        )
        return made


def load_windows(method: FromLogits, config: Distill, start: Start, progress: bool) -> Chats | Data:
    """Reads the data, with the student's tokenizer and template.

    Raises: ValueError for data of which nothing can be learned, another tokenizer, or a missing template.
    """
    own, vocab_size = str(storage.path(config.init_from) / "tokenizer.json"), start.model.config.vocab_size
    if isinstance(method.data, ChatData):
        template = own_template(config, start)
        tokenizer = own if method.data.tokenizer == "init" else method.data.tokenizer
        chats = replace(method.data, template=template, tokenizer=tokenizer)
        data: Chats | Data = load_chats(chats, method.seq_len, None, model_vocab_size=vocab_size, progress=progress)
    else:
        documents = replace(method.data, tokenizer=method.data.tokenizer or own)
        data = load(documents, method.seq_len, None, model_vocab_size=vocab_size, progress=progress)
    if data.tokenizer.sha256 != start.tokenizer.sha256:
        raise ValueError(
            f"FromLogits.data.tokenizer = {method.data.tokenizer!r} is another one than the student's, {own}: leave it out"
        )
    return data
