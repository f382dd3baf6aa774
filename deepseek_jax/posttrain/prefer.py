"""Learning from preferences: a policy by DPO, or a reward model from pairs or labels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import storage
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.rules import degree
from deepseek_jax.posttrain.begin import Start, open_start
from deepseek_jax.posttrain.common import ByEpochs
from deepseek_jax.posttrain.dpo import DPO, dpo_gradient, dpo_scores
from deepseek_jax.posttrain.preference_batches import Batch, collate, in_batches
from deepseek_jax.posttrain.preference_data import (
    Encoder,
    Example,
    LabelFile,
    PairFile,
    Preferences,
    load_preferences,
)
from deepseek_jax.posttrain.preference_report import (
    Report,
    figures,
    report_labels,
    report_numbers,
    report_pairs,
    write_report,
)
from deepseek_jax.posttrain.preference_step import (
    PreferenceState,
    abstract_preference,
    init_preference,
    make_preference_update,
    make_scores,
    shardings_of,
)
from deepseek_jax.posttrain.reward_model import RewardModel, make_head, reward_gradient, reward_scores
from deepseek_jax.posttrain.rows import Order, placed
from deepseek_jax.posttrain.session import Line, PostRun, Session
from deepseek_jax.serialize import check_types

_FREE = ("steps", "epochs", "eval_examples")


@dataclass(frozen=True, kw_only=True)
class Prefer(ByEpochs):
    """A run that learns from preferences. LLM chat's DPO: `epochs=1, batch_size=512, rate=Rate(peak=5e-6, warmup_steps=…,
    shape="cosine")`; R1's helpful reward model: `learn=RewardModel(reads="summary"), epochs=1, batch_size=256,
    max_tokens=8192, rate=Rate(peak=6e-6)`."""

    data: PairFile | LabelFile
    """Pairs, or for a pointwise reward model answers with labels."""
    learn: DPO | RewardModel = field(default_factory=DPO)
    max_tokens: int = 2048
    """Of a conversation with its answer; rows with a longer one are left out, and counted."""
    pieces: int = 1
    """In how many an update is worked off, one after the other; less memory, the same update."""
    held_out_fraction: float = 0.02
    """Share of the questions never trained on, chosen by a hash, with all their answers; the evaluation asks them. 0: none,
    and no evaluation."""
    eval_examples: int = 1024
    """Held-out examples of one evaluation, at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pieces", "eval_examples"):
            self.check(getattr(self, name) > 0, name, "must be greater than 0")
        self.check(self.max_tokens >= 2, "max_tokens", "must be at least 2")
        self.check(self.batch_size % self.pieces == 0, "pieces", f"must divide batch_size = {self.batch_size}")
        self.check(0 <= self.held_out_fraction < 1, "held_out_fraction", "must be in [0, 1), such as 0.02")
        pairs = isinstance(self.learn, DPO) or self.learn.kind == "pairwise"
        self.check(
            isinstance(self.data, PairFile if pairs else LabelFile), "data",
            f"must be a {'PairFile' if pairs else 'LabelFile'} for learn = {self.learn}",
        )  # fmt: skip


def prefer(config: Prefer, run_dir: storage.AnyPath, *, progress: bool = True) -> PostRun:
    """Learn from preferences, or continue the run in `run_dir` from its last good checkpoint.

    The folder is a run folder: manifest.json, tokenizer.json, checkpoints/, metrics.jsonl (a line a step), evaluations/ (a
    report of each evaluation, as JSON and as text). A policy's opens with `open_model`, a reward model's with
    `reward_model.open_reward_model`, as `rewards.ModelReward` does.

    Args:
        config: of the run.
        run_dir: its folder.
        progress: whether progress goes to stderr.

    Raises:
        ValueError: what cannot be run, before the first step.
        Stopped: a signal came; all progress is saved, and the same call goes on.
        NotFinite, SaveFailed: as `train`.
    """
    check_types(config)
    start = open_start(config, make_mesh(config.mesh))
    model = start.model.config
    config.check(
        config.max_tokens <= model.max_position_embeddings, "max_tokens",
        f"must not exceed the model's max_position_embeddings = {model.max_position_embeddings}",
    )  # fmt: skip
    learn = config.learn
    data = load_preferences(
        config.data, Encoder(start.tokenizer, start.template, "all" if isinstance(learn, DPO) else learn.reads),
        max_tokens=config.max_tokens, held_out_fraction=config.held_out_fraction, one_prompt=isinstance(learn, DPO),
        labels="number" if isinstance(learn, RewardModel) and learn.kind == "regression" else "probability",
    )  # fmt: skip
    steps = config.steps_of(len(data.train))
    with Session("prefer", config, run_dir, steps=steps, free=_FREE, progress=progress) as session:
        config.check(
            config.batch_size // config.pieces % degree("batch") == 0, "batch_size",
            f"divided by pieces = {config.pieces} must be a multiple of the {degree('batch')} devices that share a batch",
        )  # fmt: skip
        learner = _Learner(config, session, start, data)
        shapes = learner.shapes
        state = session.begin(
            model, start.tokenizer, start.template, shapes, learner.make, learner.order, {"data": data.fingerprint}
        )
        session.say(f"{len(data.train)} examples, {len(data.held_out)} held out; left out: {data.left_out()}")
        return session.run(state, learner.step, learner.evaluate if data.held_out else None)


class _Learner:
    """A step, and what it is made with."""

    def __init__(self, config: Prefer, session: Session, start: Start, data: Preferences):
        self.config, self.session, self.start, self.train = config, session, start, data.train
        # By the questions' hash: no topic that a file begins with is over-represented.
        self.held_out = sorted(data.held_out, key=lambda example: example.side)[: config.eval_examples]
        self.order = Order(len(data.train), config.seed)
        model: Any = start.model  # a linen module can be hashed, which its annotations deny
        learn = config.learn
        if isinstance(learn, DPO):
            self.reference, self.head = True, None
            gradient, scores = dpo_gradient(model, learn, config.loss_chunk), dpo_scores(model, config.loss_chunk)
        else:
            self.reference, self.head = False, partial(make_head, learn, model.config, config.seed)
            gradient, scores = reward_gradient(model, learn), reward_scores(model)
        self.shapes = abstract_preference(
            model.config, config.optimizer, session.mesh, reference=self.reference, head=self.head
        )
        self.update = make_preference_update(
            gradient, config.optimizer, pieces=config.pieces, shardings=shardings_of(self.shapes)
        )
        self.scores = make_scores(scores, session.mesh)

    def make(self) -> PreferenceState:
        """The state of step 0."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        make = partial(init_preference, self.config.optimizer, reference=self.reference, head=self.head)
        return jax.jit(make, out_shardings=shardings)(self.start.load())

    def step(self, state: PreferenceState) -> tuple[PreferenceState, Line]:
        """One update."""
        config, session, number = self.config, self.session, self.session.step
        began = time.perf_counter()
        batch = self._collated([self.train[i] for i in self.order.take(config.batch_size)])
        rate = jnp.float32(config.rate.at(number, session.steps))
        on_mesh = placed(batch, session.mesh)
        update = session.compiled(self.update, state, on_mesh, rate)
        session.stopping()
        state, metrics = update(state, on_mesh, rate)
        line = {name: value.item() for name, value in jax.device_get(metrics).items()}
        tokens = int(batch.last.sum()) + batch.last.size
        seconds = time.perf_counter() - began
        return state, line | {"learning_rate": float(rate), "tokens": tokens, "tokens_per_second": tokens / seconds}

    def evaluate(self, state: PreferenceState) -> Line:
        """Figures of the held-out examples; the whole report goes into the folder evaluations."""
        found: dict[str, list[np.ndarray]] = {}
        size, beat = self.config.batch_size // self.config.pieces, self._beat
        pad_id = self.start.tokenizer.pad_id
        for batch, count in in_batches(self.held_out, size, self.config.max_tokens, pad_id, beat):
            for name, value in jax.device_get(self.scores(state, placed(batch, self.session.mesh))).items():
                found.setdefault(name, []).append(value[:count])
        report = self._report({name: np.concatenate(values).astype(np.float64) for name, values in found.items()})
        if jax.process_index() == 0:
            write_report(self.session.run_dir, self.session.step, report, type(self.config.learn).__name__)
        return figures(report)

    def _report(self, found: dict[str, np.ndarray]) -> Report:
        learn = self.config.learn
        labels = np.array([example.label for example in self.held_out])
        if isinstance(learn, RewardModel) and learn.kind != "pairwise":
            return (report_labels if learn.kind == "pointwise" else report_numbers)(found["score"][:, 0], labels)
        tokens = np.array([[len(a.ids) - a.start for a in example.answers] for example in self.held_out])
        if isinstance(learn, RewardModel):
            return report_pairs(found["score"][:, 0] - found["score"][:, 1], tokens)
        rewards = learn.beta * (found["logp"] - found["reference"])
        more = {"reward": rewards, "logprob": found["logp"]}
        return report_pairs(rewards[:, 0] - rewards[:, 1], tokens) | {
            f"{name}_{side}": float(values[:, i].mean())
            for name, values in more.items()
            for i, side in enumerate(("chosen", "rejected"))
        }

    def _collated(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, self.config.max_tokens, self.start.tokenizer.pad_id)

    def _beat(self) -> None:
        self.session.watchdog.beat(f"evaluation at step {self.session.step}")
