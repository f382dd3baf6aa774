"""What every run of post-training has around its steps: folder, lock, signals, watchdog, checkpoints, log.

`training/loop.py` is the same for pre-training and SFT, whose batches come from a Grain iterator. Here a step may take
minutes (rollouts), asks what it needs by itself, and may be broken off anywhere before its update: nothing of it stays.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import jax

from deepseek_jax import storage
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer, keep_tokenizer
from deepseek_jax.metrics.adapters import check_writers, open_writers
from deepseek_jax.metrics.manifest import write_manifest
from deepseek_jax.metrics.progress import Progress
from deepseek_jax.metrics.writer import JsonlWriter, plain, read_jsonl, with_floats
from deepseek_jax.parallel.mesh import make_mesh, use_mesh
from deepseek_jax.posttrain.common import PostConfig
from deepseek_jax.serialize import check_types, to_dict
from deepseek_jax.training.begin import discard_after, require_same
from deepseek_jax.training.interrupt import Interrupt, Stopped
from deepseek_jax.training.saves import Saves
from deepseek_jax.training.trouble import NotFinite
from deepseek_jax.training.watchdog import Watchdog

T = TypeVar("T")
Line = dict[str, Any]

FREE = (
    "mesh", "generation_mesh", "remat", "pieces", "loss_chunk", "log_every", "eval_every", "checkpoint_every",
    "keep_checkpoints", "verify_checkpoints", "max_skipped_in_a_row", "hang_timeout_s", "writers",
)  # fmt: skip
"""Fields of a configuration that may change when a run goes on."""


_programs: Any = weakref.WeakKeyDictionary()
"""Jitted function -> what it was compiled for -> program."""


class Position(Protocol):
    """Where a run stands in its data: a state that JSON holds."""

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class PostRun:
    """A finished call of a verb of post-training."""

    run_dir: Any
    config: Any
    state: Any
    metrics: list[Line]
    """The lines of metrics.jsonl."""
    checkpoint: Any

    def summary(self) -> str:
        """What the run came to, for a person to read."""
        lines = []
        evaluated = [line for line in self.metrics if "evaluation" in line]
        if evaluated:
            for name, after in evaluated[-1]["evaluation"].items():
                before = evaluated[0]["evaluation"].get(name)
                if isinstance(after, float) and isinstance(before, float):
                    lines.append(f"{name}: {before:.4g} before, {after:.4g} after {evaluated[-1]['step']} steps")
        return "\n".join(
            [*lines, "", f"checkpoint  {self.checkpoint}", f"metrics     {self.run_dir / 'metrics.jsonl'}"]
        )


class Session:
    """One run. `with Session(…) as session:` holds the folder; `begin`, then `run`."""

    def __init__(
        self, verb: str, config: PostConfig, run_dir: storage.AnyPath, *, steps: int, free: tuple[str, ...] = (),
        progress: bool = True,
    ):  # fmt: skip
        """
        Args:
            verb: what the manifest calls it.
            config: of the run; checked against its annotations.
            run_dir: its folder.
            steps: of the whole run.
            free: further fields of `config` that may change when the run goes on.
            progress: whether progress goes to stderr.
        """
        check_types(config)
        check_writers(config.writers)
        self.verb, self.config, self.steps = verb, config, steps
        self.run_dir = storage.path(run_dir)
        self.mesh = make_mesh(config.mesh)
        self.step = 0
        self.resumed_from: int | None = None
        self._shown, self._free = progress, {*FREE, *free}
        self._line: Line | None = None
        """A metrics line whose evaluation is still to come; saved too."""
        self._skipped_in_a_row = 0
        self._log: JsonlWriter | None = None
        self._writers: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        with ExitStack() as stack:
            lock = stack.enter_context(storage.RunLock(self.run_dir)) if jax.process_index() == 0 else None
            self.interrupt = stack.enter_context(Interrupt())
            self.watchdog = stack.enter_context(Watchdog(self.config.hang_timeout_s, self.run_dir))
            manifests = self.config.verify_checkpoints != "off"
            self.store = stack.enter_context(
                Store(self.run_dir / "checkpoints", keep=self.config.keep_checkpoints, manifests=manifests)
            )
            self._saves = Saves(self.store, self.watchdog, lock)
            stack.enter_context(use_mesh(self.mesh))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        Progress(self.steps, shown=self._shown).message(text)

    def begin(
        self, model: ModelConfig, tokenizer: Tokenizer, template: Any, shapes: T, make: Callable[[], T],
        position: Position, facts: Line | None = None,
    ) -> T:  # fmt: skip
        """The state of the last good checkpoint, or `make()` at step 0; the manifest and the tokenizer are written.

        Args:
            model: what `open_model` of the run folder is going to find; the state has `params` and `router`.
            tokenizer: of the run.
            template: chat template, or None.
            shapes: of the state: a `ShapeDtypeStruct` with a sharding a leaf.
            make: makes the state of step 0, in its shards.
            position: of the data; set to where the checkpoint was.
            facts: what else decides the run (the data's fingerprint), to be equal when it goes on; JSON.

        Raises: ValueError where the checkpoint was made by another configuration, tokenizer or data.
        """
        pinned = {k: v for k, v in to_dict(self.config).items() if k not in self._free}
        self._pinned = plain({**pinned, **(facts or {}), "tokenizer": tokenizer.sha256, "model": to_dict(model)}, "")
        keep_tokenizer(tokenizer, self.run_dir / "tokenizer.json", "the run has now: start a new run folder")
        found = self.store.latest_good(self.config.verify_checkpoints, self.say)
        if found is not None:
            saved = self.store.meta(found)["pinned"]
            require_same({k: v for k, v in saved.items() if k not in self._free}, self._pinned)
        discard_after(self.store, found, self.say)
        self._position = position
        if found is None:
            state = make()
            self._line = {"step": 0}
        else:
            state, note = self.store.restore(shapes, position, found)
            self.step = self.resumed_from = self._saves.saved = found
            self._line = with_floats(note.get("line"))
            done = "done" if found >= self.steps else "continuing"
            self.say(f"{self.run_dir} is at step {found} of {self.steps}: {done}")
        if jax.process_index() == 0:
            config = {"model": to_dict(model), self.verb: to_dict(self.config)}
            name = None if template is None else template.name
            more = {"verb": self.verb, "mesh": dict(self.mesh.shape), "template": name, "from_step": self.step}
            write_manifest(self.run_dir, config, {**more, "facts": facts or {}})
        return state

    def run(
        self,
        state: T,
        one_step: Callable[[T], tuple[T, Line]],
        evaluate: Callable[[T], Line] | None = None,
    ) -> PostRun:
        """Steps to the end, logged, evaluated and saved.

        Args:
            state: what `begin` gave.
            one_step: from a state to the next one and metrics. It may raise Stopped (through `aside`, or after `stopping`
                was asked) as long as it has given no buffer of the state away; the data's position is then set back.
                Metrics with `applied` False count as an update left out.
            evaluate: of a state, before the first step, every `eval_every` and after the last; logged as `evaluation`.
        """
        config, position = self.config, self._position
        with ExitStack() as stack:
            bar = stack.enter_context(Progress(self.steps, self.step, label=self.verb, shown=self._shown))
            if jax.process_index() == 0:
                kept = None if self.resumed_from is None else self.resumed_from - (self._line is not None)
                self._log = stack.enter_context(JsonlWriter(self.run_dir / "metrics.jsonl", resume_step=kept))
                self._writers = open_writers(config.writers, self.run_dir, to_dict(config), resume_step=kept)
                for writer in self._writers:
                    stack.callback(writer.close)
            self.interrupt.deferred = True
            before = position.get_state()
            try:
                if self._line is not None:
                    self._write(bar, state, evaluate)
                while self.step < self.steps:
                    self.stopping()
                    before, began = position.get_state(), time.perf_counter()
                    self.watchdog.beat(f"step {self.step + 1}")
                    state, line = one_step(state)
                    self.step += 1
                    before = position.get_state()
                    line = jax.device_get(line)
                    self._count_skips(line, bar)
                    last = self.step == self.steps
                    evaluated = evaluate is not None and (
                        last or bool(config.eval_every and self.step % config.eval_every == 0)
                    )
                    if self.step % config.log_every == 0 or evaluated or last:
                        self._line = {"step": self.step, **line, "step_seconds": time.perf_counter() - began}
                        self._write(bar, state, evaluate if evaluated else None)
                    if self.step % config.checkpoint_every == 0 or last:
                        self.save(state)
                self.save(state)
            except Stopped as stopped:
                position.set_state(before)
                self.save(state)
                self._saves.finish(self.step, bar.message, last=True)
                where = f"at step {self.step} of {self.steps}" + (", which is saved" if self.step else "")
                raise Stopped(
                    f"{self.interrupt.requested}: stopped {where}; the same command goes on from there",
                    self.step, stopped.thread,
                ) from None  # fmt: skip
            self._saves.finish(self.step, bar.message, last=True)
            if self.interrupt.requested:  # for whoever calls several verbs one after the other
                raise Stopped(f"{self.interrupt.requested}: came in the last step, which is saved", self.step)
        self.interrupt.deferred = False
        metrics = read_jsonl(self.run_dir / "metrics.jsonl")
        return PostRun(self.run_dir, config, state, metrics, self.run_dir / "checkpoints" / str(self.step))

    def stopping(self) -> None:
        """Raises Stopped where a signal has come."""
        if self.interrupt.check(self.step):
            raise Stopped(f"{self.interrupt.requested} came")

    def aside(self, work: Callable[[], T]) -> T:
        """`work()` under the mesh, in a thread that leaves the main one free to take signals: for what takes long and
        changes nothing that is saved (rollouts, compilations, evaluations).

        Raises: Stopped as soon as a signal has come.
        """

        def under_mesh() -> T:
            with use_mesh(self.mesh):
                return work()

        return self.interrupt.run(under_mesh)

    def compiled(self, jitted: Any, *arguments: Any) -> Any:
        """A jitted function compiled for these arguments, beside the main thread; found again by their shapes."""
        leaves, tree = jax.tree.flatten(arguments)
        key = (tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves))
        programs = _programs.setdefault(jitted, {})
        if key not in programs:
            self.watchdog.beat("compiling")
            programs[key] = self.aside(lambda: jitted.lower(*arguments).compile())
        return programs[key]

    def save(self, state: Any) -> None:
        """Saves this step, unless it is saved.

        Raises: NotFinite, SaveFailed.
        """
        note = {"pinned": self._pinned, "line": None if self._line is None else plain(self._line, "line")}
        self._saves.save(self.step, state, self._position, note, self._log, self.say)

    def _count_skips(self, line: Line, bar: Progress) -> None:
        if line.get("applied", True):
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        bar.message(f"step {self.step}: update left out, its loss or gradient was not finite")
        if self._skipped_in_a_row >= self.config.max_skipped_in_a_row:
            raise NotFinite(
                f"{self._skipped_in_a_row} updates in a row were not finite, up to step {self.step}: stopped. "
                f"{type(self.config).__name__}.max_skipped_in_a_row sets the limit"
            )

    def _write(self, bar: Progress, state: Any, evaluate: Callable[[Any], Line] | None) -> None:
        assert self._line is not None
        line = self._line
        if evaluate is not None:
            self.watchdog.beat("evaluating")
            line = line | {"evaluation": self.aside(partial(evaluate, state))}
        if self._log is not None:
            self._log.write(line)
        self._line = None
        for writer in self._writers:
            writer.write(line["step"], {name: value for name, value in line.items() if name != "step"})
        shown: dict[str, Any] = {k: line[k] for k in ("loss", "reward", "accuracy") if k in line}
        bar.update(self.step, shown)
