"""The HTTP endpoint, asked by the OpenAI client over loopback."""

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import FakeEngine, tokenizer_with
from helpers import micro, random_variables
from serving import LIMIT_S, QUESTION, TOKENIZER, serving, until

import deepseek_jax as dsj
from deepseek_jax.chat.jinja import FolderTemplate
from deepseek_jax.chat.tagged import CALL, CALL_END, CALLS, CALLS_END, OUTPUT, OUTPUT_END, SEPARATOR, V3_1
from deepseek_jax.infer.engine import Engine
from deepseek_jax.serve import create_app

PROMPT_TOKENS = 1 + len("User: Hello?\n\nAssistant:")
TAGS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    CALLS,
    CALLS_END,
    CALL,
    SEPARATOR,
    CALL_END,
    OUTPUT,
    OUTPUT_END,
)


@pytest.fixture(scope="module")
def shared():
    """A client of one server for tests that only ask."""
    with serving(FakeEngine(TOKENIZER, "Hé, you!"), queue=2) as running, running.client() as client:
        yield client


@pytest.fixture
def fake():
    return FakeEngine(TOKENIZER, "Hé, you!")


@pytest.fixture
def running(fake):
    with serving(fake, queue=2) as running:
        yield running


@pytest.fixture
def client(running):
    with running.client() as client:
        yield client


def test_chat(shared):
    reply = shared.chat.completions.create(model="m", messages=QUESTION, seed=5, temperature=0.5, max_tokens=20)
    [choice] = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hé, you!", "stop")
    assert (reply.object, reply.model) == ("chat.completion", "m")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (PROMPT_TOKENS, 10)
    assert reply.usage.total_tokens == PROMPT_TOKENS + 10


