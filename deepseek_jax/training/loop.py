"""The training loop, flat enough to read: prepare, restore, step, log, evaluate, save, draw."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax import storage
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.metrics.adapters import check_writers, open_writers
from deepseek_jax.metrics.flops import mfu, peak_flops, train_flops_per_token
from deepseek_jax.metrics.manifest import write_manifest
from deepseek_jax.metrics.progress import Progress
from deepseek_jax.metrics.report import report
from deepseek_jax.metrics.writer import JsonlWriter, plain, read_jsonl, with_floats
from deepseek_jax.parallel import hosts
from deepseek_jax.parallel.mesh import make_mesh, use_mesh
from deepseek_jax.parallel.rules import named_sharding
from deepseek_jax.serialize import check_types, to_dict
from deepseek_jax.training.begin import check_pieces, fresh, load_data, pinned_fields, require_shared, resume
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.devices import check_precision, fit_dtype
from deepseek_jax.training.evaluate import make_evaluation
from deepseek_jax.training.feed import Feed
from deepseek_jax.training.interrupt import Interrupt, Stopped
from deepseek_jax.training.run import Run, check_prompts, draw, draw_samples
from deepseek_jax.training.saves import Saves
from deepseek_jax.training.state import TrainState, abstract_state
from deepseek_jax.training.step import BATCH_AXES, compile_train_step, host_line, place_batch
from deepseek_jax.training.trouble import SkipWatch
from deepseek_jax.training.watchdog import Watchdog

Until = Callable[[TrainState, int], bool]
"""From a state and its step to whether the run ends here."""


def train(
    config: RunConfig, run_dir: str | os.PathLike[str], *, until: Until | None = None, progress: bool = True,
    data: Any = None,
) -> Run:  # fmt: skip
    """Train, or continue the run in `run_dir` from its last good checkpoint.

    The folder holds manifest.json, tokenizer.json, metrics.jsonl (a line a logged step), checkpoints/, plots/,
    samples.jsonl and report.html.

    Args:
        config: of the run.
        run_dir: its folder.
        until: asked after each evaluation, with the state and its step: whether the run ends here, saved, for instance
            since the model can do what it is trained for. The same call again goes on to the next evaluation.
        progress: whether progress goes to stderr.
        data: what `config.data` gives, where it is loaded already.

    Raises:
        ValueError: a field of the wrong type or value, a mesh that does not fit the devices, data that does not fit
            the model, a checkpoint that does not fit the configuration, a folder that another run holds. All before
            the first step.
        Stopped: SIGTERM or SIGINT came; all progress is saved, and the same call goes on.
        NotFinite: too many updates in a row were left out.
        SaveFailed: a checkpoint could not be written.
        PeerFailed: another process of this run failed.
    """
    check_types(config)
    hosts.require_connected()
    check_writers(config.writers)
    check_precision(config.model)
    run_dir = storage.path(run_dir)
    model, message = fit_dtype(config.model)
    config = replace(config, model=model)
    mesh = make_mesh(config.mesh)
    check_pieces(config, mesh)
    progress = progress and hosts.leads()
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        with hosts.together("taking the run folder"):
            lock = stack.enter_context(storage.RunLock(run_dir)) if hosts.leads() else None
        require_shared(run_dir)
        watchdog = stack.enter_context(Watchdog(config.hang_timeout_s, run_dir))
        say = Progress(config.last_step, shown=progress).message
        if message:
            say(message)
        abstract_state(config, mesh)  # checks that the mesh divides every parameter, before anything long
        data = load_data(config, run_dir, progress=progress, loaded=data)
        check_prompts(config, data.tokenizer)
        with use_mesh(mesh):
            loop = _run_to_end(config, run_dir, mesh, data, interrupt, watchdog, lock, progress, until)
        interrupt.deferred = False
        watchdog.beat("drawing samples and the report")
        with hosts.together("drawing samples and the report"):
            samples = draw_samples(config, loop.state, data.tokenizer, loop.step, run_dir, say)
            metrics, plots, page = [], [], run_dir / "report.html"
            if hosts.leads():
                metrics = read_jsonl(run_dir / "metrics.jsonl")
                plots = draw(metrics, run_dir / "plots", config.model.num_dense_layers)
                report(run_dir, page)
        return Run(
            run_dir=run_dir,
            config=config,
            state=loop.state,
            metrics=metrics,
            plots=plots,
            checkpoint=run_dir / "checkpoints" / str(loop.step),
            report=page,
            samples=samples,
        )


def _run_to_end(
    config: RunConfig, run_dir: Any, mesh: Mesh, data: Any, interrupt: Interrupt, watchdog: Watchdog,
    lock: storage.RunLock | None, progress: bool, until: Until | None,
) -> _Loop:  # fmt: skip
    """Under the mesh, with checkpoints and writers open: from the last good checkpoint to the last step."""
    with ExitStack() as stack:
        manifests = config.verify_checkpoints != "off"
        store = stack.enter_context(Store(run_dir / "checkpoints", keep=config.keep_checkpoints, manifests=manifests))
        loop = _Loop(config, run_dir, mesh, data, store, interrupt, watchdog, lock)
        loop.begin(Progress(config.last_step, shown=progress).message)
        bar = stack.enter_context(Progress(config.last_step, loop.step, shown=progress))
        if hosts.leads():
            # The line of the very step that is restored comes again where its evaluation was cut off.
            kept = None if loop.resumed_from is None else loop.resumed_from - (loop.line is not None)
            loop.log = stack.enter_context(JsonlWriter(run_dir / "metrics.jsonl", resume_step=kept))
            loop.writers = open_writers(config.writers, run_dir, to_dict(config), resume_step=kept)
            for writer in loop.writers:
                stack.callback(writer.close)
        interrupt.deferred = True
        try:
            loop.run(bar, until)
        except Stopped as stop:
            loop.save(bar.message)
            loop.saves.finish(loop.step, bar.message, last=True)
            where = f"at step {loop.step} of {config.last_step}" + (", which is saved" if loop.step else "")
            raise Stopped(
                f"{interrupt.requested}: stopped {where}; the same command goes on from there", loop.step, stop.thread
            ) from None
        loop.saves.finish(loop.step, bar.message, last=True)
    return loop


class _Loop:
    """A run's state and what it is made with. `state`, `batches` and `step` agree whenever a method returns or raises."""

    def __init__(
        self, config: RunConfig, run_dir: Any, mesh: Mesh, data: Any, store: Store, interrupt: Interrupt,
        watchdog: Watchdog, lock: storage.RunLock | None,
    ):  # fmt: skip
        self.config, self.run_dir, self.mesh, self.data = config, run_dir, mesh, data
        self.store, self.interrupt, self.watchdog = store, interrupt, watchdog
        self.log: JsonlWriter | None = None
        self.writers: list[Any] = []
        self.batches = Feed(config, mesh, data)
        self.pinned = pinned_fields(to_dict(config), data.fingerprint)
        self.evaluate = make_evaluation(config, mesh, data)
        self.jitted, self.compiled = compile_train_step(config, mesh), {}
        self.step = 0
        self.resumed_from: int | None = None
        self.saves = Saves(
            store, watchdog, lock, going_on=config.on_save_error == "continue",
            remedy="RunConfig.on_save_error = 'continue' tries again at the next one",
        )  # fmt: skip
        self.compiling_s = 0.0
        """Seconds that compiling the step took since the last log line: no part of its speed."""
        self.line: dict[str, Any] | None = None
        """A metrics line whose evaluation is still to come; saved too, so that an interrupted one is made up for."""
        self.peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.dtype)
        self.flops_per_token = train_flops_per_token(config.model, config.seq_len)

    def begin(self, say: Any) -> None:
        """Takes the state from the last good checkpoint, or makes that of step 0, and writes the manifest."""
        template = abstract_state(self.config, self.mesh)
        resumed = resume(self.config, template, self.store, self.batches, self.pinned, say)
        if resumed is None:
            self.state = self._aside(lambda: fresh(self.config, self.mesh, self.run_dir, say))
        else:
            self.state, self.step, note = resumed
            self.resumed_from = self.saves.saved = self.step
            self.line = with_floats(note.get("line"))
            done = self.step >= self.config.last_step
            say(
                f"{self.run_dir} is at step {self.step} of {self.config.last_step}: "
                + ("done" if done else "continuing")
            )
        if hosts.leads():
            facts = {"seeds": {"run": self.config.seed}, "mesh": dict(self.mesh.shape), "data": self.data.summary()}
            facts |= {"template": self.data.template, "from_step": self.step}
            write_manifest(self.run_dir, to_dict(self.config), facts)

    def run(self, bar: Progress, until: Until | None = None) -> None:
        """Steps to the end, or as long as `until` says."""
        config = self.config
        skips = SkipWatch(config, self.run_dir, bar.message, int(self.state.guard.skipped))
        if self.resumed_from is None:
            self.line = {"step": 0, "tokens": 0}
        if self.line is not None:
            self._log(bar, evaluate=True)
        since, since_tokens = time.perf_counter(), self.tokens
        tracing = False
        while self.step < config.last_step:
            train_step = self._train_step()
            if self.interrupt.check(self.step):
                raise Stopped(f"{self.interrupt.requested} came")
            tracing = self._trace(tracing)
            host, here = self.batches.read(self.step)
            self.state, metrics = train_step(self.state, place_batch(host, self.mesh, here))
            self.step += 1
            skips.consumed(self.step, host, metrics)
            self.watchdog.beat(f"step {self.step}")
            last = self.step == config.last_step
            evaluate = last or bool(config.eval_every and self.step % config.eval_every == 0)
            if self.step % config.log_every == 0 or evaluate:
                skips.look()
                self.line = host_line(metrics)  # waits for the device
                now = time.perf_counter()
                speed = (self.tokens - since_tokens) / (now - since - self.compiling_s)
                share = mfu(speed, self.flops_per_token, self.mesh.size, self.peak)
                self.line = {
                    "step": self.step,
                    "tokens": self.tokens,
                    **self.line,
                    "batch_size": here.of,
                    "tokens_per_second": speed,
                    **({} if share is None else {"mfu": share}),
                }
                self._log(bar, evaluate)
                if evaluate and until is not None and self._ends(until):
                    break
                since, since_tokens, self.compiling_s = time.perf_counter(), self.tokens, 0.0
            if self.step % config.checkpoint_every == 0:
                skips.look()
                self.save(bar.message)
        skips.look()
        self.save(bar.message)
        self._trace(tracing, end=True)

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return self.config.plan.tokens_before(self.step)

    def save(self, say: Any) -> None:
        """Saves this step, unless it is saved.

        Raises: NotFinite, SaveFailed.
        """
        line = None if self.line is None else plain(self.line, "line")
        note = {"tokens": self.tokens, "horizon": self.config.horizon, "pinned": self.pinned, "line": line}
        self.saves.save(self.step, self.state, self.batches, note, self.log, say)

    def _aside(self, work: Any) -> Any:
        """`work()` under the mesh, in a thread that leaves the main one free to take signals."""

        def under_mesh() -> Any:
            with use_mesh(self.mesh):
                return work()

        return self.interrupt.run(under_mesh)

    def _ends(self, until: Until) -> bool:
        """What process 0 is answered, on all."""
        return hosts.of_first(self._aside(lambda: bool(until(self.state, self.step))))

    def _train_step(self) -> Any:
        """The step compiled for the number of sequences that comes next."""
        size = self.config.plan.batch_size(self.step)
        if size not in self.compiled:
            batch = {}
            for name, row in self.data.train[0].items():
                shape = (size, *row.shape)
                sharding = named_sharding(self.mesh, BATCH_AXES, shape, f"batch {name!r}")
                batch[name] = jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding)
            self.watchdog.beat("compiling the train step")
            start = time.perf_counter()
            self.compiled[size] = self._aside(lambda: self.jitted.lower(self.state, batch).compile())
            self.compiling_s += time.perf_counter() - start
            self.watchdog.beat("reading a batch")
        return self.compiled[size]

    def _log(self, bar: Progress, evaluate: bool) -> None:
        assert self.line is not None
        line = self.line
        if evaluate:
            self.watchdog.beat("evaluating")
            line = line | self._aside(lambda: self.evaluate(self.state))
        if self.log is not None:
            self.log.write(line)
        self.line = None
        for writer in self.writers:
            writer.write(line["step"], {name: value for name, value in line.items() if name != "step"})
        if "loss" in line:
            bar.update(
                self.step,
                {"loss": line["loss"], "tok/s": line["tokens_per_second"]}
                | ({"MFU": f"{line['mfu']:.1%}"} if "mfu" in line else {}),
            )

    def _trace(self, tracing: bool, end: bool = False) -> bool:
        """Starts or ends the profiler's trace; returns whether it runs."""
        wanted = self.step in self.config.profile_steps and not end
        if wanted and not tracing:
            jax.profiler.start_trace(os.fspath(self.run_dir / "profile"))
        elif tracing and not wanted:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
        return wanted
