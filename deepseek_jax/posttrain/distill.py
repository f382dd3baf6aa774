"""Learning from the probabilities of larger models: on-policy (V4), or on given tokens.

V4's report, section 5: specialists are merged into one model by minimising L = Σ_i w_i KL(π_student ‖ π_teacher_i) over
the whole vocabulary on what the student samples. Hinton, Vinyals, Dean (arXiv 1503.02531): the forward divergence on
given data. R1's students (arXiv 2501.12948, section 2.4) learn from samples alone, which is `dsj.sft`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax import storage
from deepseek_jax.config import require
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.rules import degree
from deepseek_jax.posttrain.begin import Start, open_start
from deepseek_jax.posttrain.distill_config import Distill, FromLogits, OnPolicy, Teacher
from deepseek_jax.posttrain.distill_rollouts import Rollouts
from deepseek_jax.posttrain.distill_step import Batch, make_distill_update, make_measure
from deepseek_jax.posttrain.distill_windows import Windows, load_windows
from deepseek_jax.posttrain.policy import PolicyState, abstract_policy, begin_policy, variables_of
from deepseek_jax.posttrain.reward_model import open_reward_model
from deepseek_jax.posttrain.rewards import OpenModel, open_rewards
from deepseek_jax.posttrain.rows import placed
from deepseek_jax.posttrain.session import Line, Position, PostRun, Session
from deepseek_jax.posttrain.teachers import StoredTeacher, fingerprint
from deepseek_jax.serialize import check_types

__all__ = ["Distill", "FromLogits", "OnPolicy", "Teacher", "distill"]


class Source(Protocol):
    """Where batches come from."""

    @property
    def position(self) -> Position: ...

    @property
    def facts(self) -> Line: ...

    @property
    def evaluates(self) -> bool: ...

    def next(self, state: PolicyState) -> tuple[Batch, Line]: ...

    def evaluation(self, state: PolicyState) -> tuple[Iterator[Batch], Line]: ...


def distill(
    config: Distill, run_dir: storage.AnyPath, *, open_model: OpenModel | None = None, progress: bool = True
) -> PostRun:
    """Teach a student by its teachers' probabilities, or continue the run in `run_dir` from its last good checkpoint.

    The folder is a run folder (`open_model`, `deepseek-jax chat`, `convert`): manifest.json, tokenizer.json, checkpoints/,
    metrics.jsonl (a line a step), and with `FromLogits.stored` teachers/ (what was stored of them).

    Args:
        config: of the run.
        run_dir: its folder.
        open_model: opens reward models for `OnPolicy.rewards`; None: those that `dsj.prefer` trains.
        progress: whether progress goes to stderr.

    Raises:
        ValueError: what cannot be run, before the first step: a teacher with another tokenizer or vocabulary among it.
        Stopped: a signal came; all progress is saved, and the same call goes on.
        NotFinite, SaveFailed: as `train`.
    """
    check_types(config)
    mesh = make_mesh(config.mesh)
    data = config.method.data if isinstance(config.method, FromLogits) else None
    start = open_start(replace(config, template=config.template or getattr(data, "template", None)), mesh)
    teachers = [_teacher(config, i, start, mesh) for i in range(len(config.teachers))]
    with Session("distill", config, run_dir, steps=config.steps, free=("steps",), progress=progress) as session:
        rows = config.method.rows // config.pieces
        config.check(
            rows % degree("batch") == 0, "method",
            f"the {rows} rows of a piece cannot be split over the {degree('batch')} devices that share a batch",
        )  # fmt: skip
        with ExitStack() as stack:
            if isinstance(config.method, OnPolicy):
                method = config.method
                rewards = nullcontext() if not method.rewards else open_rewards(
                    method.rewards, allow_unsafe_code=method.allow_unsafe_code, workers=method.reward_workers,
                    open_model=open_model or partial(open_reward_model, mesh=mesh),
                )  # fmt: skip
                source: Source = Rollouts(method, config.seed, rows, session, start, stack.enter_context(rewards))
            else:
                windows = load_windows(config.method, config, start, progress)
                source = Windows(config.method, config, rows, start, windows)
                if config.method.stored:
                    source.stores = [
                        _stored(config, config.method, i, t, source, session) for i, t in enumerate(teachers)
                    ]
            stored = isinstance(source, Windows) and source.stores
            asked = () if stored else tuple(teachers)
            variables = tuple(teacher.load() for teacher in asked)
            learner = _Learner(config, session, start.model, tuple(t.model for t in asked), variables, source)
            who = [store.teacher for store in stored] if stored else [fingerprint(its) for its in variables]
            facts = {**source.facts, "teacher_fingerprints": who}
            shapes = abstract_policy(start.model.config, config.optimizer, session.mesh, reference=False)

            def make() -> PolicyState:
                return begin_policy(config.optimizer, start.load(), shapes, reference=False)

            state = session.begin(
                start.model.config, start.tokenizer, start.template, shapes, make, source.position, facts
            )
            return session.run(state, learner.step, learner.evaluate if source.evaluates else None)


def _teacher(config: Distill, i: int, student: Start, mesh: Mesh) -> Start:
    """Opens teacher i, and makes sure that its probabilities are of the student's tokens."""
    given, field = config.teachers[i], f"teachers[{i}].path"
    teacher = open_start(replace(config, param_dtype=given.param_dtype), mesh, field, folder=given.path)
    what = f"Distill.{field} = {given.path!r}"
    if teacher.tokenizer.sha256 != student.tokenizer.sha256:
        raise ValueError(
            f"{what} has another tokenizer than the student, {config.init_from!r} (SHA-256 {teacher.tokenizer.sha256[:12]}… "
            f"and {student.tokenizer.sha256[:12]}…): their probabilities are of different tokens. Give a teacher with the "
            f"student's tokenizer, or train on the teacher's answers as text (dsj.sft)"
        )
    theirs, ours, method = teacher.model.config, student.model.config, config.method
    if theirs.vocab_size != ours.vocab_size:
        raise ValueError(
            f"{what} has vocab_size = {theirs.vocab_size}, the student {ours.vocab_size}, of one tokenizer with "
            f"{student.tokenizer.vocab_size} ids: the rows of padding must be as many in both, as they have probabilities "
            f"too. Give the student's embedding and head the teacher's number of rows"
        )
    if isinstance(method, FromLogits) and method.top_k is not None:
        require(
            method.top_k <= ours.vocab_size, "FromLogits", "top_k", method.top_k,
            f"must not exceed the vocabulary's {ours.vocab_size} tokens; None is all of them",
        )  # fmt: skip
    for name, model in (("the student", ours), (what, theirs)):
        config.check(
            method.places - isinstance(method, FromLogits) <= model.max_position_embeddings, "method",
            f"has rows of {method.places} tokens, more than max_position_embeddings = "
            f"{model.max_position_embeddings} of {name}",
        )  # fmt: skip
    return teacher


