"""An app that is being served on loopback, for tests."""

import asyncio
import contextlib
import threading
import time

import openai
import uvicorn

from deepseek_jax.chat.plain import V2
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.serve import create_app
from deepseek_jax.serve.server import EngineFailed, Server, Stopped, bind, run

LIMIT_S = 30
TOKENIZER = byte_tokenizer()
QUESTION = [{"role": "user", "content": "Hello?"}]


class Running:
    """An app that is being served."""

    def __init__(self, app):
        self.app, self.error = app, None
        self.listener = bind(port=0)
        self.port = self.listener.getsockname()[1]
        self.server = Server(uvicorn.Config(app, log_level="critical"))
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.port}"

    def _run(self):
        try:
            asyncio.run(run(self.server, self.app, self.listener))
        except (EngineFailed, Stopped) as error:
            self.error = error

    def client(self, **options):
        given = dict(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)
        return openai.OpenAI(**given | options)


def until(condition):
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(engine, *, tokenizer=TOKENIZER, template=V2, **options):
    running = Running(create_app(engine, tokenizer, template, name="m", **options))
    try:
        yield running
    finally:
        running.server.should_exit = True
        running.thread.join(LIMIT_S)
        assert not running.thread.is_alive()