def test_what_is_asked_reaches_the_engine():
    seen = []
    fake = FakeEngine(TOKENIZER, lambda generation: seen.append(generation.request) or "x")
    extra = {"top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5}
    with serving(fake) as running, running.client() as client:
        client.chat.completions.create(
            model="m", messages=QUESTION, seed=5, temperature=0, top_p=0.5, max_completion_tokens=20, stop="|", n=2,
            user="someone", frequency_penalty=0, extra_body=extra,
        )  # fmt: skip
        client.chat.completions.create(model="m", messages=[{"role": "developer", "content": "Be short."}, *QUESTION])
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo?"}]
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": parts}])
        client.completions.create(model="m", prompt="ab")
    how = seen[0].sampling
    assert (how.seed, how.temperature, how.top_p, how.max_new_tokens) == (5, 0, 0.5, 20)
    assert (how.top_k, how.min_p, how.repetition_penalty) == (7, 0.25, 1.5)
    assert (how.stop, how.stop_ids, seen[0].samples) == (("|",), (TOKENIZER.eos_id,), 2)
    assert TOKENIZER.decode(seen[2].prompt, skip_special=True) == "Be short.\n\nUser: Hello?\n\nAssistant:"
    assert seen[3].prompt == seen[0].prompt
    assert seen[3].sampling.max_new_tokens == fake.places - PROMPT_TOKENS  # what is left
    assert seen[3].sampling.seed != seen[2].sampling.seed
    assert seen[4].prompt == [TOKENIZER.bos_id, *TOKENIZER.encode("ab")]
    assert seen[4].sampling.max_new_tokens == 16


def test_stream(shared):
    asked = dict(model="m", messages=QUESTION, n=2)
    with shared.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [choice.delta.role for chunk in chunks[:2] for choice in chunk.choices] == ["assistant"] * 2
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "Hé, you!"
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == ["stop"]
        assert len(mine) > 5  # it came piece by piece
    whole = shared.chat.completions.create(**asked)
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_on_the_wire(running):
    body = {"model": "m", "prompt": "a", "max_tokens": 2, "stream": True}
    reply = httpx.post(f"{running.url}/v1/completions", json=body, timeout=LIMIT_S)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = reply.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_completions(shared):
    reply = shared.completions.create(model="m", prompt=["a", "bc"], n=2, max_tokens=30, stop=[","], logprobs=0)
    assert [choice.text for choice in reply.choices] == ["Hé"] * 4
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert reply.usage.prompt_tokens == 5
    assert reply.choices[0].logprobs.token_logprobs == [-0.5] * 4
    assert reply.choices[0].logprobs.tokens == ["H", "\ufffd", "\ufffd", ","]
    assert reply.choices[0].logprobs.text_offset == [0, 1, 2, 3]
    for prompt in ([5, 6], [[5, 6]]):
        assert shared.completions.create(model="m", prompt=prompt, max_tokens=1).usage.total_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(shared, stream):
    asked = dict(model="m", messages=QUESTION, logprobs=True)
    if stream:
        with shared.chat.completions.create(**asked, stream=True) as chunks:
            choices = [choice for chunk in chunks for choice in chunk.choices]
        content = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    else:
        content = shared.chat.completions.create(**asked).choices[0].logprobs.content
    assert bytes(byte for one in content for byte in one.bytes).decode() == "Hé, you!"  # without what ended it
    assert {one.logprob for one in content} == {-0.5}


def test_models_and_health(running, client):
    [card] = client.models.list().data
    assert card == client.models.retrieve("m")
    assert (card.id, card.max_model_len) == ("m", 256)
    with pytest.raises(openai.NotFoundError, match="'m' alone"):
        client.models.retrieve("other/model")
    health = httpx.get(f"{running.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "unfinished": 0, "capacity": 4})


def test_a_full_queue_gets_429(running, client, fake):
    """Two slots and two places in the queue."""
    fake.going.clear()
    with ThreadPoolExecutor(4) as pool:
        four = [pool.submit(client.completions.create, model="m", prompt="a") for _ in range(4)]
        until(lambda: running.app.state.worker.unfinished == 4)
        with pytest.raises(openai.RateLimitError, match="try again later") as refused:
            client.completions.create(model="m", prompt="a")
        assert refused.value.response.headers["retry-after"] == "1"
        fake.going.set()
        assert {future.result(LIMIT_S).choices[0].text for future in four} == {"Hé, you!"}
    assert client.completions.create(model="m", prompt="a").choices[0].text == "Hé, you!"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(running, fake, stream):
    fake.going.clear()
    body = json.dumps({"model": "m", "prompt": "a", "stream": stream, "n": 3}).encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=LIMIT_S) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: running.app.state.worker.unfinished == 3)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
    until(lambda: running.app.state.worker.unfinished == 0)
    assert len(fake.cancelled) == 3
    assert not fake.busy


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_fails_everyone_and_ends_the_server(fake, stream):
    fake.going.clear()
    with serving(fake) as running, running.client() as client, ThreadPoolExecutor(2) as pool:

        def ask():
            reply = client.completions.create(model="m", prompt="a", stream=stream)
            return list(reply) if stream else reply

        two = [pool.submit(ask) for _ in range(2)]
        until(lambda: running.app.state.worker.unfinished == 2)
        running.server.should_exit = False
        fake.failure = RuntimeError("out of memory")
        for future in two:
            with pytest.raises(openai.APIError, match="RuntimeError: out of memory") as failed:
                future.result(LIMIT_S)
            assert stream or failed.value.status_code == 500
        running.thread.join(LIMIT_S)
        assert isinstance(running.error.__cause__, RuntimeError)


def test_health_of_a_failed_engine(fake):
    """Asked of the app itself: the server ends within moments."""
    app = create_app(fake, TOKENIZER)
    fake.failure = RuntimeError("out of memory")

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            answers = [
                await client.post("/v1/completions", json={"model": "deepseek", "prompt": "a"}) for _ in range(2)
            ]
            return [*answers, await client.get("/health")]

    *answers, health = asyncio.run(asyncio.wait_for(ask(), LIMIT_S))
    assert [answer.status_code for answer in answers] == [500, 500]
    assert health.status_code == 503
    assert health.json()["status"] == "failed"
    assert health.json()["error"] == "RuntimeError: out of memory"


def test_a_signal_lets_calls_finish_and_refuses_new_ones(running, client, fake):
    fake.going.clear()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.completions.create, model="m", prompt="a")
        until(lambda: running.app.state.worker.unfinished == 1)
        running.server.handle_exit(15, None)
        until(lambda: running.app.state.worker.draining)
        with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
            client.completions.create(model="m", prompt="a")
        assert refused.value.status_code == 503
        assert httpx.get(f"{running.url}/health").json()["status"] == "shutting down"
        fake.going.set()
        assert future.result(LIMIT_S).choices[0].text == "Hé, you!"
    running.thread.join(LIMIT_S)
    assert not running.thread.is_alive()
    assert running.error is None


