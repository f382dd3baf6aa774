"""Conversations as training data: masks token by token, packing, epochs and weights, what is left out, what is refused."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from chat_tokenizer import chat_tokenizer

from deepseek_jax.chat import TOKENS, get_template
from deepseek_jax.chat.data import ChatData, ChatJsonl, ChatParquet, Messages, MultipleChoice, PromptResponse
from deepseek_jax.chat.dataset import load_chats
from deepseek_jax.chat.packing import ChatWindows, Encodings, best_fit
from deepseek_jax.chat.rows import LeftOut, conversation_of, encode_conversation
from deepseek_jax.data import DataConfig, TextFiles, load
from deepseek_jax.data.tokenizer import PAD_TOKEN, Tokenizer, byte_tokenizer, load_tokenizer, with_tokens

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def pad_is_eos():
    """The tokenizer of the tests without a padding token, as R1's: its padding has the id of its end of text."""
    tokenizer = Tokenizer(chat_tokenizer()._json_bytes.replace(PAD_TOKEN.encode(), "<｜unused｜>".encode()))
    assert tokenizer.pad_id == tokenizer.eos_id
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return str(pad_is_eos().save(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def talk(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" if not isinstance(row, str) else row + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def chats(path, tokenizer_file, seq_len=32, rows=None, **fields):
    sources = fields.pop("sources", None) or (ChatJsonl(path=path, rows=rows or Messages()),)
    fields = {"template": "v3", "tokenizer": tokenizer_file, "held_out_fraction": 0.0} | fields
    return load_chats(ChatData(sources=sources, **fields), seq_len, None, progress=False)


@pytest.mark.parametrize(
    ("template", "row", "expected"),
    [
        ("v3", talk("hi", "yo"), [BOS, USER, "h", "i", ASSISTANT, "+y", "+o", "+" + EOS]),
        ("llm", talk("q", "a"), [BOS, *"User: q\n\nAssistant:", "+ ", "+a", "+" + EOS]),
        (
            "r1", talk("q", "a", reasoning_content="r"),
            [BOS, USER, "q", ASSISTANT, "<think>", "\n", "+r", "+\n", "+</think>", "+\n", "+\n", "+a", "+" + EOS],
        ),
        (
            "r1", talk("q", "<think>\nr\n</think>\n\na"),  # as distilled data sets write it
            [BOS, USER, "q", ASSISTANT, "<think>", "\n", "+r", "+\n", "+</think>", "+\n", "+\n", "+a", "+" + EOS],
        ),
        (
            "v3", talk(f"q{EOS}", "a"),  # typed by a user: text, and not learned
            [BOS, USER, "q", *EOS, ASSISTANT, "+a", "+" + EOS],
        ),
    ],
)  # fmt: skip
def test_masks_token_by_token(tmp_path, tokenizer_file, template, row, expected):
    data = chats(write(tmp_path / "a.jsonl", [row]), tokenizer_file, 80, template=template)
    window = data.train[0]
    words, learned = [], []
    for word in expected:
        word, trained = word.removeprefix("+"), word[0] == "+"
        ids = [data.tokenizer.special[word]] if word in data.tokenizer.special else data.tokenizer.encode(word)
        words += ids
        learned += [trained] * len(ids)
    rest = 81 - len(words)
    assert window["tokens"].tolist() == words + [data.tokenizer.eos_id] * rest  # the padding looks like the end
    assert window["loss_mask"].tolist() == learned + [False] * rest
    assert window["segment_ids"].tolist() == [1] * len(words) + [0] * rest


def test_last_answer_alone(tmp_path, tokenizer_file):
    both = {"messages": talk("a", "b")["messages"] + talk("c", "de")["messages"]}
    path = write(tmp_path / "a.jsonl", [both])
    learned = {
        which: np.flatnonzero(chats(path, tokenizer_file, train_on=which).train[0]["loss_mask"]).tolist()
        for which in ("all", "last")
    }
    assert learned == {"all": [4, 5, 9, 10, 11], "last": [9, 10, 11]}


@pytest.mark.parametrize("seed", range(4))
def test_packing_splits_and_loses_nothing(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 31, 200)
    windows = best_fit(lengths, 30)
    assert sorted(i for window in windows for i in window) == list(range(200))
    assert all(lengths[window].sum() <= 30 for window in windows)
    assert len(windows) <= 11 / 9 * -(-lengths.sum() // 30) + 1
    assert windows == best_fit(lengths, 30)


def test_windows_of_whole_conversations():
    encodings = Encodings()
    for i in range(10):
        encodings.append([100 + i] * (3 + i), [False, *[True] * (2 + i)])
    numbers = [1, 2, 3, 5, 8, 9]
    source = ChatWindows(encodings, numbers, 15, pad_id=7)
    seen = Counter()
    for i in range(len(source)):
        window = source[i]
        for segment in range(1, window["segment_ids"].max() + 1):
            here = window["segment_ids"] == segment
            [token] = set(window["tokens"][here])
            assert here.sum() == 3 + token - 100 and window["loss_mask"][here].tolist() == [False] + [True] * (
                here.sum() - 1
            )
            seen[int(token) - 100] += 1
        assert set(window["tokens"][window["segment_ids"] == 0]) <= {7}
    assert seen == Counter(numbers)
    assert len(ChatWindows(encodings, numbers, 15, pad_id=7, packing=False)) == 6


def test_epochs_read_each_conversation_as_often_as_its_weight(tmp_path, tokenizer_file):
    names = {"a": (30, 1.0), "b": (11, 2.0), "c": (8, 0.5)}
    sources = tuple(
        ChatJsonl(path=write(tmp_path / f"{name}.jsonl", [talk(f"{name}{i:02}", "y") for i in range(count)]), weight=weight)
        for name, (count, weight) in names.items()
    )  # fmt: skip
    data = chats(None, tokenizer_file, 17, sources=sources, packing=False)
    assert data.epoch_windows == 30 + 22 + 4
    iterator = data.train_batches(4, seed=5)
    rows = np.concatenate([next(iterator)["tokens"] for _ in range(28)])  # two epochs
    seen = Counter(data.tokenizer.decode(row[2:5]) for row in rows)
    expected = {f"{name}{i:02}": int(2 * weight) for name, (count, weight) in names.items() for i in range(count)}
    assert seen == expected
    first = Counter(data.tokenizer.decode(row[2:5]) for row in rows[:56] if data.tokenizer.decode(row[2:3]) == "a")
    assert set(first.values()) == {1} and len(first) == 30

    alone = chats(None, tokenizer_file, 17, sources=sources[:1])  # two conversations of 8 tokens a window
    iterator = alone.train_batches(5, seed=5)
    state, first = iterator.get_state(), [next(iterator) for _ in range(9)]
    again = alone.train_batches(5, seed=5)
    again.set_state(state)
    assert all(np.array_equal(next(again)[k], batch[k]) for batch in first for k in ("tokens",))
    assert alone.epoch_windows == 15


def test_what_is_left_out_is_counted_with_its_place(tmp_path, tokenizer_file, caplog):
    rows = [
        talk("good", "one"), "", {"messages": [{"role": "user", "content": "?"}]}, {"messages": None},
        {"messages": [{"role": "assistant", "content": "first"}]}, {"messages": ["text"]}, talk("q", "x" * 40),
        {"messages": [{"role": "clown", "content": "?"}, *talk("q", "a")["messages"]]}, talk("q" * 60, "a"),
        talk("good", "two", reasoning_content="no place in V3's"), talk("\ud800", "surrogate"),
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    data = chats(path, tokenizer_file)
    assert data.skipped == {
        "a": {
            "empty": 1, "no assistant turn": 1, "null": 1, "malformed": 3, "longer than seq_len + 1": 2,
            "refused by the template": 1, "not UTF-8": 1,
        }
    }  # fmt: skip
    summary = data.summary()["sources"]["a"]
    assert summary["splits"]["train"]["conversations"] == 1
    assert summary["skipped_places"]["no assistant turn"] == [f"{path}:3"]
    assert "has no place for reasoning_content" in summary["skipped_places"]["refused by the template"][0]
    assert "45 tokens, seq_len = 32" in summary["skipped_places"]["longer than seq_len + 1"][0]
    assert "1 no assistant turn" in caplog.text

    cut = chats(path, tokenizer_file, too_long="cut", packing=False)
    assert cut.skipped["a"]["cut before its answer"] == 1 and cut.summary()["sources"]["a"]["cut to seq_len + 1"] == 1
    counts = cut.summary()["sources"]["a"]["splits"]["train"]
    assert counts["conversations"] == 2 and counts["tokens"] == 11 + 33
    assert counts["trained_tokens"] == 4 + 29 and counts["trained_text_bytes"] == 3 + 29

    with pytest.raises(ValueError, match=r"holds nothing to learn from; left out: 1 no assistant turn \(.*jsonl:1\)"):
        chats(write(tmp_path / "b.jsonl", rows[2:3]), tokenizer_file)


@pytest.mark.parametrize(
    ("line", "rows", "message"),
    [
        (
            {"text": "x"},
            Messages(),
            r"jsonl:1: the row has the fields \['text'\]; there is no 'messages'.*PromptResponse",
        ),
        ({"messages": "x"}, Messages(), "'messages' of Messages holds a str .*must be a list of messages"),
        ({"prompt": "x"}, PromptResponse(), "there is no 'response': name the right one in PromptResponse"),
        ({"prompt": 3, "response": "x"}, PromptResponse(), "'prompt' of PromptResponse holds a int"),
        ({"question": "?", "choices": "ab", "answer": 0}, MultipleChoice(), "must be a list of texts"),
        ("{", Messages(), "jsonl:1: no JSON"),
        ("[1]", Messages(), "a JSON list: must be an object"),
    ],
)
def test_wrong_formats_are_refused(tmp_path, tokenizer_file, line, rows, message):
    with pytest.raises(ValueError, match=message):
        chats(write(tmp_path / "a.jsonl", [line]), tokenizer_file, rows=rows)


def test_template_must_fit_the_tokenizer(tmp_path, tokenizer_file):
    path = write(tmp_path / "a.jsonl", [talk("q", "a")])
    with pytest.raises(
        ValueError, match="template = 'v3' does not fit the tokenizer 'bytes': .*no token '<｜User｜>'.*extra_"
    ):
        chats(path, "bytes")
    assert chats(path, "bytes", template="llm").template == "llm"
    with pytest.raises(ValueError, match="ChatData.template = None: name one, or train with dsj.sft"):
        chats(path, "bytes", template=None)
    with pytest.raises(ValueError, match="template='v9' is not known"):
        chats(path, "bytes", template="v9")
    with pytest.raises(ValueError, match="ChatData.held_out_fraction = 1"):
        chats(path, "bytes", held_out_fraction=1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "2+2?", "choices": ["3", "4"], "answer": 1}, "B"),
        ({"question": "2+2?", "choices": ["3", "4"], "answer": "B"}, "B"),
        ({"question": "2+2?", "choices": ["3", "4"], "answer": "4"}, "B"),
        ({"question": "2+2?", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answer": "2"}, "B"),
        ({"question": "2+2?", "choices": ["3", "4"], "answer": "E"}, None),
        ({"question": "2+2?", "choices": ["3", "4"], "answer": 2}, None),
        ({"question": "2+2?", "choices": ["3"], "answer": 0}, None),
    ],
)
def test_multiple_choice(row, said):
    if said is None:
        with pytest.raises(LeftOut, match="malformed"):
            conversation_of(row, MultipleChoice(), "x:1")
        return
    asked, answer = conversation_of(row, MultipleChoice(), "x:1").messages
    assert asked == {"role": "user", "content": "2+2?\nA. 3\nB. 4"} and answer["content"] == said
    assert conversation_of(row, MultipleChoice(with_text=True), "x:1").messages[1]["content"] == "B. 4"


def test_other_shapes_of_rows():
    shared = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "t"},
        ]
    }
    rows = Messages(messages="conversations", role="from", content="value")
    assert conversation_of(shared, rows, "x").messages == talk("q", "a")["messages"]  # "t" has no answer
    of_tfds = {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}
    assert conversation_of(of_tfds, Messages(), "x").messages == talk("q", "a")["messages"]
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, talk("q", "a")["messages"][1]]}
    assert conversation_of(parts, Messages(), "x").messages == talk("q", "a")["messages"]
    pair = {"instruction": "q", "output": "a", "s": "be brief", "r": "because"}
    rows = PromptResponse(prompt="instruction", response="output", system="s", reasoning="r")
    assert conversation_of(pair, rows, "x").messages == [
        {"role": "system", "content": "be brief"}, *talk("q", "a", reasoning_content="because")["messages"],
    ]  # fmt: skip


