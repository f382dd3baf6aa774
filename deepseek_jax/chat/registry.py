"""The templates by name, and which one a published checkpoint wants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_jax.chat.plain import CODER, EOT_TOKEN, LLM, R1_ZERO, V2
from deepseek_jax.chat.tagged import R1, THINK, USER, V3, V3_1
from deepseek_jax.chat.template import Template
from deepseek_jax.data.tokenizer import BOS_TOKEN, Tokenizer

TEMPLATES: dict[str, Template] = {t.name: t for t in (LLM, CODER, V2, V3, R1_ZERO, R1, V3_1)}

# Part of a checkpoint's name -> its template, the first that fits; None for those whose template is not here.
_BY_NAME: tuple[tuple[str, str | None], ...] = (
    ("v4", None),
    ("v3.2", None),
    ("0528", None),  # of R1: its prompt leaves <think> to the model
    ("r1-zero", "r1-zero"),
    ("r1", "r1"),
    ("v3.1", "v3.1"),
    ("v3", "v3"),
    ("v2.5", "v3"),  # the first with V3's template
    ("v2", "v2"),
    ("coder", "coder"),
    ("math", "llm"),
    ("moe", "llm"),
    ("llm", "llm"),
)


def get_template(name: str) -> Template:
    """A template by name. Raises: ValueError for an unknown one."""
    if name not in TEMPLATES:
        raise ValueError(f"template={name!r} is not known; give one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def find_template(config: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """The name of the template that a checkpoint wants; None where it cannot be told, or is not one of ours.

    The checkpoint's own name decides where it has one that says "deepseek". Otherwise its special tokens do:

    - V3.2's and V4's `｜DSML｜`: none of ours;
    - `<｜User｜>` with `<｜search▁begin｜>`: V3.1; with `<think>`: R1 and its students, except those on Qwen3, whose
      prompt differs; with neither: V2.5 and V3;
    - without `<｜User｜>`, DeepSeek's own begin token: V2 by `model_type`; Coder by `<|EOT|>`; else LLM.

    A base model has the tokenizer of its chat model, so it gets that template too. R1-Zero is told by its name alone.

    Args:
        config: the content of config.json.
        tokenizer: the checkpoint's.
    """
    name = str(config.get("_name_or_path") or config.get("name") or "").lower()
    if "deepseek" in name:
        name = name[name.rindex("deepseek") :]  # not the folders above it
        for part, template in _BY_NAME:
            if part in name:
                return template
    kind, has = config.get("model_type"), tokenizer.special
    if "｜DSML｜" in has or BOS_TOKEN not in has:
        return None
    if USER.text in has:
        if "<｜search▁begin｜>" in has:
            return "v3.1"
        if THINK in has:
            return "r1" if kind != "qwen3" else None
        return "v3" if kind in ("deepseek_v2", "deepseek_v3") else None
    if kind == "deepseek_v2":
        return "v2"
    if kind in ("llama", "deepseek"):
        return "coder" if EOT_TOKEN in has else "llm"
    return None
