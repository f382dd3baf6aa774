"""Templates that mark turns with words: DeepSeek LLM and Math, V2, Coder, R1-Zero; and the prompt to fill a hole."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deepseek_jax.chat.template import BOS, END, Parsed, Piece, Request, Template, answer, special
from deepseek_jax.data.tokenizer import EOS_TOKEN, FIM_TOKENS

EOT_TOKEN = "<|EOT|>"

CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer."
)
"""README of DeepSeek-Coder. Some published tokenizer_config.json spell it "Deepseek" and end without the dot."""

R1_ZERO_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
)
"""DeepSeek-R1's paper, table 1."""


def fim_prompt(prefix: str, suffix: str) -> list[Piece]:
    """A text with a hole between `prefix` and `suffix`, after which the model writes what fills it (README of
    DeepSeek-Coder). `encode_pieces` makes ids of it; the tokens that end a document end the filling too."""
    begin, hole, end = FIM_TOKENS
    return [BOS, special(begin), Piece(prefix), special(hole), Piece(suffix), special(end)]


def _words(request: Request) -> Iterator[Piece]:
    """`{system}\\n\\nUser: {user}\\n\\nAssistant: {answer}EOS`, where the model's first token carries the space."""
    yield BOS
    for message in request.messages:
        content = message["content"]
        if message["role"] == "system":
            yield Piece(f"{content}\n\n")
        elif message["role"] == "user":
            yield Piece(f"User: {content}\n\n")
        else:
            yield Piece("Assistant:")
            yield answer(f" {content}")
            yield END
    if request.prompt:
        yield Piece("Assistant:")


def _coder(request: Request) -> Iterator[Piece]:
    """`{system}\\n### Instruction:\\n{user}\\n### Response:\\n{answer}\\n<|EOT|>\\n`; the first system message takes
    the place of the fixed sentence."""
    yield BOS
    given = [message["content"] for message in request.messages if message["role"] == "system"]
    yield Piece("\n".join(given or [CODER_SYSTEM]) + "\n")
    for message in request.messages:
        if message["role"] == "user":
            yield Piece(f"### Instruction:\n{message['content']}\n")
        elif message["role"] == "assistant":
            yield Piece("### Response:\n")
            yield answer(f"{message['content']}\n")
            yield special(EOT_TOKEN, trained=True)
            yield Piece("\n")
    if request.prompt:
        yield Piece("### Response:\n")


def _r1_zero(request: Request) -> Iterator[Piece]:
    roles = [message["role"] for message in request.messages]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(f"template 'r1-zero' is one question and its answer, but the roles are {roles}; use 'r1'")
    yield BOS
    yield Piece(R1_ZERO_PROMPT.format(prompt=request.messages[0]["content"]))
    if len(roles) == 2:
        content, reasoning = request.messages[1]["content"], request.messages[1].get("reasoning_content")
        yield answer(f" <think> {reasoning} </think> <answer> {content} </answer>" if reasoning else f" {content}")
        yield END


def _split_r1_zero(text: str, thinking: bool) -> Parsed:
    """Thoughts and answer where both are in their tags, as the prompt asks; else the text as it is."""
    match = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    if match is None:
        return Parsed(None, text.removeprefix(" "))
    reasoning, content = (part.strip() for part in match.groups())
    return Parsed(reasoning, content)


def _split_words(text: str, thinking: bool) -> Parsed:
    """Without the space that the model's first token carries, which the template writes itself."""
    return Parsed(None, text.removeprefix(" "))


LLM = Template("llm", _words, system=False, split=_split_words)
V2 = Template("v2", _words, split=_split_words)
CODER = Template(
    "coder", _coder, stop=(EOT_TOKEN, EOS_TOKEN), split=lambda text, thinking: Parsed(None, text.removesuffix("\n"))
)
R1_ZERO = Template("r1-zero", _r1_zero, system=False, thinks="always", split=_split_r1_zero)
