"""Documents, tokenizers, token cache: what a run reads is exact and the same everywhere."""

import hashlib

import numpy as np
import pytest
from texts import content_hash, make_documents

from deepseek_jax import storage
from deepseek_jax.data import corpus, tokens
from deepseek_jax.data.corpus import Documents
from deepseek_jax.data.tokenizer import (
    EOS_TOKEN,
    FIM_TOKENS,
    SPECIAL_TOKENS,
    byte_tokenizer,
    load_tokenizer,
    train_bpe,
)  # fmt: skip


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


def test_size_cap_is_a_nested_choice_independent_of_names_and_split():
    documents = Documents(tuple(sorted(make_documents(2000), key=lambda document: document.digest)))
    small, large = documents.capped(100_000), documents.capped(200_000)
    assert 90_000 < small.n_bytes <= 100_000 < large.n_bytes
    assert list(large[: len(small)]) == list(small)
    assert len(small.skipped["over max_bytes"]) == 2000 - len(small)
    numbers = [int(document.name.removesuffix(".py")) for document in small]
    assert min(numbers) < 200 and max(numbers) > 1800, "the cap took the first names, not a sample"
    assert 0.2 < sum(document.side < 0.3 for document in small) / len(small) < 0.4
    with pytest.raises(ValueError, match="max_bytes=10: the first document"):
        documents.capped(10)


# Tokenizer


