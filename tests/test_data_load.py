"""From a config to batches: mixing, held-out sets a source, what is told, and the command that shows it."""

import json

import numpy as np
import pytest
from texts import make_documents

from deepseek_jax.cli.main import main
from deepseek_jax.data import inspect
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.dataset import load
from deepseek_jax.data.pipeline import held_out_batches
from deepseek_jax.data.sources import Jsonl, TextFiles
from deepseek_jax.data.tokenizer import load_tokenizer, train_bpe

pytest_plugins = ["fake_gcs"]


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for document in make_documents(40):
        (folder / document.name).write_text(document.text)
    return folder


@pytest.fixture
def jsonl_file(tmp_path):
    """60 documents, 20 of them also in `text_folder`."""
    documents = [*make_documents(20), *make_documents(40, seed=1)]
    file = tmp_path / "web.jsonl"
    file.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    return file


def config_for(folder, max_bytes=None, **fields) -> DataConfig:
    settings = {"sources": (TextFiles(path=str(folder), max_bytes=max_bytes),), "vocab_size": 300}
    return DataConfig(**{**settings, "cache_dir": str(folder.parent / "cache"), "held_out_fraction": 0.2, **fields})


def two_sources(folder, file, **fields) -> DataConfig:
    return config_for(folder, sources=(TextFiles(path=str(folder)), Jsonl(path=str(file), weight=3.0)), **fields)


def documents_of(data, name, split):
    array, tokenizer = data.files[name].array(split), data.tokenizer
    pieces = np.split(array, np.flatnonzero(array == tokenizer.eos_id)[:-1] + 1)
    return {tokenizer.decode(piece, skip_special=True) for piece in pieces}


def test_load_is_repeatable_and_cached(text_folder, tmp_path):
    config = config_for(text_folder)
    data = load(config, 32, tmp_path / "run", model_vocab_size=300, progress=False)
    again = load(config, 32, tmp_path / "other", progress=False)
    assert again.files["text"].reused and again.fingerprint == data.fingerprint
    assert load_tokenizer(tmp_path / "run").sha256 == data.tokenizer.sha256
    batch = next(data.train_batches(4, seed=0))
    np.testing.assert_array_equal(batch["tokens"], next(again.train_batches(4, seed=0))["tokens"])
    assert set(batch) == {"tokens"} and batch["tokens"].max() < data.tokenizer.vocab_size
    assert data.train[0]["tokens"].shape == (33,)
    held_out = sum((batch["segment_ids"][:, 1:] > 0).sum() for batch in held_out_batches(data.held_out["text"], 4))
    assert held_out == data.files["text"].splits["held_out"].tokens - 1


def test_sources_are_mixed_by_weight_and_split_alike(text_folder, jsonl_file, tmp_path):
    data = load(two_sources(text_folder, jsonl_file), 32, tmp_path / "run", progress=False)
    assert list(data.held_out) == list(data.files) == ["text", "web"] and data.train.shares == (0.25, 0.75)
    trained = documents_of(data, "text", "train") | documents_of(data, "web", "train")
    held_out = documents_of(data, "text", "held_out") | documents_of(data, "web", "held_out")
    assert trained | held_out == {
        document.text for n, seed in ((40, 0), (40, 1)) for document in make_documents(n, seed)
    }
    assert not trained & held_out and len(held_out) > 4
    windows = {}
    for number, source in enumerate(data.train.sources):
        windows |= {source[i]["tokens"].tobytes(): number for i in range(len(source))}
    iterator = data.train_batches(8, seed=1)
    rows = [windows[row.tobytes()] for _ in range(40) for row in next(iterator)["tokens"]]
    assert rows.count(0) == 80 and rows.count(1) == 240
    steps = data.epochs(32 * 320)
    assert steps["text"] == pytest.approx(80 / len(data.train.sources[0]))
    assert load(two_sources(text_folder, jsonl_file), 32, None, progress=False).fingerprint == data.fingerprint