def _stored(
    config: Distill, method: FromLogits, i: int, teacher: Start, source: Windows, session: Session
) -> StoredTeacher:
    """What teacher i says of all windows: found in the run's folder, or asked for now."""
    assert method.top_k is not None
    if jax.process_count() > 1:
        raise ValueError(
            "FromLogits.stored = True: one process writes and reads it; several ask their teachers (False)"
        )
    model = teacher.model.config
    facts = {
        **source.facts, "temperature": method.temperature, "dtype": model.dtype, "param_dtype": model.param_dtype,
    }  # fmt: skip
    folder = session.run_dir / "teachers" / str(i)
    store = StoredTeacher(folder, source.count, method.seq_len, method.top_k, facts)
    if store.missing:
        size = source.count * method.seq_len * (8 * method.top_k + 4)
        session.say(
            f"storing {method.top_k} tokens of each place of {source.count} windows: {size / 1e9:.3g} GB, {folder}"
        )
        rows = method.rows // config.pieces
        store.fill(
            teacher.model, teacher.load(), lambda numbers: placed(source.of_numbers(numbers), session.mesh), rows,
            method.temperature, config.loss_chunk, session,
        )  # fmt: skip
    return store


class _Learner:
    """A step, and what it is made with."""

    def __init__(
        self, config: Distill, session: Session, model: DeepSeek, teachers: tuple[DeepSeek, ...],
        variables: tuple[Any, ...], source: Source,
    ):  # fmt: skip
        self.config, self.session, self.variables, self.source = config, session, variables, source
        shared: Any = (model, teachers, config.divergence)
        self.update = make_distill_update(
            *shared, config.optimizer, session.mesh, chunk=config.loss_chunk, pieces=config.pieces
        )
        self.measure = make_measure(*shared, session.mesh, chunk=config.loss_chunk)

    def step(self, state: PolicyState) -> tuple[PolicyState, Line]:
        """One update. Nothing is given away before it."""
        config, session = self.config, self.session
        began = time.perf_counter()
        batch, line = self.source.next(state)
        found = time.perf_counter()
        rate = jnp.float32(config.rate.at(session.step, config.steps))
        tokens, on_mesh = int(np.sum(batch.mask)), placed(batch, session.mesh)
        update = session.compiled(self.update, state, self.variables, on_mesh, rate)
        session.stopping()
        state, metrics = update(state, self.variables, on_mesh, rate)
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        ended = time.perf_counter()
        return state, {
            **line,
            **metrics,
            "learning_rate": float(rate),
            "tokens": tokens,
            "data_seconds": found - began,
            "update_seconds": ended - found,
            "update_tokens_per_second": tokens / (ended - found),
        }

    def evaluate(self, state: PolicyState) -> Line:
        """Figures of held-out tokens: means over them."""
        batches, line = self.source.evaluation(state)
        variables, sums, count = variables_of(state.params, state.router), {}, 0
        for batch in batches:
            self.session.watchdog.beat(f"evaluation at step {self.session.step}")
            count += int(np.sum(batch.mask))
            found = self.measure(variables, self.variables, placed(batch, self.session.mesh))
            for name, value in jax.device_get(found).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {**{name: value / max(count, 1) for name, value in sums.items()}, **line, "tokens": count}