def test_special_tokens_have_v3s_ids(tokenizer):
    assert [tokenizer.decode([i]) for i in range(3)] == list(SPECIAL_TOKENS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.decode([0, *tokenizer.encode("x"), 1], skip_special=True) == "x"


@pytest.mark.parametrize("kind", ["bpe", "bpe with fim", "bytes", "bytes with fim"])
def test_round_trip_of_any_text(tokenizer, kind, tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    fim = kind.endswith("fim")
    if kind == "bpe with fim":
        texts = [document.text for document in make_documents(20)]
        tokenizer = train_bpe(texts, 300, tmp_path / "tokenizer.json", fim=True, progress=False)
    elif kind.startswith("bytes"):
        tokenizer = byte_tokenizer(fim=fim)
    specials = [*SPECIAL_TOKENS, *FIM_TOKENS]
    pieces = strategies.one_of(
        strategies.text(),
        strategies.sampled_from([*specials, "\r\n", "\t  ", "12345", "你好、カナ", "e\u0301", "👩‍🚀", "\x00"]),
    )

    lengths = tokenizer.byte_lengths()
    special_ids = {0, 1, 2, *(tokenizer.fim_ids or ())}
    assert len(special_ids) == (6 if fim else 3)
    assert lengths.shape == (tokenizer.vocab_size,) and not lengths[list(special_ids)].any()

    @hypothesis.settings(max_examples=40, deadline=None, database=None)
    @hypothesis.given(strategies.lists(pieces, max_size=6).map("".join))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not special_ids & set(ids), "text became a special token"
        assert lengths[ids].sum() == len(text.encode())

    check()


def test_byte_tokenizer_is_the_bytes_after_the_special_tokens(tmp_path):
    plain, fim = byte_tokenizer(), byte_tokenizer(fim=True)
    text = "aé\n" + EOS_TOKEN
    assert plain.encode(text) == fim.encode(text) == [byte + 3 for byte in text.encode()]
    assert (plain.vocab_size, fim.vocab_size, plain.fim_ids, fim.fim_ids) == (259, 262, None, (259, 260, 261))
    assert [fim.decode([i]) for i in fim.fim_ids] == list(FIM_TOKENS)
    assert plain.encode(text, special=True)[-1] == plain.eos_id and plain.byte_lengths().tolist() == [0] * 3 + [1] * 256
    loaded = load_tokenizer(plain.save(tmp_path / "tokenizer.json"))
    assert loaded.encode(text) == plain.encode(text) and loaded.sha256 == plain.sha256
    assert loaded.strings()[3 + ord("x")] == "x" and 3 + 0xC3 not in loaded.strings()


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
    with pytest.raises(ValueError, match=r"vocab_size=261: 6 special tokens .* at least 262"):
        train_bpe(["text"], 261, tmp_path / "x.json", fim=True)
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
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        storage.write_atomic(path, "new")
    with pytest.raises(OSError, match="no space"):
        storage.save_array(path, np.zeros(3))
    assert path.read_bytes() == b"old\r\n" and list(path.parent.iterdir()) == [path]


def prepare(documents, tokenizer, folder, **options):
    options = {"content_hash": content_hash(documents), "progress": False, **options}
    return tokens.prepare(documents, tokenizer, folder, **options)


def test_prepare_stores_each_document_between_bos_and_eos(tokenizer, tmp_path):
    documents = make_documents(60)
    files = prepare(documents, tokenizer, tmp_path, held_out_below=0.3)
    for split, side in (("train", False), ("held_out", True)):
        chosen = [document for document in documents if (document.side < 0.3) == side]
        array = files.array(split)
        assert array.tolist() == [i for document in chosen for i in [0, *tokenizer.encode(document.text), 1]]
        assert array.dtype == np.uint16 and isinstance(array, np.memmap) and not array.flags.writeable
        text_bytes = sum(len(document.text.encode()) for document in chosen)
        assert files.splits[split] == tokens.Split(len(array), len(chosen), text_bytes)
    assert sorted(file.name for file in files.folder.iterdir()) == ["held_out.npy", "meta.json", "train.npy"]
    with pytest.raises(ValueError, match=r"split='test': this corpus has \['held_out', 'train'\]"):
        files.array("test")


def test_prepare_reads_a_stream_chunk_by_chunk(tokenizer, tmp_path, monkeypatch):
    documents, chunks = make_documents(90), []
    whole = prepare(documents, tokenizer, tmp_path / "whole").array("train")
    encode = tokens._Encoder.__call__
    monkeypatch.setattr(tokens, "_CHUNK_BYTES", 2_000)
    monkeypatch.setattr(tokens._Encoder, "__call__", lambda self, chunk: chunks.append(chunk) or encode(self, chunk))
    stream, folder = (document for document in documents), tmp_path / "stream"
    files = tokens.prepare(stream, tokenizer, folder, content_hash=content_hash(documents), progress=False)
    np.testing.assert_array_equal(files.array("train"), whole)
    assert len(chunks) > 9 and max(map(len, chunks)) < 10


def test_prepare_reuses_the_cache_and_mends_it(tokenizer, tmp_path, monkeypatch):
    documents = make_documents(10)
    first = prepare(documents, tokenizer, tmp_path)
    whole = first.array("train").tolist()
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_Encoder", None)  # would fail if called
        again = prepare(documents, tokenizer, tmp_path)
    assert again.reused and not first.reused and again.splits == first.splits
    file = first.folder / "train.npy"
    file.write_bytes(file.read_bytes()[:-4])
    mended = prepare(documents, tokenizer, tmp_path)
    assert not mended.reused and mended.array("train").tolist() == whole
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"delete .* to encode the corpus again"):
        mended.array("train")


def test_cache_key_knows_text_tokenizer_split_and_rates(tokenizer, tmp_path):
    documents = make_documents(10)
    fim = train_bpe(["other text " * 9], 300, tmp_path / "other.json", fim=True, progress=False)
    runs = [
        prepare(documents, tokenizer, tmp_path),
        prepare(make_documents(11), tokenizer, tmp_path),
        prepare(documents[::-1], tokenizer, tmp_path),
        prepare(documents, fim, tmp_path),
        prepare(documents, fim, tmp_path, fim_rate=0.5),
        prepare(documents, fim, tmp_path, split_punctuation_rate=0.5),
        prepare(documents, tokenizer, tmp_path, held_out_below=0.5),
    ]
    assert len({files.folder for files in runs}) == len({files.key for files in runs}) == 7
    assert not any(files.reused for files in runs)
    with pytest.raises(ValueError, match=r"DataConfig.fim_rate = 0.5: the tokenizer has no tokens .*tokenizer=None"):
        prepare(documents, tokenizer, tmp_path, fim_rate=0.5)


def test_a_source_that_changes_while_it_is_read_is_an_error(tokenizer, tmp_path):
    documents = make_documents(3)
    with pytest.raises(ValueError, match="source 'documents' changed while it was being read"):
        prepare(documents[:2], tokenizer, tmp_path, content_hash=content_hash(documents))
    assert not list(tmp_path.rglob("*.npy"))


def test_golden_of_documents_to_tokens(tmp_path):
    """The same on every machine: a change here means that everyone's caches and fingerprints change."""
    documents = make_documents(50)
    files = prepare(
        documents, byte_tokenizer(fim=True), tmp_path, held_out_below=0.1, fim_rate=0.5, split_punctuation_rate=0.5
    )
    hashes = {split: hashlib.sha256(files.array(split).tobytes()).hexdigest()[:16] for split in files.splits}
    assert hashes == {"train": "683a47b2a31f47fb", "held_out": "5c71bcffade97116"}
    assert files.splits["train"].infilled == 23


def test_progress_in_a_log_is_plain_lines(tokenizer, tmp_path, capsys):
    prepare(make_documents(10), tokenizer, tmp_path, progress=True, name="train")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("encoding train: 0.0 MB in ")
