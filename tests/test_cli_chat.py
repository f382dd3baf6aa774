"""The conversation in a terminal: what is written, what is remembered, what its commands do."""

import os
import signal

import pytest
from fake_engine import FakeEngine, tokenizer_with

from deepseek_jax.chat.jinja import FolderTemplate
from deepseek_jax.chat.plain import CODER, LLM, V2
from deepseek_jax.chat.tagged import R1
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.infer.sampling import Sampling
from deepseek_jax.serve.parts import Splitter
from deepseek_jax.serve.terminal import Terminal

TOKENIZER = byte_tokenizer()
TAGS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")


class Screen:
    """Lines to be read, and what was written. A line may be an exception, which reading it raises."""

    def __init__(self, *lines):
        self.lines, self.text = list(lines), ""

    def read(self, prompt):
        self.text += prompt
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line

    def write(self, text):
        self.text += text


def talk(*lines, answer="Fine.", engine=None, template=V2, tokenizer=TOKENIZER, **options):
    """A conversation that has been led, the screen's text, and the engine."""
    screen = Screen(*lines)
    engine = engine or FakeEngine(tokenizer, answer, slots=1)
    terminal = Terminal(
        engine,
        tokenizer,
        template,
        options.pop("sampling", Sampling()),
        read=screen.read,
        write=screen.write,
        **options,
    )
    terminal.run()
    return terminal, screen.text, engine


def asked(generation):
    return TOKENIZER.decode(generation.request.prompt, skip_special=True)


def test_a_conversation_has_a_history():
    prompts = []
    terminal, text, _ = talk(
        "Hello?", "", "And now?", answer=lambda g: prompts.append(asked(g)) or f"Answer {len(prompts)}."
    )
    assert text == "> Answer 1.\n> > Answer 2.\n> "
    assert prompts[1] == "User: Hello?\n\nAssistant: Answer 1.User: And now?\n\nAssistant:"
    assert [message["role"] for message in terminal.messages] == ["user", "assistant"] * 2


def test_commands():
    prompts = []
    terminal, text, _ = talk(
        "/system Be short.", "Hello?", "/reset", "/temperature 0.5", "/temperature x", "/temperature -1", "/jump", "/help",
        "Again?", "/system", "Third?", "/exit", "never read", sampling=Sampling(seed=7),
        answer=lambda g: prompts.append((asked(g), g.request.sampling)) or "Fine.",
    )  # fmt: skip
    assert [prompt for prompt, _ in prompts] == [
        "Be short.\n\nUser: Hello?\n\nAssistant:",
        "Be short.\n\nUser: Again?\n\nAssistant:",
        "User: Again?\n\nAssistant: Fine.User: Third?\n\nAssistant:",
    ]
    assert [(how.temperature, how.seed) for _, how in prompts] == [(0, 7), (0.5, 8), (0.5, 9)]
    for said in (
        "(system message set)",
        "(conversation forgotten)",
        "(temperature 0.5)",
        "could not convert",
        "negative",
    ):
        assert said in text
    assert "(no command /jump; /help lists them)" in text
    assert "Ctrl-C stops an answer." in text
    assert "(no system message)" in text
    assert terminal.system == ""


def test_thoughts_are_marked_and_dimmed_on_a_terminal():
    tokenizer = tokenizer_with(*TAGS)
    answer = "I think\nit < 5.\n</think>\n\nIt is \x1b[31m4\x07."
    terminal, text, _ = talk("How much?", answer=answer, template=R1, tokenizer=tokenizer)
    assert text == "> <think>\nI think\nit < 5.\n</think>\n\nIt is [31m4.\n> "  # a model may not steer the terminal
    _, text, _ = talk("How much?", answer=answer, template=R1, tokenizer=tokenizer, colour=True)
    assert text == "> \x1b[2m<think>\nI think\nit < 5.\n</think>\x1b[0m\n\nIt is [31m4.\n> "
    assert terminal.messages[1]["content"] == "It is \x1b[31m4\x07."  # and is quoted as it spoke
    _, text, _ = talk("How much?", answer="I th", template=R1, tokenizer=tokenizer, max_new_tokens=2, prompt="")
    assert text == "<think>\nI \n</think>\n\n\n(cut off)\n"


