"""What is written in a config is read back, and what cannot be is refused with field, value and remedy."""

import json
import subprocess
import sys

import pytest

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import ArrayRecord, Jsonl, Parquet, PythonStdlib, TextFiles, Tfds
from deepseek_jax.serialize import from_dict, to_dict

SOURCES = (
    PythonStdlib(), TextFiles(path="x/code"), Jsonl(path="a/*.jsonl.gz", weight=2.0), Parquet(path="web.parquet"),
    ArrayRecord(path="q", encoding="json"), Tfds(dataset="wiki40b/en:1.0.0"), TextFiles(path="y/code"),
    Jsonl(path="web.jsonl", name="web", max_bytes=5),
)  # fmt: skip


def test_config_round_trip_and_names():
    config = DataConfig(sources=SOURCES)
    assert from_dict(DataConfig, json.loads(json.dumps(to_dict(config)))) == config
    expected = ("python-stdlib", "code", "a", "web-2", "q", "wiki40b-en-1.0.0", "code-2", "web")
    assert config.names == expected


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: PythonStdlib(weight=0.0), r"PythonStdlib\.weight = 0.0: must be greater than 0"),
        (lambda: TextFiles(path=""), r"TextFiles\.path = '': "),
        (lambda: TextFiles(path="x", patterns="*.txt"), r"TextFiles\.patterns = '\*\.txt': give a tuple"),
        (lambda: TextFiles(path="x", patterns=()), r"TextFiles\.patterns = \(\): "),
        (lambda: Jsonl(path="x", max_bytes=0), r"Jsonl\.max_bytes = 0: must be greater than 0"),
        (lambda: Jsonl(path="x", name="a/b"), r"Jsonl\.name = 'a/b': must be made of letters"),
        (lambda: Parquet(path="x", column=""), r"Parquet\.column = '': "),
        (lambda: ArrayRecord(path="x", encoding="pickle"), r"ArrayRecord\.encoding = 'pickle': "),
        (lambda: Tfds(dataset=""), r"Tfds\.dataset = '': "),
        (lambda: DataConfig(sources=()), r"DataConfig\.sources = \(\): give a tuple of at least one of PythonStdlib"),
        (lambda: DataConfig(sources=("text",)), r"DataConfig\.sources = \('text',\): "),
        (
            lambda: DataConfig(sources=(Jsonl(path="a", name="x"), Jsonl(path="b", name="x"))),
            r"DataConfig\.sources = .* the name \['x'\]",
        ),
    ],
)
def test_source_errors_name_field_value_and_remedy(make, error):
    with pytest.raises(ValueError, match=error):
        make()


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"vocab_size": 258}, "at least 259"),
        ({"vocab_size": 261, "fim_rate": 0.1}, "at least 262"),
        ({"tokenizer": ""}, "tokenizer.json"),
        ({"tokenizer_sample_bytes": 0}, "greater than 0"),
        ({"held_out_fraction": 1.0}, "[0, 1)"),
        ({"fim_rate": 1.5}, "[0, 1]"),
        ({"split_punctuation_rate": -0.1}, "[0, 1]"),
        ({"max_document_bytes": 0}, "greater than 0"),
    ],
)
def test_config_errors_name_field_value_and_remedy(fields, remedy):
    with pytest.raises(ValueError) as error:
        DataConfig(**fields)
    field, value = next(iter(fields.items()))
    assert f"DataConfig.{field} = {value!r}: " in str(error.value) and remedy in str(error.value)


def test_config_is_light_to_import():
    program = """
import sys
from deepseek_jax.data import DataConfig
DataConfig()
heavy = {"tensorflow", "tensorflow_datasets", "grain", "jax", "tokenizers", "pyarrow", "array_record"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
