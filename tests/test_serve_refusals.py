"""What the HTTP endpoint refuses, and how it says so."""

import sys

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from serving import LIMIT_S, QUESTION, TOKENIZER, serving

import deepseek_jax.serve
from deepseek_jax.chat.tagged import V3_1
from deepseek_jax.serve import bind, create_app


@pytest.fixture
def fake():
    return FakeEngine(TOKENIZER, "Hé, you!")


@pytest.fixture(scope="module")
def running():
    with serving(FakeEngine(TOKENIZER, "Hé, you!"), queue=2) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with running.client() as client:
        yield client


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        (dict(temperature=-1), "temperature", "must not be negative"),
        (dict(top_p=0), "top_p", "must be in"),
        (dict(max_tokens=0), "max_tokens", "must be at least 1"),
        (dict(max_tokens=3, max_completion_tokens=4), "max_tokens", "contradicts max_completion_tokens = 4"),
        (dict(n=0), "n", "must be at least 1"),
        (dict(n=5), "n", "this server holds 4"),
        (dict(seed=-1), "seed", "must be in"),
        (dict(stop=[""]), "stop", "none of them empty"),
        (dict(stream_options={"include_usage": True}), "stream_options", "stream = true"),
        (dict(presence_penalty=0.5), "presence_penalty", "0.5 is not supported"),
        (dict(logit_bias={"5": 1}), "logit_bias", "is not supported"),
        (dict(logprobs=True, top_logprobs=2), "top_logprobs", "2 is not supported"),
        (dict(response_format={"type": "json_object"}), "response_format", "is not supported"),
        (dict(tool_choice="required"), "tool_choice", "only auto and none"),
        (dict(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), "tools", "knows no calls of tools"),
        (dict(tools=[{"type": "web_search"}]), "tools[0].type", "is not supported"),
        (dict(tools=[{"function": {"name": 5}}]), "tools[0].function.name", "must be a string, not 5"),
        (dict(tools=[{"function": {"name": "f", "strict": True}}]), "tools[0].function.strict", "is not supported"),
        (
            dict(messages=[*QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]),
            "messages[1].tool_calls[0]",
            '"arguments": "…"',
        ),
        (dict(messages=[]), "messages", "is empty"),
        (dict(messages=[{"role": "robot", "content": "x"}]), "messages[0].role", "'robot'"),
        (dict(messages=[{"role": "user"}]), "messages[0].content", "is required"),
        (dict(messages=[{"role": "user", "content": "x", "name": "Bo"}]), "messages[0].name", "unknown field"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]", "text alone"),
        (dict(messages=[*QUESTION, {"role": "assistant", "content": "x"}]), "messages", "after an assistant's message"),
        (dict(extra_body={"top_k": "5"}), "top_k", "must be an integer"),
        (dict(extra_body={"top_k": 2**31}), "top_k", "less than 2"),
        (dict(extra_body={"min_p": True}), "min_p", "must be a number"),
        (dict(extra_body={"temprature": 1}), "temprature", "did you mean temperature?"),
        (dict(extra_body={"chat_template_kwargs": {"thinking": True}}), "messages", "do not think"),
        (dict(extra_body={"chat_template_kwargs": {"style": 1}}), "chat_template_kwargs.style", "unknown field"),
    ],
)  # fmt: skip
def test_what_a_chat_cannot_have_is_named(client, change, param, said):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**dict(model="m", messages=QUESTION) | change)
    assert refused.value.param == param
    assert said in refused.value.message
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        (dict(echo=True), "echo", "true is not supported"),
        (dict(suffix="x"), "suffix", "is not supported"),
        (dict(best_of=2), "best_of", "n draws several"),
        (dict(logprobs=1), "logprobs", "0 gives the sampled tokens'"),
        (dict(prompt=[["a"]]), "prompt", "must be a string"),
        (dict(prompt=[]), "prompt", "is empty"),
        (dict(prompt=[999]), None, "outside the vocabulary of 259"),
        (dict(extra_body={"prompt": None}), "prompt", "is required"),
    ],
)
def test_what_a_completion_cannot_have_is_named(client, change, param, said):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**dict(model="m", prompt="a") | change)
    assert refused.value.param == param
    assert said in refused.value.message


