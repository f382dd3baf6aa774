"""What the models of this experiment read: problems with their steps, remarks on numbers, pairs of remarks.

Problems are reasoning-gym's (chain_sum, basic_arithmetic) where the package is installed, else of the same form. It gives
questions and answers; the steps are written here, one operation a line. Prompts of the test split are in no document.
"""

import ast
import json
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.posttrain.tasks import split_of

CHAIN, SIMPLE = "State the final answer to the following arithmetic problem: {} =", "Calculate {}."
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chain": ("chain_sum", dict(min_terms=4, max_terms=6, min_digits=1, max_digits=1)),
    "chain2": ("chain_sum", dict(min_terms=3, max_terms=4, min_digits=2, max_digits=2)),
    "mixed": (
        "basic_arithmetic",
        dict(min_terms=3, max_terms=4, min_digits=1, max_digits=1, operators=("+", "-", "*"), allow_negation=False),
    ),
}
"""Name of a part -> reasoning-gym's dataset and its options. chain: 4 to 6 digits; chain2: 3 or 4 numbers of two digits;
mixed: + - * with brackets, 3 or 4 digits."""
REMARKS = ("Tell me about the number {}.", "What do you know about {}?")
WORDS = {"en": "so", "zh": "则"}


def reasoning_gym_version() -> str | None:
    """None where it is not there."""
    try:
        import reasoning_gym  # noqa: F401 — installed is not enough: what it imports may be missing
    except ImportError:
        return None
    return version("reasoning-gym")


def questions(part: str, count: int, seed: int) -> list[tuple[str, str]]:
    """(question, answer), each question once."""
    dataset, options = PARTS[part]
    if reasoning_gym_version() is not None:
        import reasoning_gym

        made = reasoning_gym.create_dataset(dataset, seed=seed, size=count, **options)
        found = ((item["question"], str(item["answer"])) for item in (made[i] for i in range(count)))
    else:
        found = _own(dataset, options, count, seed)
    return list(dict(found).items())


def _own(dataset: str, options: dict[str, Any], count: int, seed: int) -> Iterable[tuple[str, str]]:
    """Questions of the same form, where reasoning-gym is missing; brackets around the first two numbers at times."""
    rng = np.random.default_rng((seed, len(dataset), options["max_terms"]))
    low, high = 10 ** (options["min_digits"] - 1) * (options["min_digits"] > 1), 10 ** options["max_digits"]
    signs = list(options.get("operators", ("+", "-")))
    for _ in range(count):
        terms = int(rng.integers(options["min_terms"], options["max_terms"] + 1))
        words = [str(int(rng.integers(low, high)))]
        for n in range(1, terms):
            words += [signs[int(rng.integers(len(signs)))], str(int(rng.integers(low, high)))]
            if n == 1 and dataset == "basic_arithmetic" and rng.random() < 0.5:
                words = ["(", *words, ")"]
        text = " ".join(words)
        yield (CHAIN if dataset == "chain_sum" else SIMPLE).format(text), str(steps(text)[1])


def expression(question: str) -> str:
    """The expression that a question asks for."""
    match = re.fullmatch(r"State the final answer .*: (.+) =|Calculate (.+)\.", question)
    if match is None:
        raise ValueError(f"{question!r} is no question of {', '.join(PARTS)}")
    return match[1] or match[2]


def steps(text: str) -> tuple[list[str], int]:
    """The operations of an expression of + - *, innermost and leftmost first, as "4-1=3"; and its value."""
    lines: list[str] = []

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        if isinstance(node, ast.Constant):
            return int(node.value)  # type: ignore[arg-type]
        assert isinstance(node, ast.BinOp)
        a, b = value(node.left), value(node.right)
        sign = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(node.op)]
        lines.append(f"{a}{sign}{b}={(c := {'+': a + b, '-': a - b, '*': a * b}[sign])}")
        return c

    result = value(ast.parse(text, mode="eval").body)
    return lines, result


def thoughts(question: str, language: str, rng: np.random.Generator) -> str:
    """The steps in words of a language: "en", "zh" or "both"."""
    said = [WORDS[("en", "zh")[int(rng.integers(2))] if language == "both" else language] for _ in range(8)]
    return "\n".join(f"{word} {line}" for word, line in zip(said, steps(expression(question))[0], strict=False))


def writes_steps(text: str) -> bool:
    """Whether an answer writes steps down."""
    return any(f"{word} " in text for word in WORDS.values())


