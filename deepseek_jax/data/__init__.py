"""Text to batches: sources, documents, tokenizer, token cache, Grain pipeline. Light to import: grain, tokenizers,
pyarrow, array_record and TFDS come in where they are used."""

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import Document, Documents
from deepseek_jax.data.dataset import Data, load
from deepseek_jax.data.inspect import describe
from deepseek_jax.data.pipeline import Mixture, TokenSource, batches, held_out_batches
from deepseek_jax.data.sources import ArrayRecord, Jsonl, Parquet, PythonStdlib, Source, TextFiles, Tfds
from deepseek_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe, with_tokens

__all__ = [
    "ArrayRecord",
    "Data",
    "DataConfig",
    "Document",
    "Documents",
    "Jsonl",
    "Mixture",
    "Parquet",
    "PythonStdlib",
    "Source",
    "TextFiles",
    "Tfds",
    "TokenSource",
    "Tokenizer",
    "batches",
    "byte_tokenizer",
    "describe",
    "held_out_batches",
    "load",
    "load_tokenizer",
    "train_bpe",
    "with_tokens",
]