def test_summary_is_json_that_says_what_was_read(text_folder, jsonl_file, tmp_path):
    with jsonl_file.open("ab") as file:
        file.write(b'{"text": "caf\xe9"}\n{"text": ""}\n')
    config = two_sources(text_folder, jsonl_file, fim_rate=0.5, split_punctuation_rate=0.5, vocab_size=310)
    data = load(config, 32, tmp_path / "run", progress=False)
    summary = json.loads(json.dumps(data.summary()))
    assert data.skipped == {"text": {}, "web": {"not UTF-8": 1, "empty": 1}}
    web = summary["sources"]["web"]
    assert web["skipped"] == {"not UTF-8": 1, "empty": 1} and web["skipped_places"]["empty"] == [f"{jsonl_file}:62"]
    assert (web["kind"], web["share"], web["documents"]) == ("Jsonl", 0.75, 60)
    assert sum(split["documents"] for split in web["splits"].values()) == 60
    assert web["splits"]["train"]["infilled"] > 5 and web["splits"]["held_out"]["infilled"] == 0
    assert summary["fingerprint"] == data.fingerprint and summary["tokenizer_vocab_size"] == data.tokenizer.vocab_size


def test_fingerprint_knows_all_that_changes_batches(text_folder, jsonl_file, tmp_path):
    found = []

    def add(config, seq_len=32):
        found.append(load(config, seq_len, tmp_path / str(len(found)), progress=False))

    add(config_for(text_folder))
    add(config_for(text_folder), seq_len=16)
    add(config_for(text_folder, vocab_size=290))
    add(config_for(text_folder, held_out_fraction=0.4))
    add(config_for(text_folder, max_bytes=8000))
    add(config_for(text_folder, cross_document_attention=False))
    add(config_for(text_folder, fim_rate=0.1))
    add(config_for(text_folder, fim_rate=0.2))
    add(config_for(text_folder, split_punctuation_rate=0.2))
    add(config_for(text_folder, tokenizer="bytes"))
    add(config_for(text_folder, max_document_bytes=400))
    add(two_sources(text_folder, jsonl_file))
    equal_weights = (TextFiles(path=str(text_folder)), Jsonl(path=str(jsonl_file)))
    add(config_for(text_folder, sources=equal_weights, tokenizer=str(tmp_path / "11" / "tokenizer.json")))
    (text_folder / "3.py").write_text("changed")
    add(config_for(text_folder))
    assert len({data.fingerprint for data in found}) == len(found) == 14
    assert "segment_ids" in found[5].train[0] and found[4].skipped["text"]["over max_bytes"] > 0
    assert found[9].tokenizer.vocab_size == 259 and found[6].tokenizer.fim_ids == (297, 298, 299)


def test_load_without_held_out(text_folder, tmp_path):
    data = load(config_for(text_folder, held_out_fraction=0.0), 32, tmp_path / "run", progress=False)
    assert data.held_out == {} and data.files["text"].splits["train"].documents == 40


def test_a_source_without_held_out_documents_is_told(text_folder, tmp_path, caplog):
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "some words " * 50}) + "\n")
    config = two_sources(text_folder, tmp_path / "few.jsonl", held_out_fraction=0.02)
    data = load(config, 32, None, progress=False)
    assert list(data.held_out) == ["text"] and "source 'few': none of its 1 documents is held out" in caplog.text


def test_cache_and_run_folder_may_be_on_object_storage(text_folder, jsonl_file, gcs):
    config = two_sources(text_folder, jsonl_file, cache_dir="gs://bucket/cache")
    data = load(config, 32, "gs://bucket/run", progress=False)
    again = load(config, 32, "gs://bucket/run", progress=False)
    assert not data.files["web"].reused and again.files["web"].reused
    local = load(two_sources(text_folder, jsonl_file), 32, None, progress=False)
    assert local.fingerprint == again.fingerprint == data.fingerprint
    np.testing.assert_array_equal(next(again.train_batches(8, 0))["tokens"], next(local.train_batches(8, 0))["tokens"])
    assert load_tokenizer("gs://bucket/run").sha256 == local.tokenizer.sha256


