"""Sources: every kind gives its texts in order, leaves out what it must, and names what is wrong."""

import gzip
import importlib.util
import json
import os
import sys
import time

import pytest
from texts import content_hash, make_documents

from deepseek_jax.chat.data import Messages
from deepseek_jax.chat.rows import conversation_of
from deepseek_jax.data import reading, records
from deepseek_jax.data.reading import Corpus, held_out_below
from deepseek_jax.data.rows import read_rows
from deepseek_jax.data.sources import ArrayRecord, Jsonl, Parquet, TextFiles, Tfds

TEXTS = [document.text for document in make_documents(30)]


def texts_of(source, **options):
    return [document.text for document in Corpus("x", source, **options)]


def scan_of(source, cache, **options):
    return Corpus("x", source, **options).scan(cache, progress=False)


def write_jsonl(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_parquet(path, values, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": values, **columns}), path, row_group_size=7)


def write_array_record(path, values):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for value in values:
        writer.write(value)
    writer.close()


# What they give


def test_jsonl_file_folder_and_glob(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": text, "n": 1} for text in TEXTS[10:]])
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text} for text in TEXTS[:10]])
    write_jsonl(tmp_path / ".hidden" / "c.jsonl", [{"text": "hidden"}])
    (tmp_path / "notes.txt").write_text("no JSON")
    assert texts_of(Jsonl(path=str(tmp_path))) == TEXTS
    assert texts_of(Jsonl(path=str(tmp_path / "*.jsonl*"))) == TEXTS
    assert texts_of(Jsonl(path=str(tmp_path / "b.jsonl"))) == TEXTS[10:]


def test_jsonl_counts_what_it_leaves_out(tmp_path):
    lines = [json.dumps({"body": text}).encode() for text in TEXTS[:3]]
    lines[1:1] = [b'{"body": "caf\xe9"}', b"", b'{"body": "  "}', b'{"body": null}', b'{"body": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, json.dumps({"body": "long" * 1000}).encode()]))
    (tmp_path / "b.jsonl").write_bytes(b"")
    source = Jsonl(path=str(tmp_path), field="body")
    assert texts_of(source, max_document_bytes=1000) == TEXTS[:3]
    scan = scan_of(source, tmp_path / "cache", max_document_bytes=1000)
    a = tmp_path / "a.jsonl"
    assert scan.places == {
        "not UTF-8": (f"{a}:2", f"{a}:6"), "empty": (f"{a}:3", f"{a}:4"), "null": (f"{a}:5",),
        "over max_document_bytes": (f"{a}:9",), "empty shard": (str(tmp_path / "b.jsonl"),),
    }  # fmt: skip
    assert scan.skipped == {reason: len(places) for reason, places in scan.places.items()} and scan.documents == 3


def test_parquet(tmp_path):
    write_parquet(tmp_path / "0.parquet", TEXTS[:20])
    write_parquet(tmp_path / "1.parquet", [None, *(text.encode() for text in TEXTS[20:]), b"caf\xe9"])
    (tmp_path / "2.parquet").write_bytes(b"")
    source = Parquet(path=str(tmp_path))
    assert texts_of(source) == TEXTS
    assert scan_of(source, tmp_path).skipped == {"null": 1, "not UTF-8": 1, "empty shard": 1}


def test_array_record(tmp_path):
    write_array_record(tmp_path / "x.array_record-00000-of-00003", [text.encode() for text in TEXTS[:20]])
    write_array_record(tmp_path / "x.array_record-00001-of-00003", [text.encode() for text in TEXTS[20:]] + [b"\xff"])
    write_array_record(tmp_path / "x.array_record-00002-of-00003", [])
    source = ArrayRecord(path=str(tmp_path))
    assert texts_of(source) == TEXTS
    assert scan_of(source, tmp_path).skipped == {"not UTF-8": 1, "empty shard": 1}
    write_array_record(tmp_path / "j.arrayrecord", [json.dumps({"t": text}).encode() for text in TEXTS])
    assert texts_of(ArrayRecord(path=str(tmp_path / "j.arrayrecord"), encoding="json", field="t")) == TEXTS


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class TinyCorpus(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"body": tfds.features.Text()}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(300):
            yield i, {"body": f"document {i}"}

class TinyChats(TinyCorpus):
    def _info(self):
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {"messages": tfds.features.Sequence(message), "score": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        for i in range(5):
            asked = {"role": "user", "content": f"question {i}"}
            yield i, {"messages": [asked, {"role": "assistant", "content": "é"}], "score": i}
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A dataset prepared without network and without TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    (folder / "tiny_corpus_builder.py").write_text(BUILDER)
    spec = importlib.util.spec_from_file_location("tiny_corpus_builder", folder / "tiny_corpus_builder.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for builder in (module.TinyCorpus, module.TinyChats):
        builder(data_dir=folder / "data", file_format="array_record").download_and_prepare()
    return folder / "data"


def test_tfds_reads_a_prepared_dataset_without_tensorflow(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_online", lambda: pytest.fail("asked for the network"))
    source = Tfds(dataset="tiny_corpus", field="body", data_dir=str(tfds_dir))
    texts = texts_of(source)
    assert sorted(texts) == sorted(f"document {i}" for i in range(300)) and texts == texts_of(source)
    assert scan_of(source, tmp_path).documents == 300
    assert "tensorflow" not in sys.modules
    assert texts_of(Tfds(dataset="tiny_corpus:1.0.0", field="body", data_dir=str(tfds_dir))) == texts


def test_tfds_gives_whole_rows(tfds_dir):
    source = Tfds(dataset="tiny_chats", data_dir=str(tfds_dir))
    rows = dict(read_rows(source, lambda *_: pytest.fail("something was left out"), ("messages",)))
    assert len(rows) == 5 and "tiny_chats:train:1" in rows
    chats = {str(conversation_of(row, Messages(), where).messages) for where, row in rows.items()}
    assert chats == {
        str([{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "é"}]) for i in range(5)
    }


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"field": "text"}, r"there is no field='text'; the features are \['body'\]"),
        ({"field": "body", "split": "test"}, "Unknown split 'test'"),
    ],
)
def test_tfds_errors(tfds_dir, fields, error):
    with pytest.raises(ValueError, match=error):
        texts_of(Tfds(dataset="tiny_corpus", data_dir=str(tfds_dir), **fields))