def remark(n: int, *, full: bool, right: bool = True) -> str:
    """A short remark on a number, or a fuller one, which is the preferred form; false where it is not `right`."""
    odd = (n % 2 == 1) == right
    short = f"{n} is {'odd' if odd else 'even'}."
    d = 1 if right else 2
    return f"{short} It lies between {n - d} and {n + d}." if full else short


def judged(question: str, text: str) -> tuple[bool, bool]:
    """Of a remark behind the thoughts: whether it is true, and whether it is true and of the fuller form."""
    n, said = int(re.findall(r"\d+", question)[0]), text.rpartition("</think>")[2].strip()
    full = said == remark(n, full=True)
    return full or said == remark(n, full=False), full


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes a line a row; the number of lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def prepare(folder: Path, documents: int, problems: int, seed: int, *, written: float = 0.3) -> dict[str, Any]:
    """Writes all data into the folder, and says what there is.

    Args:
        folder: gets corpus.jsonl, problems/<part>.jsonl, problems/all.jsonl, remarks.jsonl (prompts), remarks_sft.jsonl
            (conversations), pairs.jsonl and cold.jsonl (conversations with written steps, all in English).
        documents: of each part, in the corpus, about.
        problems: of each part, for reinforcement learning and evaluation, about; none is in the corpus.
        seed: of everything.
        written: share of the corpus's problems that have their steps; of these, three in five are in English, the others
            in Chinese or in both.
    """
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    cold: list[dict[str, Any]] = []
    every: list[dict[str, Any]] = []
    for number, part in enumerate(PARTS):
        first = (10 * seed + number) * 10**7  # item i of reasoning-gym's dataset is drawn from its seed + i
        known = questions(part, documents, first)
        seen = {question for question, _ in known}
        for question, answer in known:
            if split_of(question) != "train":
                continue
            language = ("en", "en", "en", "zh", "both")[int(rng.integers(5))]
            said = f"{thoughts(question, language, rng)}\n" if rng.random() < written else ""
            texts.append(f"{question} {said}{boxed(answer)}")
        new = [
            {"prompt": question, "answer": answer}
            for question, answer in questions(part, problems, first + 5 * 10**6)
            if question not in seen
        ]
        write_jsonl(folder / "problems" / f"{part}.jsonl", new)
        every += new
        for row in new[:2000]:
            if split_of(row["prompt"]) == "train":
                answer = {"role": "assistant", "content": boxed(row["answer"])}
                answer["reasoning_content"] = thoughts(row["prompt"], "en", rng)
                cold.append({"messages": [{"role": "user", "content": row["prompt"]}, answer]})
    order = rng.permutation(len(every))
    write_jsonl(folder / "problems" / "all.jsonl", (every[i] for i in order))
    write_jsonl(folder / "cold.jsonl", (cold[i] for i in rng.permutation(len(cold))))
    counts = remarks(folder, texts, rng)
    total = write_jsonl(folder / "corpus.jsonl", ({"text": texts[i]} for i in rng.permutation(len(texts))))
    return {"documents": total, "problems": len(every), "reasoning_gym": reasoning_gym_version(), **counts}


def remarks(folder: Path, texts: list[str], rng: np.random.Generator) -> dict[str, int]:
    """Questions without a reference answer: files of prompts, conversations and pairs; documents go into `texts`."""
    asked, conversations, pairs = [], [], []
    for n in range(10, 1000):
        for form in REMARKS:
            question = form.format(n)
            asked.append({"prompt": question, "answer": ""})
            if split_of(question) != "train":
                continue
            for _ in range(6):
                texts.append(f"{question} {remark(n, full=rng.random() < 0.3)}")
            answer = {"role": "assistant", "content": remark(n, full=rng.random() < 0.3)}
            answer["reasoning_content"] = f"the number is {n}"
            conversations.append({"messages": [{"role": "user", "content": question}, answer]})
            good = remark(n, full=True)
            for bad in (remark(n, full=False), remark(n, full=True, right=False)):
                pairs.append({"prompt": question, "chosen": good, "rejected": bad})
    write_jsonl(folder / "remarks.jsonl", asked)
    write_jsonl(folder / "remarks_sft.jsonl", conversations)
    write_jsonl(folder / "pairs.jsonl", (pairs[i] for i in rng.permutation(len(pairs))))
    return {"remarks": len(asked), "pairs": len(pairs)}
