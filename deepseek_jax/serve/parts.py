"""A growing answer, split as it comes: what was thought, what is said, which tools are called."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepseek_jax.chat.tagged import CALLS

_LONGEST_MARK = 32  # characters: `<think>`, `</think>` and CALLS are shorter


class Parts(NamedTuple):
    """What is new of an answer."""

    reasoning: str
    content: str
    tool_calls: list[dict[str, Any]]
    """All of them at once, when the answer has ended."""


class Splitter:
    """Splits one answer by its chat template.

    A template parses whole texts. A text is parsed again each time that it has grown, and what the parts grew by is given
    out; its end is held back while it may be the beginning of a mark such as `</think>`, or of calls of tools.
    """

    def __init__(self, template: Any, thinking: bool):
        self._template, self._thinking = template, thinking
        self._text = ""
        self._given = ["", ""]  # reasoning, content

    def feed(self, text: str, *, last: bool = False) -> Parts:
        """Takes the next piece of the answer; returns what is new of its parts. `last`: the answer ends here."""
        self._text += text
        if not (text or last):
            return Parts("", "", [])
        parsed = self._template.parse(self._text if last else self._text[: self._certain()], self._thinking)
        reasoning, content = parsed.reasoning or "", parsed.content
        said = self._given[1].strip()
        if said and not content.startswith(self._given[1]) and reasoning.startswith(said):
            # A model that was not known to think has closed a thought: what was given out as content belonged to it.
            self._given = [said, ""]
        return Parts(self._grown(0, reasoning), self._grown(1, content), list(parsed.tool_calls) if last else [])

    def _certain(self) -> int:
        """How many characters can be no part of a mark that has only begun, or of calls that go on."""
        text = self._text
        if self._template.tools and (calls := text.find(CALLS)) >= 0:
            return calls
        start = text.rfind("<", max(0, len(text) - _LONGEST_MARK))
        return start if start >= 0 and ">" not in text[start:] else len(text)

    def _grown(self, part: int, text: str) -> str:
        given = self._given[part]
        if not text.startswith(given):  # templates strip white space at an end, some of which has been given out
            return ""
        self._given[part] = text
        return text[len(given) :]
