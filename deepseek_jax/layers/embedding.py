"""Token embedding and output head; tied where the member ties them."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from deepseek_jax.layers.weights import weight
from deepseek_jax.parallel.exchange import gather_weight
from deepseek_jax.parallel.rules import axes_of, shard, sharded_map
from deepseek_jax.types import Array


class Embedding(nn.Module):
    """Rows of a [W, D] table."""

    vocab_size: int
    hidden_size: int
    dtype: str
    param_dtype: str
    stddev: float

    def setup(self) -> None:
        self.embedding = weight(
            self, "embedding", (self.vocab_size, self.hidden_size), ("vocab", "embed"),
            dtype=self.param_dtype, stddev=self.stddev,
        )  # fmt: skip

    def __call__(self, tokens_BT: Array) -> Array:
        """[B, T] token ids -> [B, T, D] in the compute dtype."""
        return lookup(self.embedding, tokens_BT, self.dtype)


def lookup(table_WD: Array, tokens_BT: Array, dtype: str) -> Array:
    """Rows of the table, [B, T, D] in `dtype`.

    On a mesh every device looks up its part of D for the tokens of all that share the table, and they exchange: what
    travels is a device's own [B, T, D], once, where the table's parts put together would be all of it; and its gradient
    is added up where it is stored. Where sequences are split, no device sees places that are not its own.
    """
    width, vocab, W = axes_of("embed"), axes_of("vocab"), len(table_WD)
    # From the first axis on that splits sequences: there the tokens stay apart, and these parts of the table come together.
    cut = next((i for i, axis in enumerate(width) if axis in axes_of("length")), len(width))
    width, joined = width[:cut], width[cut:]

    def local(table_Wd: Array, tokens_BT: Array) -> Array:
        if joined:  # wide again, since equal tokens' gradients are added up in the dtype of what is looked up
            table_Wd = gather_weight(table_Wd, joined, 1, dtype, wide_sums=True).astype(table_Wd.dtype)
        ids_ABT = lax.all_gather(tokens_BT, width) if width else tokens_BT[None]
        if vocab:
            own_ABT = ids_ABT - lax.axis_index(vocab) * len(table_Wd)
            here = (own_ABT >= 0) & (own_ABT < len(table_Wd))
            rows_ABTd = jnp.take(table_Wd, jnp.where(here, own_ABT, 0), axis=0).astype(dtype)
            rows_ABTd = lax.psum(jnp.where(here[..., None], rows_ABTd, 0), vocab)
            # As `take` does with an id that is none: it must not pass for a row of zeros.
            rows_ABTd = jnp.where((ids_ABT < W)[..., None], rows_ABTd, jnp.nan)
        else:
            rows_ABTd = jnp.take(table_Wd, ids_ABT, axis=0).astype(dtype)
        if width:
            rows_ABTd = lax.all_to_all(rows_ABTd, width, split_axis=0, concat_axis=3, tiled=True)
        return rows_ABTd[0]

    tokens = ("batch", "length")
    return sharded_map(local, (("vocab", "embed"), tokens), (*tokens, "act_embed"))(table_WD, tokens_BT)


class Head(nn.Module):
    """Projection to the vocabulary."""

    vocab_size: int
    hidden_size: int
    param_dtype: str
    stddev: float

    def setup(self) -> None:
        self.w = weight(
            self, "w", (self.hidden_size, self.vocab_size), ("embed", "vocab"),
            dtype=self.param_dtype, stddev=self.stddev,
        )  # fmt: skip

    def __call__(self) -> Array:
        """The weight [D, W]; `logits` and the chunked loss multiply by it."""
        return self.w


def logits(hidden_BTD: Array, w_DW: Array) -> Array:
    """Hidden state times head weight: [B, T, W] in float32 or wider, products in the dtype of `hidden_BTD`."""
    acc = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    out = jnp.einsum("...d,dw->...w", hidden_BTD, w_DW.astype(hidden_BTD.dtype), preferred_element_type=acc)
    return shard(out, "batch", "length", "act_vocab") if out.ndim == 3 else out
