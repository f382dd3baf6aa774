"""Text to batches: documents, tokenizer, token cache, Grain pipeline. Light to import: grain and tokenizers come in
where they are used."""

from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import Document, Documents
from deepseek_jax.data.dataset import Data, fingerprint, load
from deepseek_jax.data.pipeline import TokenSource, batches, held_out_batches
from deepseek_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Data",
    "DataConfig",
    "Document",
    "Documents",
    "TokenSource",
    "Tokenizer",
    "batches",
    "fingerprint",
    "held_out_batches",
    "load",
    "load_tokenizer",
    "train_bpe",
]
