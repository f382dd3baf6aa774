"""The HTTP endpoint: routes of the OpenAI API in front of one worker."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deepseek_jax.serve.calls import Call, Served, read_chat, read_completion
from deepseek_jax.serve.errors import ApiError
from deepseek_jax.serve.fields import read_json
from deepseek_jax.serve.replies import Reply, event
from deepseek_jax.serve.worker import Job, Worker

_NO_CACHE = {"Cache-Control": "no-cache"}
_Read = Callable[[dict[str, Any], Served], Call]


def create_app(
    engine: Any,
    tokenizer: Any,
    template: Any = None,
    *,
    name: str = "deepseek",
    queue: int = 64,
    api_key: str | None = None,
    max_body_bytes: int = 8 << 20,
) -> Starlette:
    """An ASGI app that answers calls of the OpenAI API with an engine.

    The app starts a thread that owns the engine from now on: nobody else may call its methods. The thread ends with the
    app's lifespan; where the app is mounted in another one, `app.state.worker.close()` ends it.

    Args:
        engine: as `infer.engine.Engine`.
        tokenizer: the model's.
        template: chat template; without one, /v1/chat/completions answers with an error that says so.
        name: of the model, in the API.
        queue: answers that may wait for a slot; a call beyond them gets 429.
        api_key: what clients must send as `Authorization: Bearer …`; None: anyone may call.
        max_body_bytes: a longer body gets 413.

    Returns:
        The app; `app.state.worker` is its `Worker`.

    Raises: ValueError for a negative queue, an empty api_key, or a template whose tokens the tokenizer lacks.
    """
    if template is not None:
        template.encode(tokenizer, [{"role": "user", "content": "?"}])
        template.stop_ids(tokenizer)
    if api_key is not None and not api_key.strip():
        raise ValueError(f"api_key = {api_key!r}: must not be empty; leave it out to let anyone call")
    worker = Worker(engine, queue)
    served = Served(name=name, tokenizer=tokenizer, template=template, places=engine.places)
    endpoint = _Endpoint(worker, served, api_key, max_body_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = Starlette(
        routes=[
            Route("/health", endpoint.health),
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{name:path}", endpoint.model),
            Route("/v1/completions", endpoint.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
        lifespan=lifespan,
    )
    app.state.worker = worker
    return app


class _Endpoint:
    """What the routes share."""

    def __init__(self, worker: Worker, served: Served, api_key: str | None, max_body_bytes: int):
        self.worker, self.served = worker, served
        self._api_key, self._max_body_bytes = api_key, max_body_bytes
        self._created = int(time.time())
        # One thread: a long prompt must not hold up the event loop, and a tokenizer is no thing for two at a time.
        self._reader = ThreadPoolExecutor(1, "reader")

    async def health(self, request: Request) -> Response:
        """200 while calls are taken, else 503; always says why, and how many answers are under way."""
        worker = self.worker
        body: dict[str, Any] = {"status": "ok", "unfinished": worker.unfinished, "capacity": worker.capacity}
        if worker.failure is not None:
            body |= {"status": "failed", "error": f"{type(worker.failure).__name__}: {worker.failure}"}
        elif worker.draining:
            body["status"] = "shutting down"
        return JSONResponse(body, 200 if body["status"] == "ok" else 503)

    async def models(self, request: Request) -> Response:
        """The one model that is served."""
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The model of a name."""
        self._authorize(request)
        if request.path_params["name"] != self.served.name:
            raise ApiError(404, f"this server has {self.served.name!r} alone", param="model", code="model_not_found")
        return JSONResponse(self._card())

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        return await self._answer(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """Answers a conversation."""
        return await self._answer(request, read_chat)

    def _card(self) -> dict[str, Any]:
        card = {"id": self.served.name, "object": "model", "created": self._created, "owned_by": "deepseek_jax"}
        return {**card, "max_model_len": self.served.places}

    async def _answer(self, request: Request, read: _Read) -> Response:
        self._authorize(request)
        try:
            raw = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        loop = asyncio.get_running_loop()
        call = await loop.run_in_executor(self._reader, lambda: read(read_json(raw), self.served))
        job = self.worker.submit(call.requests)
        reply = Reply(call, self.served)
        gone = asyncio.create_task(_cancel_when_gone(request, job))
        streaming = False
        try:
            await job.accepted()  # a refusal needs a status, which a stream sends first
            if call.stream:
                streaming = True
                return StreamingResponse(_events(job, reply, gone), media_type="text/event-stream", headers=_NO_CACHE)
            async for delta in job.deltas():
                reply.add(delta)
            return JSONResponse(reply.whole())
        finally:
            if not streaming:  # else `_events` sees to it
                _end(job, gone)

    def _authorize(self, request: Request) -> None:
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key.encode()):
            raise ApiError(
                401,
                "wrong API key: send the one that the server was started with as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of a browser may send other types to any address, unasked
            raise ApiError(415, f"content type {kind!r}: send `Content-Type: application/json`")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._max_body_bytes:
                raise ApiError(413, f"the body is longer than {self._max_body_bytes} bytes: shorten it")
        return bytes(body)


async def _events(job: Job, reply: Reply, gone: asyncio.Task[None]) -> AsyncIterator[bytes]:
    """The answer as server-sent events; a failure on the way is the last of them."""
    try:
        for chunk in reply.opening():
            yield event(chunk)
        async for delta in job.deltas():
            for chunk in reply.chunks(delta):
                yield event(chunk)
        for chunk in reply.closing():
            yield event(chunk)
        yield event("[DONE]")
    except ApiError as error:  # the status has been sent long ago
        yield event(error.body())
    finally:
        _end(job, gone)


async def _cancel_when_gone(request: Request, job: Job) -> None:
    """Ends a job whose client has gone, streaming or not."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


def _end(job: Job, gone: asyncio.Task[None]) -> None:
    gone.cancel()
    job.cancel()


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


def _bug(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this reply, so that the server logs its traceback.
    return JSONResponse(ApiError(500, "an error in the server: its log says which").body(), 500)