def test_speed_is_told_where_it_is_wanted():
    times = iter((10.0, 12.0))
    _, text, _ = talk("Hello?", speed=True, clock=lambda: next(times), colour=True)
    assert "\x1b[2m(6 tokens, 3.0 tokens/s)\x1b[0m\n" in text


def test_the_oldest_turns_are_dropped_where_the_history_grows_too_long():
    prompts = []
    engine = FakeEngine(TOKENIZER, lambda g: prompts.append(asked(g)) or "Fine.", slots=1, places=120)
    lines = [f"{'x' * 12} {i}" for i in range(4)]
    terminal, text, _ = talk("/system Short.", *lines, engine=engine)
    assert "its oldest turns are forgotten, 1 of them" in text
    assert prompts[-1].startswith(f"Short.\n\nUser: {lines[2]}\n\nAssistant:")
    assert all(len(prompt) + 1 + 120 // 4 <= 120 for prompt in prompts)
    assert len(terminal.messages) == 4

    terminal, text, _ = talk("Hi", "x" * 100, "y", engine=engine)
    assert "119 tokens, and 30 for an answer, are more than the 120 places" in text
    assert [m["content"] for m in terminal.messages if m["role"] == "user"] == ["Hi", "y"]


def test_an_answer_takes_what_is_left_or_what_was_asked():
    limits = []
    engine = FakeEngine(
        TOKENIZER, lambda g: limits.append(g.request.sampling.max_new_tokens) or "a" * 90, slots=1, places=100
    )
    _, text, _ = talk("Hello?", engine=engine)
    _, short, _ = talk("Hello?", engine=engine, max_new_tokens=5)
    assert limits == [100 - 25, 5]
    assert text.endswith("(cut off: no room left for more)\n> ")
    assert short == "> aaaaa\n(cut off)\n> "


def test_ctrl_c_stops_an_answer_and_not_the_program():
    class Pressed(FakeEngine):
        def step(self):
            super().step()
            if len(self.running) and len(self.running[0].tokens) == 3 and not self.cancelled:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    terminal, text, engine = talk("Hello?", KeyboardInterrupt(), "And?", engine=Pressed(TOKENIZER, "Fine.", slots=1))
    assert text == "> Fin\n(stopped)\n> \n(/exit or Ctrl-D leaves)\n> Fine.\n> "
    assert len(engine.cancelled) == 1
    assert not engine.busy
    assert terminal.messages[1]["content"] == "Fin"
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_template_cannot_do_is_said_before_or_instead_of_the_answer():
    with pytest.raises(ValueError, match="do not think"):
        talk(thinking=True)
    with pytest.raises(ValueError, match=r"no token '<\|EOT\|>'"):
        talk(template=CODER)
    with pytest.raises(ValueError, match="no place for a system message"):
        talk(template=LLM, system="Be short.")
    terminal, text, _ = talk("/system Be short.", "Hello?", template=LLM)
    assert "no place for a system message" in text
    assert text.endswith("> Fine.\n> ")
    assert terminal.system == ""


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_thought_that_was_not_announced_loses_nothing(size):
    """Such a template tells thoughts from the answer when they end."""
    splitter, text = Splitter(FolderTemplate("{{ messages }}"), thinking=False), "\nSo: 4.\n</think>\n\nIt is 4 <b."
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = [splitter.feed(piece, last=piece is pieces[-1]) for piece in pieces]
    told = "".join(part.reasoning + part.content for part in parts)
    assert "".join(told.split()) == "So:4.Itis4<b."
    assert parts[-1].content.endswith("b." if size > 1 else ".")