def test_a_second_signal_does_not_wait(running, client, fake):
    fake.going.clear()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.completions.create, model="m", prompt="a")
        until(lambda: running.app.state.worker.unfinished == 1)
        running.server.handle_exit(15, None)
        running.server.handle_exit(15, None)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            future.result(LIMIT_S)
    running.thread.join(LIMIT_S)
    assert (running.error.exit_code, running.error.busy) == (143, False)


def test_reasoning_and_tools():
    tokenizer = tokenizer_with(*TAGS)
    answers = {
        "think": "I <b>think\n</think>It is 4 < 5.",
        "call": f'Wait.{CALLS}{CALL}add{SEPARATOR}{{"a": 1}}{CALL_END}{CALL}add{SEPARATOR}{{"a": 2}}{CALL_END}{CALLS_END}',
        "done": "It is 3.",
    }
    fake = FakeEngine(tokenizer, lambda generation: answers[wanted], places=2048)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    with serving(fake, tokenizer=tokenizer, template=V3_1) as running, running.client() as client:

        def ask(messages=QUESTION, **options):
            """The message, and the same put together from a stream."""
            asked = dict(model="m", messages=messages, **options)
            whole = client.chat.completions.create(**asked).choices[0]
            with client.chat.completions.create(**asked, stream=True) as stream:
                deltas = [choice.delta for chunk in stream for choice in chunk.choices]
            reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            content = "".join(delta.content or "" for delta in deltas)
            calls = [call for delta in deltas for call in delta.tool_calls or ()]
            assert reasoning == (getattr(whole.message, "reasoning_content", None) or "")
            assert content == (whole.message.content or "")
            told = [call.function.model_dump() for call in whole.message.tool_calls or ()]
            assert [call.function.model_dump() for call in calls] == told
            return whole

        wanted = "think"
        message = ask(extra_body={"chat_template_kwargs": {"thinking": True}}).message
        assert (message.reasoning_content, message.content) == ("I <b>think", "It is 4 < 5.")

        wanted = "call"
        choice = ask(tools=[tool])
        calls = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait.")
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("add", '{"a": 1}'),
            ("add", '{"a": 2}'),
        ]
        assert len({call.id for call in calls}) == 2

        wanted = "done"
        history = [*QUESTION, choice.message.model_dump()]
        history += [{"role": "tool", "tool_call_id": call.id, "content": "1"} for call in calls]
        assert ask(history, tools=[tool]).message.content == "It is 3."


def test_a_whole_answer_shows_a_thought_that_was_not_announced(fake):
    template = FolderTemplate("{{ messages[0].content }}")
    fake.answer = "So: 4.\n</think>\n\nIt is 4."
    with serving(fake, template=template) as running, running.client() as client:
        message = client.chat.completions.create(model="m", messages=QUESTION).choices[0].message
    assert (message.reasoning_content, message.content) == ("So: 4.", "It is 4.")


def test_eight_clients_at_once_get_what_each_gets_alone():
    """With the engine itself; fewer slots than clients, and temperatures above 0 too."""
    config = micro("llm-gqa", num_hidden_layers=2, vocab_size=TOKENIZER.vocab_size)
    engine = Engine(
        dsj.DeepSeek(config), random_variables(config), slots=3, places=128, tokenizer=TOKENIZER, decode_steps=4
    )
    with serving(engine) as running, running.client(timeout=120) as client:

        def ask(i):
            reply = client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "Say " * (1 + i % 4)}], max_tokens=10 + i, logprobs=True,
                temperature=0 if i < 6 else 0.8, seed=i,
            )  # fmt: skip
            [choice] = reply.choices
            assert reply.usage.completion_tokens <= 10 + i
            return choice.message.content, [one.token for one in choice.logprobs.content]

        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, range(8)))
        assert [ask(i) for i in range(8)] == together
        assert len({tuple(tokens) for _, tokens in together}) == 8
