"""`deepseek-jax chat` and `serve` on a folder: from the command line to a model and back."""

import io
import os
import re
import signal
import subprocess
import sys
import threading

import openai
import pytest
from helpers import micro, random_variables
from serving import LIMIT_S, QUESTION, TOKENIZER

import deepseek_jax as dsj
from deepseek_jax import storage
from deepseek_jax.cli.convert import hf_to_run
from deepseek_jax.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published checkpoint, whose tokenizer says that it is of the first family."""
    config = micro("llm-gqa", num_hidden_layers=1, vocab_size=TOKENIZER.vocab_size)
    path = tmp_path_factory.mktemp("models") / "tiny"
    dsj.save_hf(path, dsj.DeepSeek(config), random_variables(config), "float32", tokenizer=TOKENIZER)
    return str(path)


@pytest.fixture
def spoken(monkeypatch, capsys):
    """Runs `deepseek-jax chat` with lines piped in: exit code, stdout, stderr."""

    def run(*words, lines="Hello?\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = main(["chat", *words])
        return (code, *capsys.readouterr())

    return run


def test_chat_with_piped_lines_writes_answers_alone(folder, spoken):
    asked = (folder, "--template", "v2", "--max-new-tokens", "5", "--temperature", "0")
    code, out, _ = spoken(*asked)
    assert code == 0
    assert "\x1b" not in out
    assert ">" not in out
    assert out.endswith("(cut off)\n")
    assert spoken(*asked, lines="/reset\nHello?\n/exit\nnever read\n")[1] == f"(conversation forgotten)\n{out}"


def test_chat_finds_the_template_or_says_how_to_name_one(folder, tmp_path, spoken):
    assert spoken(folder, "--max-new-tokens", "1", "--temperature", "0")[0] == 0
    run = str(hf_to_run(storage.path(folder), str(tmp_path / "run")))
    code, _, err = spoken(run)
    assert (code, f"{run} has no chat template" in err, "--template NAME, one of coder, llm" in err) == (2, True, True)
    assert spoken(run, "--template", "llm", "--max-new-tokens", "1")[0] == 0


def test_chat_names_what_it_cannot_do(folder, spoken):
    assert "'v9' is not known; give one of llm" in spoken(folder, "--template", "v9")[2]
    assert "do not think" in spoken(folder, "--template", "v2", "--thinking")[2]
    assert "no token '<｜User｜>'" in spoken(folder, "--template", "v3")[2]
    code, _, err = spoken(folder, "--template", "v2", "--max-new-tokens", "0")
    assert (code, "--max-new-tokens 0: must be at least 1" in err) == (2, True)


def test_serve_answers_and_ends_with_a_signal(folder):
    words = [sys.executable, "-m", "deepseek_jax.cli.main", "serve", folder, "--port", "0", "--slots", "2"]
    words += ["--template", "v2", "--places", "64"]
    environment = {**os.environ, "DEEPSEEK_JAX_API_KEY": "secret"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        limit = threading.Timer(4 * LIMIT_S, server.kill)
        limit.start()
        try:
            line = server.stdout.readline()
            url = re.match(
                r"(http://127\.0\.0\.1:\d+/v1) serves model 'tiny': 2 slots of 64 tokens, chat template v2", line
            )
            assert url, line
            with openai.OpenAI(base_url=url[1], api_key="secret", timeout=LIMIT_S) as client:
                [card] = client.models.list().data
                reply = client.chat.completions.create(model=card.id, messages=QUESTION, max_tokens=5, temperature=0)
                assert reply.usage.completion_tokens <= 5
            server.send_signal(signal.SIGTERM)
            assert server.wait(LIMIT_S) == 0
        finally:
            limit.cancel()
            server.kill()