def test_tfds_offline_is_an_error_at_once(tmp_path, monkeypatch):
    def hang(*_, **__):
        time.sleep(60)

    monkeypatch.setattr("urllib.request.urlopen", hang)
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        texts_of(Tfds(dataset="mnist", data_dir=str(tmp_path)))
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert message.startswith(
        f"Tfds.dataset = 'mnist': not prepared in data_dir='{tmp_path}', and this machine reaches"
    )
    assert f"tfds.data_source('mnist', data_dir='{tmp_path}')" in message


# What is wrong with them


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: no JSON \(Expecting value"),
        (b'{"txt": "a"}\n', r"a\.jsonl:1: the record has the fields \['txt'\]; there is no field='text'"),
        (b'"a"\n', r"a\.jsonl:1: the record is a str; there is no field='text'"),
        (b'{"text": 3}\n', r"a\.jsonl:1: the text is a int, must be a string"),
        (b"\n", r"source 'x' holds no documents \(1 empty\): Jsonl\("),
        (b"", r"source 'x' holds no documents \(1 empty shard\)"),
    ],
)
def test_jsonl_errors(tmp_path, content, error):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=error):
        scan_of(Jsonl(path=str(tmp_path)), tmp_path)


def test_damaged_and_missing_files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", [{"text": text} for text in TEXTS])
    (tmp_path / "a.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-100])
    (tmp_path / "p.parquet").write_bytes(b"garbage" * 100)
    (tmp_path / "r.array_record").write_bytes(b"garbage" * 20_000)
    write_parquet(tmp_path / "n.parquet", [1, 2])
    for source, error in [
        (Jsonl(path=str(tmp_path)), r"a\.jsonl\.gz: damaged gzip file"),
        (Parquet(path=str(tmp_path / "p.parquet")), r"p\.parquet: Parquet magic bytes not found"),
        (Parquet(path=str(tmp_path / "n.parquet")), r"column='text' holds int64, must hold strings"),
        (Parquet(path=str(tmp_path / "n.parquet"), column="t"), r"no column='t'; the columns are \['text'\]"),
        (ArrayRecord(path=str(tmp_path)), r"r\.array_record: no ArrayRecord file, or a damaged one"),
        (Jsonl(path=str(tmp_path / "absent*")), r"Jsonl\.path = '.*absent\*': no such file, folder or match"),
        (Parquet(path=str(tmp_path / "absent")), r"Parquet\.path = '.*absent': no such file, folder or match"),
        (Jsonl(path="gs://bucket/a.jsonl"), r"Jsonl\.path = 'gs://bucket/a\.jsonl': .* local disks"),
        (TextFiles(path=str(tmp_path / "absent")), "no such folder"),
    ]:
        with pytest.raises(ValueError, match=error):
            texts_of(source)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"Parquet\.path = .* needs pyarrow: pip install pyarrow"):
        texts_of(Parquet(path=str(tmp_path)))


