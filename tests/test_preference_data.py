"""Preferences as data: what is read, what is left out, what is refused, and the order of examples."""

import json

import pytest
from chat_tokenizer import chat_tokenizer

from deepseek_jax.chat import get_template
from deepseek_jax.posttrain.preference_data import (
    SAME,
    TOO_LONG,
    TWO_PROMPTS,
    Encoder,
    LabelFile,
    PairFile,
    load_preferences,
)
from deepseek_jax.posttrain.rows import Order


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def talk(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def encoder(template=None):
    return Encoder(chat_tokenizer(), get_template(template) if template else None)


def load(path, template=None, file=PairFile, held_out_fraction=0.0, **options):
    options = dict(max_tokens=64) | options
    return load_preferences(
        file(path=path), encoder(template), held_out_fraction=held_out_fraction, **options
    )  # fmt: skip


def test_every_form_of_a_pair_is_the_same_pair(tmp_path):
    forms = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"messages": talk("q"), "chosen": talk("q", "yes")[1], "rejected": [talk("q", "no")[1]]},
        {"prompt": talk("q"), "chosen": talk("q", "yes"), "rejected": talk("q", "no")},
        {"chosen": talk("q", "yes"), "rejected": talk("q", "no")},
    ]
    data = load(write(tmp_path / "a.jsonl", forms), "v3")
    assert len(data.train) == 4 and not data.skipped
    tokenizer = chat_tokenizer()
    for example in data.train:
        for answer, text in zip(example.answers, ("yes", "no"), strict=True):
            prompt = get_template("v3").encode(tokenizer, talk("q")).ids
            assert answer.ids.tolist() == [*prompt, *tokenizer.encode(text), tokenizer.eos_id]
            assert answer.start == len(prompt)
    plain = load(write(tmp_path / "b.jsonl", forms[:1])).train[0].answers[0]
    assert plain.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode("qyes"), tokenizer.eos_id] and plain.start == 2
    # Only the last answer counts, up to the token that ends it, whatever the template writes behind.
    row = {"prompt": talk("a", "b", "c"), "chosen": "yes", "rejected": "no"}
    [coder] = load(write(tmp_path / "c.jsonl", [row]), "coder", max_tokens=1000).train
    said = coder.answers[0].ids[coder.answers[0].start :].tolist()
    assert said == [*tokenizer.encode("yes\n"), tokenizer.special["<|EOT|>"]]


def test_thoughts_are_part_of_an_answer_and_both_must_have_them(tmp_path):
    thought, other = "<think>\nhm\n</think>\n\nyes", "<think>\nah\n</think>\n\nno"
    rows = [{"prompt": "q", "chosen": thought, "rejected": other}, {"prompt": "q", "chosen": thought, "rejected": "no"}]
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, "r1", one_prompt=True)
    [example], tokenizer = data.train, chat_tokenizer()
    chosen = example.answers[0]
    assert data.skipped == {TWO_PROMPTS: 1} and data.places[TWO_PROMPTS] == f"{path}:2"
    assert tokenizer.decode(chosen.ids[chosen.start :], skip_special=True).startswith("hm\n")
    assert tokenizer.special["</think>"] in chosen.ids[chosen.start :]
    assert len(load(path, "r1").train) == 2


def test_rows_that_cannot_be_learned_from_are_counted_and_wrong_ones_are_named(tmp_path):
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = [pair, "", pair | {"chosen": "no"}, pair | {"rejected": "x" * 90}, pair | {"prompt": "\ud800"}]
    rows += [pair | {"prompt": talk("a", "b")}]  # the question is an assistant's: no template takes two in a row
    path = write(tmp_path / "a.jsonl", rows)
    data = load(path, "v3")
    assert data.skipped == {"empty": 1, SAME: 1, TOO_LONG: 1, "not UTF-8": 1, "refused by the template": 1}
    assert "max_tokens = 64" in data.places[TOO_LONG] and f"{path}:3" == data.places[SAME]
    label = {"prompt": "q", "response": "yes", "label": 1}
    for row, file, said in (
        (
            {"prompt": "q", "chosen": "yes"},
            PairFile,
            r":1: the field 'rejected' is missing: the row has \['chosen', 'pro",
        ),
        (pair | {"chosen": None}, PairFile, "'chosen' holds null; name the right one in PairFile"),
        (pair | {"chosen": 3}, PairFile, "'chosen' holds 3: must be a text, an assistant's message"),
        (pair | {"chosen": talk("q")}, PairFile, "'chosen' ends with the role 'user'"),
        (pair | {"prompt": ["q"]}, PairFile, r"'prompt' holds \['q'\]: must be a text, or a list of messages"),
        ({"chosen": "yes", "rejected": "no"}, PairFile, "beside none of the fields 'prompt' and 'messages'"),
        (pair | {"chosen": talk("other", "yes")}, PairFile, "'chosen' stands beside another question"),
        (label | {"label": "good"}, LabelFile, "'label' holds 'good': must be true, false or a finite number"),
        (label | {"label": 3}, LabelFile, "'label' holds 3: must be 0, 1 or between; .* kind='regression'"),
        (label | {"label": float("nan")}, LabelFile, "'label' holds nan"),
        ({"prompt": "q", "label": 1}, LabelFile, "'response' is missing"),
        (pair | {"rejected": "yes"}, PairFile, "holds nothing to learn from; left out: 1 both answers the same"),
    ):
        with pytest.raises(ValueError, match=said):
            load(write(tmp_path / "b.jsonl", [row]), "v3", file)
    with pytest.raises(ValueError, match="needs a chat template"):
        load(write(tmp_path / "b.jsonl", [pair | {"prompt": talk("a", "b", "c")}]))
    with pytest.raises(ValueError, match="has one question, and the split is by question"):
        load(path, "v3", held_out_fraction=0.1)


def test_questions_are_on_one_side_and_epochs_are_new_orders(tmp_path):
    rows = [{"prompt": f"q{i % 50}", "chosen": f"yes{i}", "rejected": "no"} for i in range(100)]
    data = load(write(tmp_path / "a.jsonl", rows), held_out_fraction=0.2)
    sides = [{e.side for e in split} for split in (data.train, data.held_out)]
    assert not sides[0] & sides[1] and len(data.held_out) % 2 == 0 and 10 <= len(data.held_out) <= 34
    again = load(write(tmp_path / "b.jsonl", rows[::-1]), held_out_fraction=0.2)
    assert {e.side for e in again.held_out} == sides[1] and again.fingerprint != data.fingerprint
    order, other = Order(5, 3), Order(5, 3)
    taken = [order.take(3) for _ in range(5)]
    flat = [i for part in taken for i in part]
    assert all(sorted(flat[i : i + 5]) == list(range(5)) for i in (0, 5, 10)) and flat[:5] != flat[5:10]
    other.set_state(json.loads(json.dumps({"next": 6})))
    assert other.take(3) == taken[2] and other.get_state() == {"next": 9}