def test_load_takes_a_given_tokenizer(text_folder, tmp_path):
    path = tmp_path / "mine.json"
    mine = train_bpe([document.text for document in make_documents(9)], 280, path, progress=False)
    data = load(config_for(text_folder, tokenizer=str(path)), 32, tmp_path / "run", progress=False)
    assert data.tokenizer.sha256 == mine.sha256
    with pytest.raises(ValueError, match=r"DataConfig.fim_rate = 0.1: the tokenizer has no tokens <｜fim▁begin｜>"):
        load(config_for(text_folder, tokenizer=str(path), fim_rate=0.1), 32, None, progress=False)


def test_tokenizer_is_trained_on_training_documents_in_proportion(text_folder, jsonl_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "deepseek_jax.data.dataset.train_bpe", lambda texts, *a, **k: seen.extend(texts) or train_bpe(texts, *a, **k)
    )
    config = two_sources(text_folder, jsonl_file, tokenizer_sample_bytes=8000)
    data = load(config, 32, None, progress=False)
    held_out = documents_of(data, "text", "held_out") | documents_of(data, "web", "held_out")
    assert not held_out & set(seen)
    of_web = sum(len(text) for text in seen if text in documents_of(data, "web", "train"))
    assert 3000 < of_web < 8000 and len(seen) > 8


def test_load_errors(text_folder, tmp_path):
    config = config_for(text_folder)
    with pytest.raises(ValueError, match="vocab_size=280 of the model is smaller"):
        load(config, 32, tmp_path / "a", model_vocab_size=280, progress=False)
    with pytest.raises(ValueError, match=r"the train split of source 'text' has .* seq_len=100000"):
        load(config, 100_000, tmp_path / "a", progress=False)
    load(config, 32, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"another tokenizer than .* vocab_size=290, .* give now"):
        load(config_for(text_folder, vocab_size=290), 32, tmp_path / "run", progress=False)
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"held_out_fraction = 0.999: it takes all 1 documents of source 'one'"):
        load(two_sources(text_folder, tmp_path / "one.jsonl", held_out_fraction=0.999), 2, None, progress=False)


# Looking at it


def test_describe_shows_counts_and_documents_with_their_borders(text_folder, jsonl_file):
    config = two_sources(text_folder, jsonl_file, cross_document_attention=False, fim_rate=0.3, tokenizer="bytes")
    said = inspect.describe(config, 700, batch_size=2, batches=2, n_tokens=10_000, progress=False)
    assert next(line for line in said.splitlines() if line.startswith("web ")).split()[1:3] == ["75.00%", "60"]
    assert "epochs in 10k tokens" in said and "training documents are filled in" in said
    assert said.count("═══ batch") == 4 and "batch 1, row 1 · " in said
    assert "─── document begins, segment 2, " in said and "─── document goes on, segment 1, " in said
    assert "│ <｜begin▁of▁sentence｜>" in said and "<｜fim▁hole｜>" in said
    begun = said.count("document begins")
    assert begun == said.count("<｜begin▁of▁sentence｜>") and said.count("═══ batch 0") == 2
    with pytest.raises(ValueError, match="batches=-1"):
        inspect.describe(config, 32, batches=-1)


def test_command_inspects_a_config_file(text_folder, tmp_path, capsys):
    file = tmp_path / "small.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from deepseek_jax import get_config as model\n"
        "from deepseek_jax.data import DataConfig, TextFiles\n"
        "from deepseek_jax.training import MultiStep, RunConfig\n\n"
        "def get_config():\n"
        "    nano = replace(model('deepseek-v3-micro'), vocab_size=320)\n"
        "    return RunConfig(model=nano, schedule=MultiStep(peak=1e-2, warmup_steps=2),\n"
        f"        data=DataConfig(sources=(TextFiles(path={str(text_folder)!r}),), tokenizer='bytes',\n"
        f"            cache_dir={str(tmp_path / 'cache')!r}), steps=6, batch_size=8, seq_len=24)\n"
    )
    words = ["--data.sources.0.max-bytes", "6000", "--data.sources.0.name", "mine", "--batch-size", "2"]
    assert main(["data", "inspect", str(file), "--batches", "3", *words]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("═══ batch") == 6 and "mine: left out, over max_bytes: " in said and "epochs in 288 tokens" in said
    )
    assert not (tmp_path / "runs").exists()
    assert main(["data", "inspect", str(file), "--data.sources.0.path", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
