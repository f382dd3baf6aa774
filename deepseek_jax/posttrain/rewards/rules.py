"""Rewards by rule: from a problem and a completion to a number, in this process and without running anything of it.

R1 (arXiv 2501.12948), sections 2.2.2 and 2.3.2: accuracy of the final answer, format of think and answer tags, consistency
of the language. A completion can hold anything: what cannot be read scores 0, and only a mistake of ours raises.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import unicodedata
from collections import Counter
from fractions import Fraction

from deepseek_jax.posttrain.tasks import Problem

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
_LONGEST = 10_000  # characters of an answer that are looked at
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d{1,30})?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{1,30})?|\.\d{1,30})(/\d{1,30})?", re.ASCII)


def has_format(text: str) -> bool:
    """Whether a completion is thoughts in think tags, then an answer in answer tags: each tag once, in order, nothing
    around them, neither part empty (R1's format reward)."""
    tags = (*THINK, *ANSWER)
    if any(text.count(tag) != 1 for tag in tags):
        return False
    match = re.fullmatch(r"\s*<think>(.+)</think>\s*<answer>(.+)</answer>\s*", text, re.DOTALL)
    return match is not None and all(part.strip() for part in match.groups())


def final_answer(text: str) -> str | None:
    """The one answer of a completion: what its answer tags hold, else the last \\boxed{…}; of that after the thoughts.

    None where there is none, where the thoughts do not end or begin again, where there are several answer tags, or where it
    is longer than any answer.
    """
    after = text.split(THINK[1], 1)[-1]
    if THINK[0] in after:
        return None
    if ANSWER[0] in after:
        parts = after.split(ANSWER[0])
        if len(parts) != 2 or after.count(ANSWER[1]) != 1 or ANSWER[1] not in parts[1]:
            return None
        found: str | None = parts[1].split(ANSWER[1])[0]
    else:
        found = _boxed(after)
    if found is None or not found.strip() or len(found) > _LONGEST:
        return None
    return found.strip()


def _boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} whose braces close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, min(len(text), begin + _LONGEST)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None


def equal_answers(found: str, reference: str) -> bool:
    """Whether two answers are the same number, or the same text up to white space and case. Nothing is evaluated."""
    if found == reference:
        return True
    numbers = [_number(text) for text in (found, reference)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return None is numbers[0] is numbers[1] and " ".join(found.split()).lower() == " ".join(reference.split()).lower()


def _number(text: str) -> Fraction | None:
    text = text.strip().strip("$").replace("−", "-").strip()
    if _THOUSANDS.fullmatch(text):  # "3,4" is a pair
        text = text.replace(",", "")
    if not _NUMBER.fullmatch(text):  # ASCII digits alone: int() would read ٤٢ too
        return None
    value, _, divisor = text.partition("/")
    return None if divisor and not int(divisor) else Fraction(value) / (int(divisor) if divisor else 1)


def accuracy(problem: Problem, completion: str) -> float:
    """1 where the final answer equals the reference."""
    found = final_answer(completion)
    return float(found is not None and equal_answers(found, problem.answer))


def plain_accuracy(problem: Problem, completion: str) -> float:
    """1 where the completion ends with the reference as its last word, or as its last character where the reference is one
    character: for models without tags. Behind a sign or a dot it is the end of another number."""
    text = completion.strip()
    if not problem.answer or not text.endswith(problem.answer):
        return 0.0
    before = text[: -len(problem.answer)]
    if before.endswith(("-", "−", "+", ".", ",")):
        return 0.0
    return float(len(problem.answer) == 1 or not before or not before[-1].isalnum())


def countdown(problem: Problem, completion: str) -> float:
    """1 where the final answer is an expression of the problem's numbers, each once, that equals its target."""
    extra = dict(problem.extra)
    found = final_answer(completion)
    if found is None or len(found) > 200 or "numbers" not in extra:
        return 0.0
    try:
        tree = ast.parse(found.split("=")[0].strip(), mode="eval")
        used: Counter[int] = Counter()
        value = _value(tree.body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    return float(value == extra["target"] and used == Counter(extra["numbers"]))


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    """Of an expression of + - * / alone: no powers, so that no expression is long to work out."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    raise ValueError("not an expression of numbers")


def language_share(text: str, language: str) -> float:
    """Share of the words of the thoughts that are of the language, "en" or "zh" (R1, section 2.3.2); 0 without words.

    A word is a run of letters of one script; a Chinese character is a word. Numbers and formulas do not count.
    """
    if language not in ("en", "zh"):
        raise ValueError(f"language = {language!r}: must be 'en' or 'zh'")
    thoughts = text.split(THINK[1])[0].lstrip().removeprefix(THINK[0])
    wanted = total = 0
    script = ""
    for character in thoughts:
        now = _script(character)
        if now and (now != script or now == "zh"):
            total += 1
            wanted += now == language
        script = now
    return wanted / total if total else 0.0


def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "")
    if name.startswith("CJK UNIFIED"):
        return "zh"
    return "en" if name.startswith("LATIN") else "other"


def overlong_penalty(tokens: int, limit: int, buffer: int) -> float:
    """0 up to limit − buffer tokens, then linear to −1 at the limit (DAPO, arXiv 2503.14476, eq. 13).

    Raises: ValueError where the buffer does not lie within the limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer = {buffer}: must be in (0, limit = {limit}]")
    return -min(max((tokens - (limit - buffer)) / buffer, 0.0), 1.0)


def checked(score: float) -> float:
    """The score, where it is a number that training can use. Raises: ValueError for NaN and infinities."""
    if not math.isfinite(score):
        raise ValueError(f"a reward of {score}: rewards must be finite")
    return float(score)
