"""Documents, tokenizer, token cache, and all of it from a config: what a run reads is exact and the same everywhere."""

import json
import random

import numpy as np
import pytest

from deepseek_jax import storage
from deepseek_jax.data import corpus, tokens
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import Document, Documents
from deepseek_jax.data.dataset import load
from deepseek_jax.data.tokenizer import EOS_TOKEN, SPECIAL_TOKENS, load_tokenizer, train_bpe


def make_documents(n: int, seed: int = 0) -> list[Document]:
    """n different documents of 200 to 500 bytes of code-like text."""
    rng = random.Random(seed)
    words = ["def", "return", "value", "self", "index", "for", "in", "range", "None", "import"]
    return [
        Document(f"{i}.py", f"# {seed} {i}\n" + " ".join(rng.choice(words) for _ in range(rng.randint(40, 90))))
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [document.text for document in make_documents(60)]
    return train_bpe(texts, 400, tmp_path_factory.mktemp("bpe") / "tokenizer.json", progress=False)


# Documents


def test_stdlib_is_real_code_in_a_fixed_order_without_installed_packages():
    documents = corpus.python_stdlib()
    names = [document.name for document in documents]
    assert documents.n_bytes > 5_000_000 and "json/__init__.py" in names
    assert not [name for name in names if "site-packages" in name or "_sysconfigdata" in name]
    digests = [document.digest for document in documents]
    assert digests == sorted(digests) and len(set(digests)) == len(digests)
    assert sum(map(len, documents.skipped.values())) > 0, "every stdlib has empty files, which are to be counted"


def test_folder_counts_what_it_leaves_out(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "sub" / "b.txt").write_bytes(b"another")
    (tmp_path / "sub" / "copy.txt").write_bytes(b"another")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "notes.md").write_bytes(b"other kind")
    (tmp_path / "sub" / ".hidden" / "c.txt").write_bytes(b"hidden")
    documents = corpus.folder(tmp_path, ["*.txt"])
    assert {document.name: document.text for document in documents} == {"a.txt": "one\r\ntwo\n", "sub/b.txt": "another"}
    assert documents.skipped == {"empty": ("empty.txt",), "not UTF-8": ("latin.txt",), "duplicate": ("sub/copy.txt",)}
    assert documents.describe() == "2 documents, 0.0 MB (left out: 1 duplicate, 1 empty, 1 not UTF-8)"


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        corpus.folder(tmp_path / "absent")
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match=r"no text in 0 files that match patterns=\('\*.txt',\)"):
        corpus.folder(tmp_path, ("*.txt",))


def test_split_depends_on_each_documents_text_alone():
    documents = make_documents(2000)
    train, held_out = corpus.split(documents, 0.1)
    assert len(train) + len(held_out) == 2000 and 150 < len(held_out) < 250
    renamed = [Document(f"elsewhere/{i}", document.text) for i, document in enumerate(reversed(documents))]
    again = corpus.split(renamed + make_documents(500, seed=1), 0.1)
    held_out_texts = {document.text for document in held_out}
    assert held_out_texts <= {document.text for document in again[1]}
    assert not held_out_texts & {document.text for document in again[0]}


def test_content_hash_is_that_of_a_set_of_texts():
    documents = make_documents(9)
    elsewhere = [Document(f"other/{document.name}", document.text) for document in reversed(documents)]
    assert corpus.content_hash(elsewhere) == corpus.content_hash(documents) != corpus.content_hash(documents[1:])


@pytest.mark.parametrize(("n", "fraction"), [(2, 0.001), (2, 0.999), (5, 0.01), (5, 0.99)])
def test_split_leaves_no_side_empty(n, fraction):
    assert min(map(len, corpus.split(make_documents(n), fraction))) >= 1


def test_split_errors():
    with pytest.raises(ValueError, match=r"the corpus has 1 documents.*at least 2 different ones, or held_out_frac"):
        corpus.split(make_documents(1), 0.1)
    with pytest.raises(ValueError, match="the corpus has 0 documents"):
        corpus.split([], 0.0)
    assert not corpus.split(make_documents(1), 0.0)[1]


def test_size_cap_is_a_nested_choice_independent_of_names_and_split():
    documents = Documents(tuple(sorted(make_documents(2000), key=lambda document: document.digest)))
    small, large = documents.capped(100_000), documents.capped(200_000)
    assert 90_000 < small.n_bytes <= 100_000 < large.n_bytes
    assert list(large[: len(small)]) == list(small)
    assert len(small.skipped["over max_bytes"]) == 2000 - len(small)
    numbers = [int(document.name.removesuffix(".py")) for document in small]
    assert min(numbers) < 200 and max(numbers) > 1800, "the cap took the first names, not a sample"
    assert 0.2 < len(corpus.split(small, 0.3)[1]) / len(small) < 0.4
    with pytest.raises(ValueError, match="max_bytes=10: the first document"):
        documents.capped(10)


