"""A checkpoint's own `chat_template`, for models whose template we do not have.

Rendered as transformers does it: in jinja2's immutable sandbox, with the same options, filters and globals. A template
makes one text of the whole conversation, where names of tokens that a user typed look like those that the template
wrote. So `encode` breaks the names inside messages with a character that occurs nowhere in the conversation, and takes
it out after the text has been cut at the names.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deepseek_jax.chat.messages import Message, Tool, check_messages
from deepseek_jax.chat.tagged import THINK, THINK_END, split_reasoning
from deepseek_jax.chat.template import Encoded, Parsed
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.vocabulary import TOKENIZER_CONFIG
from deepseek_jax.storage import AnyPath
from deepseek_jax.storage import path as storage_path

# What the expressions of a template may raise, beside jinja2's own errors.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class FolderTemplate:
    """The interface of `Template` over a Jinja template.

    Fields:
        source: the template.
        variables: what it may use beside the messages: the names of special tokens (`bos_token`, …).
        end_ids: ids that end an answer, beside the tokenizer's `eos_id`.
        name: where it came from; errors begin with it.
        tools: whether `parse` finds tool calls; each model writes them in its own way, so they stay text.
    """

    tools: ClassVar[bool] = False

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()
    name: str = "chat_template"

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as one text.

        Args:
            thinking: passed on under the names that templates ask for, `thinking` and `enable_thinking`.
        Raises: ValueError when the messages are malformed or the template refuses them, fails, or leaves its sandbox.
        """
        check_messages(messages)
        return self._render(messages, tools, thinking, add_generation_prompt, ("", ""))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = False,
        add_generation_prompt: bool = True,
    ) -> Encoded:
        """The conversation as ids. What is trained stands in the template between `{% generation %}` and
        `{% endgeneration %}`, as in transformers; a template without them trains on nothing. Errors as `render`."""
        check_messages(messages)
        everything = json.dumps([list(map(dict, messages)), tools, self.source], ensure_ascii=False, default=str)
        # Private-use characters: mark, begin and end of what is trained.
        unused = (c for c in map(chr, range(0xE000, 0xF900)) if c not in everything)
        mark, begin, end = (next(unused) for _ in range(3))
        broken = [_broken_message(message, tokenizer, mark) for message in messages]
        broken_tools = _broken(tools, tokenizer, mark)
        text = self._render(broken, broken_tools, thinking, add_generation_prompt, (begin, end))
        ids: list[int] = []
        trained: list[bool] = []
        for i, part in enumerate(text.split(begin)):
            inside, _, after = part.partition(end) if i else ("", "", part)
            for piece, learned in ((inside, True), (after, False)):
                new = _encode_broken(tokenizer, piece, mark)
                ids += new
                trained += [learned] * len(new)
        return Encoded(ids, trained)

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(dict.fromkeys((tokenizer.eos_id, *self.end_ids)))

    def parse(self, text: str, thinking: bool = False) -> Parsed:
        """Takes an answer apart at `</think>`, where it has think tags."""
        return split_reasoning(text, thinking or text.lstrip().startswith(THINK) or THINK_END in text)

    def _render(
        self, messages: Any, tools: Any, thinking: bool, add_generation_prompt: bool, marks: tuple[str, str]
    ) -> str:
        import jinja2

        try:
            template = _environment(marks).from_string(self.source)
            return template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                thinking=thinking,
                enable_thinking=thinking,
                **self.variables,
            )
        except (*_FAILURES, jinja2.TemplateError) as error:
            raise ValueError(f"{self.name}: the template cannot render these messages: {error}") from None


def load_folder_template(folder: AnyPath, *, tools: bool = False) -> FolderTemplate:
    """The chat template of a checkpoint: chat_template.jinja, or `chat_template` in tokenizer_config.json.

    Args:
        folder: the checkpoint's.
        tools: whether the one for tools is wanted, where there are several.
    Raises: ValueError when the folder has none.
    """
    root = storage_path(folder)
    stated, generation = (_read_json(root / name) for name in (TOKENIZER_CONFIG, "generation_config.json"))
    file = root / "chat_template.jinja"
    source = file.read_text() if file.exists() else stated.get("chat_template")
    if isinstance(source, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in source}
        source = named.get("tool_use", named.get("default")) if tools else named.get("default")
    if not isinstance(source, str):
        raise ValueError(
            f"{root} has no chat template, neither chat_template.jinja nor in {TOKENIZER_CONFIG}: name one of ours"
        )
    names = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in stated.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    ends = generation.get("eos_token_id", ())
    return FolderTemplate(source, names, (ends,) if isinstance(ends, int) else tuple(ends or ()), str(root))


def _read_json(file: Any) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _environment(marks: tuple[str, str]) -> Any:
    """The sandbox. `marks` are put around what stands in a generation block."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return marks[0] + caller() + marks[1]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _broken(value: Any, tokenizer: Tokenizer, mark: str, kept: Collection[str] = ()) -> Any:
    """`value` with `mark` after the first character of every name of a token in its texts, except those `kept`."""
    if isinstance(value, str):
        parts = tokenizer.split_names(value)
        if not any(part in tokenizer.special and part not in kept for part in parts):
            return value
        broken = [
            part[0] + mark + part[1:] if part in tokenizer.special and part not in kept else part for part in parts
        ]
        return _broken("".join(broken), tokenizer, mark, kept)  # again: names may overlap
    if isinstance(value, Mapping):
        return {_broken(k, tokenizer, mark, kept): _broken(item, tokenizer, mark, kept) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_broken(item, tokenizer, mark, kept) for item in value]
    return value


def _broken_message(message: Message, tokenizer: Tokenizer, mark: str) -> Message:
    # Templates look for think tags in an assistant's content, and these forge no turn.
    return _broken(message, tokenizer, mark, (THINK, THINK_END) if message["role"] == "assistant" else ())


def _encode_broken(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """Names in `text` become tokens; what `mark` broke becomes text again."""
    ids: list[int] = []
    for part in tokenizer.split_names(text):
        if part in tokenizer.special:
            ids.append(tokenizer.special[part])
        else:
            ids += tokenizer.encode(part.replace(mark, ""))
    return ids
