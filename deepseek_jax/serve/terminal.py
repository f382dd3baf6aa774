"""A conversation in a terminal: one engine, one history, answers as they come."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from deepseek_jax.infer.engine import Request
from deepseek_jax.infer.sampling import Sampling
from deepseek_jax.serve.parts import Splitter

HELP = """\
/system TEXT      what the model is told first; without TEXT: nothing
/reset            forget the conversation
/temperature X    0 takes the likeliest token each time
/help             this list
/exit             leave; so does Ctrl-D
Ctrl-C stops an answer."""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# What a model writes must not move the cursor or set a terminal's title.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """A conversation and its commands.

    Fields:
        messages: the history, without the system message.
        system: the system message; "" for none.
        sampling: how answers are drawn.
    """

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        template: Any,
        sampling: Sampling,
        *,
        max_new_tokens: int | None = None,
        system: str = "",
        thinking: bool = False,
        read: Callable[[str], str] = input,
        write: Callable[[str], Any] = print,
        prompt: str = "> ",
        colour: bool = False,
        speed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            engine: as `infer.engine.Engine`; used from the calling thread.
            tokenizer: the model's.
            template: chat template.
            sampling: how answers are drawn; its max_new_tokens and stop_ids are not used.
            max_new_tokens: most tokens of an answer; None: what the history leaves.
            system: first system message.
            thinking: whether the model is asked to think first.
            read: takes a prompt, returns a line; EOFError ends the conversation.
            write: writes a piece of text as it is, without a line break.
            prompt: before each line that is read.
            colour: whether thoughts and notes are dimmed.
            speed: whether an answer ends with tokens per second.
            clock: seconds.

        Raises: ValueError when the template cannot do what is asked: think, take a system message, or use this tokenizer.
        """
        self.messages: list[dict[str, Any]] = []
        self.system, self.sampling = system, sampling
        self._engine, self._tokenizer, self._template = engine, tokenizer, template
        self._max_new_tokens, self._thinking = max_new_tokens, thinking
        self._read, self._write, self._prompt = read, write, prompt
        self._colour, self._speed, self._clock = colour, speed, clock
        self._turn = 0
        # An answer must always have some room, so that a long history does not cut it off.
        least = engine.places // 4
        self._room = least if max_new_tokens is None else min(max_new_tokens, least)
        self._stop_ids = tuple(template.stop_ids(tokenizer))
        self._encode([{"role": "user", "content": "?"}])

    def run(self) -> None:
        """Reads lines and answers them until /exit or the end of the input."""
        while True:
            try:
                line = self._read(self._prompt).strip()
            except EOFError:
                return
            except KeyboardInterrupt:  # at the prompt: the line is given up
                self._note("(/exit or Ctrl-D leaves)", before="\n")
                continue
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line:
                self.answer(line)

    def answer(self, text: str) -> None:
        """Says something to the model and writes its answer; both become part of the history, unless it does not fit."""
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fitting_prompt()
        except ValueError as error:
            self.messages.pop()
            self._note(f"({error})")
            return
        left = self._engine.places - len(prompt)
        sampling = replace(
            self.sampling,
            max_new_tokens=left if self._max_new_tokens is None else min(self._max_new_tokens, left),
            stop_ids=self._stop_ids,
            seed=(self.sampling.seed + self._turn) % 2**32,  # the same question need not get the same answer
        )
        self._turn += 1
        [generation] = self._engine.submit(Request(prompt=prompt, sampling=sampling))
        start = self._clock()
        content = self._stream(generation)
        seconds = self._clock() - start
        self.messages.append({"role": "assistant", "content": content})
        if generation.finish_reason == "length":
            self._note("(cut off: no room left for more)" if sampling.max_new_tokens == left else "(cut off)")
        elif generation.finish_reason == "cancelled":
            self._note("(stopped)")
        if self._speed:
            count = len(generation.tokens)
            self._note(f"({count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s)")

    def _stream(self, generation: Any) -> str:
        """Runs the engine until the answer has ended, writing it; returns it without its thoughts."""
        splitter, shown, said, thinking = Splitter(self._template, self._thinking), 0, "", False
        with _interrupts() as interrupted:
            while True:
                last = generation.finish_reason is not None
                text = generation.text
                parts = splitter.feed(text[shown:], last=last)
                shown = len(text)
                if parts.reasoning:
                    self._write(("" if thinking else f"{self._dim()}<think>\n") + _clean(parts.reasoning))
                    thinking = True
                if thinking and (parts.content or last):
                    self._write(f"\n</think>{self._plain()}\n\n")
                    thinking = False
                content = parts.content if said else parts.content.lstrip()
                said += content
                self._write(_clean(content))
                for call in parts.tool_calls:
                    self._write(f"\n{_clean(str(call['function']))}")
                if last:
                    break
                if interrupted.is_set():
                    self._engine.cancel(generation)
                else:
                    self._engine.step()
        self._write("\n")
        return said

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self._template.encode(self._tokenizer, head + messages, thinking=self._thinking).ids

    def _fitting_prompt(self) -> list[int]:
        """The history as token ids, its oldest turns dropped until an answer has room.

        Raises: ValueError when the last message does not fit by itself, or the template has no place for one.
        """
        keep, dropped = self.messages, 0
        while len(prompt := self._encode(keep)) + self._room > self._engine.places:
            if len(keep) == 1:
                raise ValueError(
                    f"{len(prompt)} tokens, and {self._room} for an answer, are more than the {self._engine.places} "
                    "places: say it shorter, or start with more --places"
                )
            keep, dropped = keep[2:], dropped + 1  # a question and its answer
        if dropped:
            self.messages = keep
            self._note(f"(the conversation has grown too long: its oldest turns are forgotten, {dropped} of them)")
        return prompt

    def _command(self, line: str) -> bool:
        """Runs a line that begins with a slash; False: leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/system":
            self._set_system(rest)
        elif name == "/reset":
            self.messages.clear()
            self._note("(conversation forgotten)")
        elif name == "/temperature":
            try:
                self.sampling = replace(self.sampling, temperature=float(rest))
                self._note(f"(temperature {self.sampling.temperature:g})")
            except ValueError as error:
                self._note(f"({error})")
        elif name == "/help":
            self._note(HELP)
        else:
            self._note(f"(no command {name}; /help lists them)")
        return True

    def _set_system(self, text: str) -> None:
        before, self.system = self.system, text
        try:
            self._encode([{"role": "user", "content": "?"}])
        except ValueError as error:  # the template has no place for one
            self.system = before
            self._note(f"({error})")
        else:
            self._note("(system message set)" if text else "(no system message)")

    def _note(self, text: str, before: str = "") -> None:
        self._write(f"{before}{self._dim()}{text}{self._plain()}\n")

    def _dim(self) -> str:
        return _DIM if self._colour else ""

    def _plain(self) -> str:
        return _PLAIN if self._colour else ""


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets an event for a while: an exception in the middle of a step would leave the engine broken.

    A second Ctrl-C raises KeyboardInterrupt, for when a step does not end.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # no place for signal handlers
        yield pressed
        return

    def handle(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _clean(text: str) -> str:
    return _CONTROLS.sub("", text)