# Tokenizer


def test_special_tokens_have_v3s_ids(tokenizer):
    assert [tokenizer.decode([i]) for i in range(3)] == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.decode([0, *tokenizer.encode("x"), 1], skip_special=True) == "x"


def test_round_trip_of_any_text(tokenizer):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    pieces = strategies.one_of(
        strategies.text(),
        strategies.sampled_from([*SPECIAL_TOKENS, "\r\n", "\t  ", "12345", "你好、カナ", "e\u0301", "👩‍🚀", "\x00"]),
    )

    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and not lengths[:3].any()

    @hypothesis.settings(max_examples=60, deadline=None, database=None)
    @hypothesis.given(strategies.lists(pieces, max_size=6).map("".join))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2} & set(ids), "text became a special token"
        assert lengths[ids].sum() == len(text.encode())

    check()


def test_special_tokens_only_on_request(tokenizer):
    text = f"a{EOS_TOKEN}b"
    assert tokenizer.encode(text, special=True).count(tokenizer.eos_id) == 1
    assert tokenizer.eos_id not in tokenizer.encode(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("a.append(12345)\n", ["a", ".append", "(", "123", "45", ")\n"]),
        ("    return x", ["   ", " return", " x"]),
        ("中文text と", ["中文", "text", " ", "と"]),
        ("a +=  b\n\n  c", ["a", " +=", " ", " b", "\n\n", " ", " c"]),
    ],
)
def test_pre_tokenizer_splits_as_v3(tokenizer, text, pieces):
    splits = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in splits] == pieces


