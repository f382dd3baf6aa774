"""Answers taken apart, and which template a published checkpoint wants."""

import pytest
from chat_tokenizer import CHAT_TOKENS, chat_tokenizer

from deepseek_jax.chat import Parsed, find_template, get_template


@pytest.mark.parametrize(
    ("name", "text", "thinking", "parsed"),
    [
        ("v3", "A</think>", False, Parsed(None, "A</think>")),
        ("r1", "hm\n</think>\n\nA", False, Parsed("hm", "A")),
        ("r1", "<think>\nhm\n</think>\n\nA </think>", True, Parsed("hm", "A </think>")),
        ("r1", "hm, cut o", True, Parsed("hm, cut o", "")),
        ("r1-zero", " <think> 2+2 </think> <answer> 4 </answer>", False, Parsed("2+2", "4")),
        ("v3.1", "hm</think>A", True, Parsed("hm", "A")),
        ("v3.1", "A", False, Parsed(None, "A")),
        ("v3.1", "A<｜tool▁calls▁begin｜>broken", False, Parsed(None, "A<｜tool▁calls▁begin｜>broken")),
    ],
)
def test_parse(name, text, thinking, parsed):
    assert get_template(name).parse(text, thinking) == parsed


def test_tool_calls_come_back():
    tokenizer = chat_tokenizer()
    template = get_template("v3.1")
    given = [("get", '{"a": 1}'), ("put", '{"b":\n"é"}')]
    calls = [{"type": "function", "function": {"name": name, "arguments": text}} for name, text in given]
    question, reply = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "So:", "tool_calls": calls}
    ids, trained = template.encode(tokenizer, [question, reply], add_generation_prompt=False)
    written = [i for i, learn in zip(ids, trained, strict=True) if learn]
    parsed = template.parse(tokenizer.decode(written, skip_special=True))
    assert (parsed.reasoning, parsed.content) == (None, "So:")
    assert [c["function"] for c in parsed.tool_calls] == [c["function"] for c in calls]
    assert [c["id"] for c in parsed.tool_calls] == ["call_0", "call_1"]


@pytest.mark.parametrize(
    ("config", "tokens", "name"),
    [
        ({"_name_or_path": "deepseek-ai/DeepSeek-R1-Zero"}, CHAT_TOKENS, "r1-zero"),
        ({"_name_or_path": "/models/r1/deepseek-coder-6.7b-instruct"}, CHAT_TOKENS, "coder"),
        ({"_name_or_path": "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct"}, (), "v2"),
        ({"_name_or_path": "deepseek-ai/DeepSeek-R1-0528"}, CHAT_TOKENS, None),
        ({"_name_or_path": "deepseek-ai/deepseek-math-7b-rl", "model_type": "llama"}, (), "llm"),
        ({"model_type": "deepseek_v3"}, (*CHAT_TOKENS, "<｜search▁begin｜>"), "v3.1"),
        ({"model_type": "deepseek_v3"}, (*CHAT_TOKENS, "<｜search▁begin｜>", "｜DSML｜"), None),
        ({"model_type": "deepseek_v3"}, CHAT_TOKENS, "r1"),
        ({"model_type": "qwen2"}, CHAT_TOKENS, "r1"),
        ({"model_type": "qwen3"}, CHAT_TOKENS, None),
        ({"model_type": "deepseek_v3"}, ("<｜User｜>", "<｜Assistant｜>"), "v3"),
        ({"model_type": "deepseek_v2"}, ("<｜User｜>", "<｜Assistant｜>"), "v3"),
        ({"model_type": "deepseek_v2"}, (), "v2"),
        ({"model_type": "llama"}, ("<|EOT|>",), "coder"),
        ({"model_type": "deepseek"}, (), "llm"),
        ({"model_type": "qwen2"}, (), None),
        ({}, (), None),
    ],
)
def test_find_template(config, tokens, name):
    assert find_template(config, chat_tokenizer(tokens)) == name