def test_other_refusals(running, client):
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here: this is 'm'") as refused:
        client.chat.completions.create(model="gpt", messages=QUESTION)
    assert refused.value.code == "model_not_found"
    for asked in (dict(prompt="a" * 300), dict(prompt="a", max_tokens=255)):
        with pytest.raises(openai.BadRequestError, match="more than the 256 places") as refused:
            client.completions.create(model="m", **asked)
        assert refused.value.code == "context_length_exceeded"
    json_type = {"content-type": "application/json"}
    for body, headers, status, said in (
        (b"{", json_type, 400, "not valid JSON"),
        (b'{"model": NaN}', json_type, 400, "NaN is no JSON number"),
        (b"[" * 100_000, json_type, 400, "not valid JSON"),
        (b"\xff", json_type, 400, "not valid JSON"),
        (b'["m"]', json_type, 400, "send an object"),
        (b'{"model": "m", "prompt": "\\ud800"}', json_type, 400, "surrogate"),
        (b'{"model": "m", "prompt": "a"}', {"content-type": "text/plain"}, 415, "send `Content-Type"),
    ):
        reply = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers, timeout=LIMIT_S)
        assert reply.status_code == status, body[:40]
        assert said in reply.json()["error"]["message"]
    assert httpx.get(f"{running.url}/v1/completions").json()["error"]["message"].endswith("Method Not Allowed")
    assert httpx.get(f"{running.url}/v2").status_code == 404


def test_a_model_without_a_template_says_what_helps(fake):
    with serving(fake, template=None) as running, running.client() as client:
        with pytest.raises(openai.BadRequestError, match="--template NAME") as refused:
            client.chat.completions.create(model="m", messages=QUESTION)
        assert refused.value.code == "no_chat_template"
        assert client.completions.create(model="m", prompt="a").choices[0].text == "Hé, you!"


def test_api_key_and_size_of_a_body(fake):
    with serving(fake, api_key="secret", max_body_bytes=100) as running:
        with running.client(api_key="secret") as client:
            assert client.completions.create(model="m", prompt="a").usage.total_tokens == 12
            with pytest.raises(openai.APIStatusError, match="longer than 100 bytes") as refused:
                client.completions.create(model="m", prompt="a" * 100)
            assert refused.value.status_code == 413
        with (
            running.client(api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError, match="wrong API key"),
        ):
            client.completions.create(model="m", prompt="a")
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200  # whoever watches a server has no key


def test_bad_settings_of_an_app_are_named(fake):
    with pytest.raises(ValueError, match="queue = -1"):
        create_app(fake, TOKENIZER, queue=-1)
    with pytest.raises(ValueError, match="api_key = ''"):
        create_app(fake, TOKENIZER, api_key="")
    with pytest.raises(ValueError, match="no token '<｜User｜>'"):
        create_app(fake, TOKENIZER, V3_1)


def test_an_address_that_cannot_be_had_is_named():
    with bind(port=0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port = {port}: cannot listen there .*in use"):
            bind(port=port)
    with pytest.raises(ValueError, match="port = 65536: must be in"):
        bind(port=65536)
    with pytest.raises(ValueError, match="host = '256.0.0.1', port = 0: cannot listen there"):
        bind("256.0.0.1", 0)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "deepseek_jax.serve.server")
    monkeypatch.delattr(deepseek_jax.serve, "serve", raising=False)
    with pytest.raises(ValueError, match=r"uvicorn is not installed: pip install 'deepseek-jax\[serve\]'"):
        _ = deepseek_jax.serve.serve
