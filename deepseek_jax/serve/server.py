"""Running the app: signals, the end of a process, and what it ends with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

_POLL_S = 0.1


class EngineFailed(RuntimeError):
    """The engine raised, and the server has ended over it; the cause is what it raised."""


class Server(uvicorn.Server):
    """uvicorn, with an end in two steps.

    The first SIGTERM or Ctrl-C lets every accepted call finish; meanwhile new ones get 503, which tells a client more
    than a closed port. The second ends the process at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]):
        super().__init__(config)
        self._drain, self._draining = drain, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._draining:
            self._draining = True
            self._drain()
            return
        self.force_exit = True
        super().handle_exit(sig, frame)


def serve(app: Starlette, *, host: str = "127.0.0.1", port: int = 8000, log_level: str = "info") -> None:
    """Serves an app of `create_app` until a signal or the engine's failure ends it.

    Args:
        app: the app.
        host: address to listen at; the default can be reached from this machine alone.
        port: port to listen at; 0 takes a free one, which the log names.
        log_level: of uvicorn.

    Raises:
        EngineFailed: the engine raised; calls that waited have got 500.
        SystemExit: the address cannot be listened at.
    """
    config = uvicorn.Config(app, host=host, port=port, log_level=log_level)
    asyncio.run(run(Server(config, app.state.worker.drain), app))


async def run(server: Server, app: Starlette) -> None:
    """As `serve`, for a server that is at hand, in a running event loop."""
    worker = app.state.worker
    serving = asyncio.create_task(server.serve())
    while not serving.done():
        await asyncio.sleep(_POLL_S)
        if worker.failure is not None or (worker.draining and not worker.unfinished):
            server.should_exit = True
    await serving
    if worker.failure is not None:
        raise EngineFailed(
            f"the engine has failed: {type(worker.failure).__name__}: {worker.failure}"
        ) from worker.failure
