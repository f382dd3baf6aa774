"""Fill in the middle and the splitting of merged tokens: nothing is lost, rates hold, and the draws never change."""

import hashlib

import numpy as np
import pytest
from texts import content_hash, make_documents

from deepseek_jax.data import tokens
from deepseek_jax.data.corpus import Document
from deepseek_jax.data.rearrange import PunctuationSplitter, infill
from deepseek_jax.data.tokenizer import FIM_TOKENS, byte_tokenizer, load_tokenizer, train_bpe

CODE = "def f(x):\n    return (x, [x])\n\n\nif f(1):\n    print({});\n\nelse:\r\n    pass\n#!\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One whose vocabulary merges punctuation with line breaks."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return train_bpe([CODE * 20], 330, path, fim=True, progress=False)


def digest_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


# Fill in the middle


def test_infill_keeps_the_text_and_the_rate():
    texts = [f"text {i} é" for i in range(4000)]
    parts = [infill(text, digest_of(i), 0.1) for i, text in enumerate(texts)]
    assert all(part is None or "".join(part) == text for part, text in zip(parts, texts, strict=True))
    assert 340 < sum(part is not None for part in parts) < 460
    more = [infill(text, digest_of(i), 0.5) for i, text in enumerate(texts)]
    assert all(part in (None, other) for part, other in zip(parts, more, strict=True)), "another rate, another cut"
    assert not any(infill(text, digest_of(i), 0.0) for i, text in enumerate(texts))
    assert all(infill(text, digest_of(i), 1.0) for i, text in enumerate(texts))


def test_cuts_are_uniform_over_characters():
    cuts = np.array([[len(p) for p in infill("x" * 99, digest_of(i), 1.0) or ()] for i in range(6000)])
    assert cuts.shape == (6000, 3) and (cuts.sum(1) == 99).all()
    np.testing.assert_allclose(cuts.mean(0), 33, atol=1.0)  # three parts of equal expected length
    assert cuts.min() == 0


@pytest.mark.parametrize("text", ["", "x", "é🙂"])
def test_infill_of_short_texts(text):
    assert all("".join(infill(text, digest_of(i), 1.0) or ()) == text for i in range(30))


def test_golden_infill():
    assert infill("0123456789" * 3, digest_of(7), 1.0) == ("01", "234567", "8901234567890123456789")


def encoded(documents, tokenizer, folder, **options):
    """The ids of each document in the train split."""
    files = tokens.prepare(
        documents, tokenizer, folder, content_hash=content_hash(documents), progress=False, **options
    )
    array = files.array("train")
    return files.splits["train"], np.split(array, np.flatnonzero(array == tokenizer.eos_id)[:-1] + 1)


