"""Running the app: signals, the end of a process, and what it ends with."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from starlette.applications import Starlette

_POLL_S = 0.1


class EngineFailed(RuntimeError):
    """The engine raised, and the server has ended over it; the cause is what it raised."""


class Stopped(RuntimeError):
    """A second signal has ended the server before its calls were answered.

    Fields:
        exit_code: 128 + the signal's number, as shells have it.
        busy: whether the engine is still in a step, which nothing can break off.
    """

    def __init__(self, number: int, busy: bool):
        super().__init__("stopped by a second signal: calls under way have got an error")
        self.exit_code, self.busy = 128 + number, busy


class Server(uvicorn.Server):
    """uvicorn that only takes note of signals; `run` acts on them.

    Fields:
        signals: numbers of those that have come.
    """

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.signals: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # May come while the event loop holds a lock of the worker: nothing here may wait for one.
        self.signals.append(sig)


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """A socket for `serve`: taken before a model is loaded, which may be long work for nothing.

    Args:
        host: address to listen at; the default can be reached from this machine alone.
        port: port to listen at; 0 takes a free one, which `getsockname` tells.

    Raises: ValueError for an address that cannot be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port = {port}: must be in [0, 65535]; 0 takes a free one")
    listener = None
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, protocol)
        # Connections of a server that has just ended must not keep the next one from its port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ValueError(f"host = {host!r}, port = {port}: cannot listen there ({error}); give others") from None
    return listener


def serve(app: Starlette, listener: socket.socket, *, log_level: str = "info") -> None:
    """Serves an app of `create_app` until a signal or the engine's failure ends it.

    The first SIGTERM or Ctrl-C lets every accepted call finish; meanwhile new ones get 503, which tells a client more
    than a closed port. A second one ends the server after the step that the engine is in, a third at once.

    Args:
        app: the app.
        listener: from `bind`; it is closed at the end.
        log_level: of uvicorn.

    Raises:
        EngineFailed: the engine raised; calls that waited have got 500.
        Stopped: a second signal came before all calls were answered.
    """
    asyncio.run(run(Server(uvicorn.Config(app, log_level=log_level)), app, listener))


async def run(server: Server, app: Starlette, listener: socket.socket) -> None:
    """As `serve`, for a server that is at hand, in a running event loop."""
    worker = app.state.worker
    serving = asyncio.create_task(server.serve([listener]))
    while not serving.done():
        await asyncio.sleep(_POLL_S)
        if server.signals:
            worker.drain()
        if len(server.signals) > 1:
            worker.stop()
        if len(server.signals) > 2:
            server.force_exit = server.should_exit = True
        if worker.failure is not None or (worker.draining and not worker.unfinished):
            server.should_exit = True
    await serving
    if worker.failure is not None:
        raise EngineFailed(
            f"the engine has failed: {type(worker.failure).__name__}: {worker.failure}"
        ) from worker.failure
    if len(server.signals) > 1 and worker.stopped_early:
        raise Stopped(server.signals[-1], busy=worker.alive)