# Scans


def test_scan_counts_and_hashes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    scan = scan_of(Jsonl(path=str(tmp_path)), tmp_path / "cache")
    documents = make_documents(30)
    sides = sorted(document.side for document in documents)
    assert (scan.documents, scan.text_bytes) == (30, sum(len(text.encode()) for text in TEXTS))
    assert scan.content_hash == content_hash(documents)
    assert (scan.low_sides, scan.high_side) == (tuple(sides[:2]), sides[-1])
    write_jsonl(tmp_path / "other" / "z.jsonl", [{"t": text} for text in TEXTS])
    assert scan_of(Jsonl(path=str(tmp_path / "other"), field="t"), tmp_path).content_hash == scan.content_hash


def test_scan_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"text": text} for text in TEXTS])
    first = scan_of(Jsonl(path=str(file)), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(reading.records, "read", None)  # would fail if called
        assert scan_of(Jsonl(path=str(file), name="y", weight=2.0), tmp_path / "cache") == first
    write_jsonl(file, [{"text": text.upper()} for text in TEXTS])
    os.utime(file, ns=(1, 1))
    assert scan_of(Jsonl(path=str(file)), tmp_path / "cache").content_hash != first.content_hash


def test_size_caps(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    cap = sum(len(text.encode()) for text in TEXTS[:10])
    source = Jsonl(path=str(tmp_path), max_bytes=cap)
    assert texts_of(source) == TEXTS[:10]
    assert scan_of(source, tmp_path).cut_short and not scan_of(Jsonl(path=str(tmp_path)), tmp_path).cut_short
    with pytest.raises(ValueError, match=r"holds no documents \(.*the first document is longer than max_bytes=9"):
        scan_of(Jsonl(path=str(tmp_path), max_bytes=9), tmp_path)
    for number, text in enumerate([*TEXTS, "long " * 1000]):
        (tmp_path / f"{number}.txt").write_text(text)
    scan = scan_of(TextFiles(path=str(tmp_path), patterns=("*.txt",), max_bytes=cap), tmp_path, max_document_bytes=1000)
    assert scan.skipped["over max_document_bytes"] == 1 and scan.documents + scan.skipped["over max_bytes"] == 30


def test_held_out_share_by_hash_alone(tmp_path):
    documents = make_documents(2000)
    scans = []
    for name, part in (("a", documents[:1500]), ("b", documents[500:])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": document.text} for document in part])
        scans.append(scan_of(Jsonl(path=str(tmp_path / f"{name}.jsonl")), tmp_path))
    assert held_out_below(scans, 0.1) == 0.1 and held_out_below(scans, 0.0) == 0.0
    assert 150 < sum(document.side < 0.1 for document in documents) < 250


@pytest.mark.parametrize(("n", "fraction"), [(2, 0.001), (2, 0.999), (5, 0.01), (5, 0.99)])
def test_a_small_corpus_has_documents_on_both_sides(tmp_path, n, fraction):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[:n]])
    below = held_out_below([scan_of(Jsonl(path=str(tmp_path)), tmp_path)], fraction)
    assert 0 < sum(document.side < below for document in make_documents(n)) < n


def test_one_document_cannot_be_split(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "one"}])
    with pytest.raises(ValueError, match=r"the corpus has 2 documents.*at least 2 different ones, or held_out_frac"):
        held_out_below([scan_of(Jsonl(path=str(tmp_path)), tmp_path)], 0.1)