def test_filled_in_documents_are_prefix_suffix_middle(tokenizer, tmp_path):
    documents = make_documents(200)
    split, pieces = encoded(documents, tokenizer, tmp_path, fim_rate=0.4)
    begin, hole, end = (tokenizer.fim_ids.index(i) for i in tokenizer.fim_ids)
    assert (begin, hole, end) == (0, 1, 2) and [tokenizer.decode([i]) for i in tokenizer.fim_ids] == list(FIM_TOKENS)
    seen = 0
    for document, ids in zip(documents, pieces, strict=True):
        text = tokenizer.decode(ids[1:-1])
        if ids[1] == tokenizer.fim_ids[0]:
            prefix, rest = text.removeprefix(FIM_TOKENS[0]).split(FIM_TOKENS[1])
            suffix, middle = rest.split(FIM_TOKENS[2])
            text, seen = prefix + middle + suffix, seen + 1
        assert text == document.text and (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert seen == split.infilled and 55 < seen < 105


def test_held_out_documents_are_left_as_they_are(tokenizer, tmp_path):
    documents = [*make_documents(40), *(Document(str(i), f"# {i}\n" + CODE) for i in range(40))]
    options = {"content_hash": content_hash(documents), "held_out_below": 0.5, "progress": False}
    plain = tokens.prepare(documents, tokenizer, tmp_path, **options)
    changed = tokens.prepare(documents, tokenizer, tmp_path, fim_rate=1.0, split_punctuation_rate=1.0, **options)
    np.testing.assert_array_equal(changed.array("held_out"), plain.array("held_out"))
    assert changed.splits["held_out"] == plain.splits["held_out"]
    train = changed.splits["train"]
    assert train.infilled == train.documents > 20 and train.split_tokens > 20


# Splitting


def test_merged_ids_are_punctuation_with_line_breaks(tokenizer):
    merged = PunctuationSplitter(tokenizer, 0.5).merged_ids
    texts = {tokenizer.decode([i]) for i in merged}
    assert {"):\n", "({});\n\n"} <= texts and "\n" not in texts and ")" not in texts
    for i, parts in merged.items():
        text = tokenizer.decode([i])
        assert tokenizer.decode(parts) == text and len(parts) >= 2
        assert text.strip(" \r\n") and set(text) & set("\r\n")
        assert "\n" not in tokenizer.decode(parts[:1]), "the first part is punctuation alone"
    assert not PunctuationSplitter(byte_tokenizer(), 1.0).merged_ids


def test_splitting_keeps_the_text_and_the_rate(tokenizer):
    ids = np.array(tokenizer.encode(CODE * 50), np.uint32)
    for rate in (0.0, 0.25, 1.0):
        splitter = PunctuationSplitter(tokenizer, rate)
        total = np.isin(ids, list(PunctuationSplitter(tokenizer, 1.0).merged_ids)).sum()
        new, count = splitter(ids, digest_of(1))
        assert tokenizer.decode(new) == CODE * 50 and new.dtype == ids.dtype
        assert abs(count - rate * total) <= 3 * (total * rate * (1 - rate)) ** 0.5
        if rate == 1.0:
            assert not np.isin(new, list(splitter.merged_ids)).any()
        if rate == 0.25:
            assert not np.array_equal(new, splitter(ids, digest_of(2))[0]), "the digest decides"
            np.testing.assert_array_equal(new, splitter(ids, digest_of(1))[0])


def test_splitting_any_text_keeps_it(tokenizer):
    hypothesis = pytest.importorskip("hypothesis")
    splitter = PunctuationSplitter(tokenizer, 0.5)
    pieces = hypothesis.strategies.sampled_from(["):\n", ";\n\n", "é.\r\n", " ", "x", "(", "\n", "😀", "})\n"])

    @hypothesis.settings(max_examples=50, deadline=None, database=None)
    @hypothesis.given(hypothesis.strategies.lists(pieces, max_size=30).map("".join))
    def check(text):
        ids = np.array(tokenizer.encode(text), np.uint32)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        new, count = splitter(ids, digest)
        assert tokenizer.decode(new) == text and (count > 0) == (len(new) > len(ids))

    check()


def test_golden_splitting(tokenizer):
    _, count = PunctuationSplitter(tokenizer, 0.5)(np.array(tokenizer.encode(CODE * 8), np.uint32), digest_of(3))
    words = np.random.PCG64(int.from_bytes(digest_of(3), "big")).random_raw(2)
    assert (count, words.tolist()) == (22, [1242293417596077346, 10600708081125461610])


def test_a_tokenizer_file_keeps_its_fim_tokens(tokenizer, tmp_path):
    loaded = load_tokenizer(tokenizer.save(tmp_path / "tokenizer.json"))
    assert loaded.fim_ids == tokenizer.fim_ids == tuple(range(loaded.vocab_size - 3, loaded.vocab_size))
    assert loaded.encode("".join(FIM_TOKENS), special=True) == list(loaded.fim_ids)
    assert not set(loaded.encode("".join(FIM_TOKENS))) & set(loaded.fim_ids)
