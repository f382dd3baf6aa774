"""Text of ids as they come: never less than the whole text, never a part that later ids change."""

import itertools

import pytest
from chat_tokenizer import chat_tokenizer

from deepseek_jax.data.stream import TextStream
from deepseek_jax.data.tokenizer import byte_tokenizer, train_bpe

hypothesis = pytest.importorskip("hypothesis")
strategies = hypothesis.strategies


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    texts = ["abcab cabba → 你好，世界 👩‍🚀 naïve ab ab\n"] * 50
    return train_bpe(texts, 320, tmp_path_factory.mktemp("bpe") / "tokenizer.json", fim=True, progress=False)


@pytest.fixture(scope="module", params=["bytes", "bpe", "chat"])
def tokenizer(request, bpe):
    return {"bytes": byte_tokenizer(), "bpe": bpe, "chat": chat_tokenizer()}[request.param]


def stop_at(text: str, stop: list[str]) -> str:
    """Literally: the shortest beginning of `text` that ends in a stop string, without the longest that ends it."""
    for end in range(len(text) + 1):
        if ending := [len(s) for s in stop if text[:end].endswith(s)]:
            return text[: end - max(ending)]
    return text


def check(tokenizer, stream, ids, splits, expected):
    cuts = [0, *sorted(splits), len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in itertools.pairwise(cuts)]
    for i in range(len(pieces)):
        assert expected.startswith("".join(pieces[: i + 1]))
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == expected


@pytest.mark.parametrize("skip_special", [True, False])
def test_any_ids_in_any_pieces_give_the_decoded_text(tokenizer, skip_special):
    ids = strategies.lists(strategies.integers(0, tokenizer.vocab_size - 1), max_size=30)
    texts = strategies.text(max_size=10).map(tokenizer.encode)

    @hypothesis.settings(max_examples=150, deadline=None, database=None)
    @hypothesis.given(strategies.one_of(ids, texts), strategies.data())
    def run(ids, data):
        splits = data.draw(strategies.lists(strategies.integers(0, len(ids)), max_size=8))
        stream = TextStream(tokenizer, skip_special=skip_special)
        check(tokenizer, stream, ids, splits, tokenizer.decode(ids, skip_special=skip_special))
        assert not stream.stopped

    run()


def test_stop_strings_end_the_text_wherever_it_is_cut(tokenizer):
    letters = strategies.text(alphabet="abc好�", max_size=20)
    stops = strategies.lists(strategies.text(alphabet="abc好�", min_size=1, max_size=4), min_size=1, max_size=3)

    @hypothesis.settings(max_examples=300, deadline=None, database=None)
    @hypothesis.given(letters, stops, strategies.data())
    def run(text, stop, data):
        ids = tokenizer.encode(text)
        if data.draw(strategies.booleans()):
            ids = ids[:-1]  # may end within a character, which becomes U+FFFD
        splits = data.draw(strategies.lists(strategies.integers(0, len(ids)), max_size=8))
        whole = tokenizer.decode(ids)
        stream = TextStream(tokenizer, stop)
        check(tokenizer, stream, ids, splits, stop_at(whole, stop))
        assert stream.stopped == any(s in whole for s in stop)

    run()


def test_a_character_is_held_until_whole():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer)
    first, second, third = ([byte + 3] for byte in "好".encode())
    assert [stream.push(first), stream.push(second), stream.push(third)] == ["", "", "好"]
    assert stream.push(first) == "" and stream.finish() == "\ufffd"


def test_the_beginning_of_a_stop_string_is_held():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["\nUser:"])
    assert stream.push(tokenizer.encode("yes\nUs")) == "yes"
    assert stream.push(tokenizer.encode("ual\n")) == "\nUsual" and not stream.stopped
    assert stream.push(tokenizer.encode("User: and")) == "" and stream.stopped
    assert stream.push(tokenizer.encode("more")) == stream.finish() == "" and stream.text == "yes\nUsual"


def test_think_tags_are_shown_and_flagged_tokens_on_request():
    tokenizer = chat_tokenizer()
    ids = tokenizer.encode("<think>hm</think>A<｜end▁of▁sentence｜>", special=True)

    def shown(**options):
        stream = TextStream(tokenizer, **options)
        return stream.push(ids) + stream.finish()

    assert shown() == tokenizer.decode(ids, skip_special=True) == "<think>hm</think>A"
    assert shown(keep=[tokenizer.eos_id]) == shown(skip_special=False) == "<think>hm</think>A<｜end▁of▁sentence｜>"


def test_errors():
    tokenizer = byte_tokenizer()
    for stop in ([""], "stop"):
        with pytest.raises(ValueError, match="none of them empty"):
            TextStream(tokenizer, stop)
    with pytest.raises(ValueError, match="id 300 is outside the tokenizer's vocabulary of 259"):
        TextStream(tokenizer).push([300])