def test_training_a_bpe_is_repeatable(tokenizer, tmp_path):
    texts = [document.text for document in make_documents(60)]
    again = train_bpe(texts, 400, tmp_path / "tokenizer.json", progress=False)
    assert again.sha256 == tokenizer.sha256 and again.vocab_size <= 400
    assert len(again.encode("return value")) <= 3, "nothing was merged"
    loaded = load_tokenizer(tmp_path)  # the folder that holds it
    assert loaded.save(tmp_path / "copy.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_tokenizer_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=258: .* at least 259"):
        train_bpe(["text"], 258, tmp_path / "x.json")
    with pytest.raises(ValueError, match="no text to train"):
        train_bpe([""], 300, tmp_path / "x.json")
    with pytest.raises(ValueError, match="no such file"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json.*not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="bos_token='<s>' is not in"):
        load_tokenizer(tokenizer.save(tmp_path / "good.json"), bos_token="<s>")
    with pytest.raises(ValueError, match=rf"vocab_size=100 of the model is smaller .* {tokenizer.vocab_size}"):
        tokenizer.require_fits(100)
    with pytest.raises(ValueError, match="outside the tokenizer's vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


# Files and token cache


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    path = storage.write_atomic(tmp_path / "sub" / "a.txt", "old\r\n")
    monkeypatch.setattr(storage.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        storage.write_atomic(path, "new")
    with pytest.raises(OSError, match="no space"):
        storage.save_array(path, np.zeros(3))
    assert path.read_bytes() == b"old\r\n" and list(path.parent.iterdir()) == [path]


def test_prepare_stores_each_document_between_bos_and_eos(tokenizer, tmp_path):
    documents = make_documents(20)
    files = tokens.prepare({"train": documents[:15], "held_out": documents[15:]}, tokenizer, tmp_path, progress=False)
    ordered = sorted(documents[15:], key=lambda document: document.digest)
    expected = [i for document in ordered for i in [0, *tokenizer.encode(document.text), 1]]
    array = files.array("held_out")
    assert array.dtype == np.uint16 and array.tolist() == expected
    assert isinstance(array, np.memmap) and not array.flags.writeable
    split = files.splits["held_out"]
    assert (split.tokens, split.documents) == (len(expected), 5)
    assert split.text_bytes == sum(len(document.text.encode()) for document in documents[15:])
    with pytest.raises(ValueError, match=r"split='test': this corpus has \['held_out', 'train'\]"):
        files.array("test")


def test_prepare_reuses_the_cache_and_mends_it(tokenizer, tmp_path, monkeypatch):
    splits = {"train": make_documents(10)}
    first = tokens.prepare(splits, tokenizer, tmp_path, progress=False)
    whole = first.array("train").tolist()
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_encode", None)  # would fail if called
        again = tokens.prepare(splits, tokenizer, tmp_path, progress=False)
    assert again.reused and not first.reused and again.splits == first.splits
    path = first.folder / "train.npy"
    path.write_bytes(path.read_bytes()[:-4])
    mended = tokens.prepare(splits, tokenizer, tmp_path, progress=False)
    assert not mended.reused and mended.array("train").tolist() == whole
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"delete .* to encode the corpus again"):
        mended.array("train")


def test_cache_key_knows_text_and_tokenizer(tokenizer, tmp_path):
    splits = {"train": make_documents(10)}
    folders = {tokens.prepare(splits, tokenizer, tmp_path, progress=False).folder}
    folders.add(tokens.prepare({"train": make_documents(11)}, tokenizer, tmp_path, progress=False).folder)
    other = train_bpe(["other text " * 9], 300, tmp_path / "other.json", progress=False)
    folders.add(tokens.prepare(splits, other, tmp_path, progress=False).folder)
    assert len(folders) == 3
    with pytest.raises(ValueError, match="split 'train' has no documents"):
        tokens.prepare({"train": []}, tokenizer, tmp_path)


def test_progress_in_a_log_is_plain_lines(tokenizer, tmp_path, capsys):
    tokens.prepare({"train": make_documents(10)}, tokenizer, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("encoding train: 0.0 MB in ")


# From config to batches


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for document in make_documents(40):
        (folder / document.name).write_text(document.text)
    return folder


def config_for(folder, **fields) -> DataConfig:
    settings = {"source": str(folder), "vocab_size": 300, "cache_dir": str(folder.parent / "cache")}
    return DataConfig(**{**settings, "held_out_fraction": 0.2, **fields})


def test_load_is_repeatable_and_cached(text_folder, tmp_path):
    config = config_for(text_folder)
    data = load(config, 32, tmp_path / "run", model_vocab_size=300, progress=False)
    again = load(config, 32, tmp_path / "other", progress=False)
    assert again.files.reused and again.fingerprint == data.fingerprint
    assert load_tokenizer(tmp_path / "run").sha256 == data.tokenizer.sha256
    batch = next(data.train_batches(4, seed=0))
    np.testing.assert_array_equal(batch["tokens"], next(again.train_batches(4, seed=0))["tokens"])
    assert set(batch) == {"tokens"} and batch["tokens"].max() < data.tokenizer.vocab_size
    held_out = sum((batch["segment_ids"][:, 1:] > 0).sum() for batch in data.held_out_batches(4))
    assert held_out == data.files.splits["held_out"].tokens - 1
    assert data.bytes_per_token == data.files.splits["held_out"].bytes_per_token > 1
    assert json.loads(json.dumps(data.summary()))["splits"]["train"]["documents"] == len(
        corpus.split(corpus.folder(text_folder), 0.2)[0]
    )


def test_fingerprint_knows_text_tokenizer_split_and_window(text_folder, tmp_path):
    found = []

    def add(seq_len=32, **fields):
        found.append(load(config_for(text_folder, **fields), seq_len, tmp_path / str(len(found)), progress=False))

    add()
    add(seq_len=16)
    add(vocab_size=290)
    add(held_out_fraction=0.4)
    add(max_bytes=8000)
    add(cross_document_attention=False)
    (text_folder / "3.py").write_text("changed")
    add()
    assert len({data.fingerprint for data in found}) == 7
    assert "segment_ids" in found[5].train[0] and found[4].skipped["over max_bytes"] > 0


def test_load_without_held_out(text_folder, tmp_path):
    data = load(config_for(text_folder, held_out_fraction=0.0), 32, tmp_path / "run", progress=False)
    assert data.held_out is None and not list(data.held_out_batches(4))
    assert data.bytes_per_token == data.files.splits["train"].bytes_per_token


def test_load_takes_a_given_tokenizer(text_folder, tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "mine.json")
    data = load(config_for(text_folder, tokenizer=str(path)), 32, tmp_path / "run", progress=False)
    assert data.tokenizer.sha256 == tokenizer.sha256


def test_load_errors(text_folder, tmp_path):
    config = config_for(text_folder)
    with pytest.raises(ValueError, match="vocab_size=280 of the model is smaller"):
        load(config, 32, tmp_path / "a", model_vocab_size=280, progress=False)
    with pytest.raises(ValueError, match=r"the train split has .* seq_len=100000"):
        load(config, 100_000, tmp_path / "a", progress=False)
    load(config, 32, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"another tokenizer than .* vocab_size=290 give now"):
        load(config_for(text_folder, vocab_size=290), 32, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ""),
        ("patterns", "*.txt"),
        ("patterns", ()),
        ("max_bytes", 0),
        ("vocab_size", 258),
        ("tokenizer_sample_bytes", 0),
        ("held_out_fraction", 1.0),
    ],
)
def test_config_errors_name_field_and_value(field, value):
    with pytest.raises(ValueError) as error:
        DataConfig(**{field: value})
    assert f"DataConfig.{field} = {value!r}: " in str(error.value)