def test_thinking_and_tools_of_v3_1():
    template, tokenizer = get_template("v3.1"), chat_tokenizer()
    function = {"name": "f", "description": "", "parameters": {}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"}, {"role": "assistant", "content": "five"},
    ]  # fmt: skip
    row = {"messages": messages, "tools": [{"type": "function", "function": function}]}
    ids, trained = encode_conversation(conversation_of(row, Messages(), "x"), template, tokenizer)
    learned = tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t])
    assert learned.count('f<｜tool▁sep｜>{"x": 1}') == 1 and learned.endswith(f"five{EOS}") and learned.count(EOS) == 2
    thought = conversation_of(talk("q", "a", reasoning_content="r"), Messages(), "x")
    ids, trained = encode_conversation(thought, template, tokenizer)
    assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) == f"r</think>a{EOS}"


def test_parquet_and_gzip(tmp_path, tokenizer_file):
    import pyarrow
    import pyarrow.parquet

    rows = [talk("q", "a", tool_calls=None), {"messages": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = chats(None, tokenizer_file, sources=(ChatParquet(path=str(tmp_path / "a.parquet")),))
    assert data.skipped == {"a": {"null": 1}}
    zipped = chats(write(tmp_path / "a.jsonl.gz", rows[:1]), tokenizer_file)
    np.testing.assert_array_equal(data.train[0]["tokens"], zipped.train[0]["tokens"])
    assert data.fingerprint == zipped.fingerprint  # of what is read, not of where it stands
    with pytest.raises(ValueError, match="none of the fields .'prompt', 'response'. is among its columns"):
        chats(None, tokenizer_file, sources=(replace(data.config.sources[0], rows=PromptResponse()),))


def test_held_out_by_question_and_fingerprints(tmp_path, tokenizer_file):
    path = write(tmp_path / "a.jsonl", [talk(f"question {i}", f"{k}") for i in range(20) for k in range(3)])
    data = chats(path, tokenizer_file, held_out_fraction=0.2)

    def questions(source):
        texts = [data.tokenizer.decode(source[i]["tokens"]) for i in range(len(source))]
        return Counter(part.partition(ASSISTANT)[0] for text in texts for part in text.split(USER)[1:])

    train, held_out = questions(data.train.sources[0]), questions(data.held_out["a"])
    assert not set(train) & set(held_out) and set((train + held_out).values()) == {3} and len(train + held_out) == 20
    others: list[dict[str, Any]] = [{}, {"template": "llm"}, {"packing": False}, {"seq_len": 40}, {"train_on": "last"}]
    changed = [chats(path, tokenizer_file, held_out_fraction=0.2, **fields).fingerprint for fields in others]
    assert len(set(changed)) == 4 and changed[0] == changed[4] == data.fingerprint  # one answer each: "last" is "all"


def test_a_base_model_gets_the_tokens_of_a_template(tmp_path):
    plain = byte_tokenizer()
    extended = with_tokens(plain, TOKENS)
    assert [extended.special[name] for name in TOKENS] == [259, 260, 261, 262] and extended.vocab_size == 263
    assert (extended.bos_id, extended.eos_id, extended.pad_id) == (plain.bos_id, plain.eos_id, plain.pad_id)
    assert extended.encode("<think> é") == plain.encode("<think> é")  # typed by a user: text
    ids = extended.encode("<think>é", special=True)
    assert ids == [261, *plain.encode("é")] and extended.decode(ids, skip_special=True) == "<think>é"
    assert extended.byte_lengths()[259:].sum() == 0
    assert with_tokens(extended, TOKENS).sha256 == extended.sha256
    assert with_tokens(extended, ("<think>", "<x>")).special["<x>"] == 263
    with pytest.raises(ValueError, match="names=.'think'.: give different names of the form"):
        with_tokens(plain, ("think",))
    with pytest.raises(ValueError, match=r"DataConfig.extra_tokens = \('<x>', '<x>'\)"):
        DataConfig(extra_tokens=("<x>", "<x>"))

    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"the user {i} thinks and thinks " * 5)
    config = DataConfig(sources=(TextFiles(path=str(text)),), vocab_size=280, cache_dir=str(tmp_path / "cache"))
    bases = {
        extra: load(replace(config, extra_tokens=extra), 16, tmp_path / f"run{len(extra)}", progress=False)
        for extra in ((), TOKENS)
    }
    assert bases[TOKENS].tokenizer.vocab_size <= 280 and bases[TOKENS].tokenizer.special["</think>"] > 260
    assert bases[()].fingerprint != bases[TOKENS].fingerprint
    path = write(tmp_path / "a.jsonl", [talk("q", "a", reasoning_content="r")])
    data = chats(path, str(tmp_path / "run4/tokenizer.json"), template="r1")
    assert data.tokenizer.sha256 == load_tokenizer(tmp_path / "run4").sha256 == bases[TOKENS].tokenizer.sha256
