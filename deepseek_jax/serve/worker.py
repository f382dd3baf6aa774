"""The thread that owns the engine, and the jobs that event loops hand to it.

An engine belongs to one thread. Commands reach that thread through a queue; what its continuations grow by goes back to
the event loop of each job after every step.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from deepseek_jax.serve.errors import ApiError, bad_field, engine_failed, queue_full, stopping


class Delta(NamedTuple):
    """What one continuation grew by in one step."""

    index: int
    """Of the continuation within its job: request by request, sample by sample."""
    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    """Set in a continuation's last delta."""


class Job:
    """The requests of one call, on their way through the engine; made by `Worker.submit`."""

    def __init__(self, requests: Sequence[Any], cancel: Callable[[Job], None]):
        self.requests = requests
        self.count = sum(request.samples for request in requests)
        # Of the engine thread:
        self.generations: list[Any] = []
        self._seen: list[tuple[int, int]] = []  # characters and tokens published of each continuation
        self._open: set[int] = set()  # continuations that go on
        # Of the event loop:
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._deltas: asyncio.Queue[Delta | ApiError] = asyncio.Queue()
        self._cancel = cancel

    async def accepted(self) -> None:
        """Returns when the engine has taken the requests.

        Raises: ApiError when it refuses one, has failed or stops.
        """
        await self._accepted

    async def deltas(self) -> AsyncIterator[Delta]:
        """What the continuations grow by, until the last has ended.

        Raises: ApiError when the engine fails or stops.
        """
        unfinished = self.count
        while unfinished:
            delta = await self._deltas.get()
            if isinstance(delta, ApiError):
                raise delta
            unfinished -= delta.finish_reason is not None
            yield delta

    def cancel(self) -> None:
        """Ends what still runs, as when nobody waits for it any more; does nothing where all has ended."""
        self._cancel(self)

    # What follows is called by the engine thread.

    def begin(self, generations: list[Any]) -> None:
        """The engine has taken the requests."""
        self.generations = generations
        self._seen = [(0, 0)] * len(generations)
        self._open = set(range(len(generations)))
        self._call(self._settle, None)

    def fail(self, error: ApiError) -> None:
        """The requests will not be answered, or not to their end."""
        self._open.clear()
        self._call(self._settle, error)

    def publish(self) -> int:
        """Sends what is new to the event loop; returns how many continuations have ended."""
        ended = 0
        for index in sorted(self._open):
            generation = self.generations[index]
            characters, tokens = self._seen[index]
            text, finish_reason = generation.text, generation.finish_reason
            if finish_reason is None and len(generation.tokens) == tokens and len(text) == characters:
                continue
            delta = Delta(
                index, text[characters:], generation.tokens[tokens:], generation.logprobs[tokens:], finish_reason
            )
            self._seen[index] = len(text), len(generation.tokens)
            self._call(self._deltas.put_nowait, delta)
            if finish_reason is not None:
                self._open.remove(index)
                ended += 1
        return ended

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return not self._open

    def _settle(self, error: ApiError | None) -> None:
        if self._accepted.done():
            if error is not None:
                self._deltas.put_nowait(error)
        elif error is None:
            self._accepted.set_result(None)
        else:
            self._accepted.set_exception(error)
            self._accepted.exception()  # known: asyncio need not log it where the client has gone

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(function, argument)


class Worker:
    """Runs an engine in a thread of its own.

    Fields:
        engine: whose `submit`, `step` and `cancel` that thread alone calls.
        capacity: continuations that may run and wait together.
        failure: what the engine raised; None as long as all is well.
        draining: whether new requests are refused since the server stops.
        stopped_early: whether it was stopped before all requests had ended.
    """

    def __init__(self, engine: Any, queue_size: int):
        """
        Args:
            engine: as `infer.engine.Engine`.
            queue_size: continuations that may wait for a slot, beside those in the engine's slots.
        Raises: ValueError for a queue_size below 0.
        """
        if queue_size < 0:
            raise ValueError(f"queue = {queue_size}: must not be negative; 0 refuses what finds no free slot")
        self.engine = engine
        self.capacity = engine.slots + queue_size
        self.failure: BaseException | None = None
        self.draining = False
        self.stopped_early = False
        self._unfinished = 0
        self._jobs: list[Job] = []
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # Held while a job is enqueued: after `failure` or `draining` is set, no job reaches the queue.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Continuations that run or wait."""
        return self._unfinished

    def submit(self, requests: Sequence[Any]) -> Job:
        """Hands the requests of one call to the engine thread; called in an event loop, which the answers come to.

        Raises: ApiError: 429 when the queue is full, 500 when the engine has failed, 503 when the server stops; 400 when
            it could never hold so many continuations.
        """
        job = Job(requests, self._cancel_later)
        if job.count > self.capacity:
            raise bad_field(
                "n", f"{job.count} continuations in one call: this server holds {self.capacity} (--slots + --queue)"
            )
        with self._lock:
            if self.failure is not None:
                raise engine_failed(self.failure)
            if self.draining:
                raise stopping()
            if self._unfinished + job.count > self.capacity:
                raise queue_full(self._unfinished, self.capacity)
            self._unfinished += job.count
            self._commands.put(partial(self._start, job))
        return job

    def drain(self) -> None:
        """Refuses new requests from now on; `unfinished` falls to 0 when the others have ended."""
        with self._lock:
            self.draining = True

    def stop(self) -> None:
        """Ends the thread after the step that it is in; calls that still wait get an error."""
        with self._lock:
            self.draining = True
            self.stopped_early |= self._unfinished > 0
        self._commands.put(None)

    def close(self, timeout: float = 10.0) -> None:
        """As `stop`, and waits for the end of the thread, for at most `timeout` seconds."""
        self.stop()
        self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def _cancel_later(self, job: Job) -> None:
        self._commands.put(partial(self._cancel, job))

    # What follows runs in the engine thread.

    def _run(self) -> None:
        try:
            while self._obey():
                if self.engine.busy:
                    self.engine.step()
                self._publish()
            self._abandon(stopping())
        except BaseException as failure:
            with self._lock:
                self.failure = failure
            self._abandon(engine_failed(failure))

    def _obey(self) -> bool:
        """Runs the commands that have come, and waits for one where there is nothing else to do. False: stop."""
        wait = not self.engine.busy
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _start(self, job: Job) -> None:
        self._jobs.append(job)
        generations: list[Any] = []
        try:
            for request in job.requests:
                generations += self.engine.submit(request)
        except ValueError as error:
            for generation in generations:
                self.engine.cancel(generation)
            self._jobs.remove(job)
            self._release(job.count)
            job.fail(ApiError(400, str(error), code="invalid_value"))
        else:
            job.begin(generations)

    def _cancel(self, job: Job) -> None:
        for generation in job.generations:
            if generation.finish_reason is None:
                self.engine.cancel(generation)

    def _publish(self) -> None:
        for job in list(self._jobs):
            self._release(job.publish())
            if job.done:
                self._jobs.remove(job)

    def _release(self, count: int) -> None:
        with self._lock:
            self._unfinished -= count

    def _abandon(self, error: ApiError) -> None:
        """Tells every job, those in the queue included, that it will not be answered."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, partial) and command.func == self._start:
                    self._jobs.append(command.args[0])
        for job in self._jobs:
            job.fail(error)
        self._jobs.clear()
        with self._lock:
            self._unfinished = 0
