"""Token embedding and output head; tied where the member ties them."""

import jax.numpy as jnp
from flax import linen as nn

from deepseek_jax.layers.weights import weight
from deepseek_jax.parallel.rules import shard
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
        # The table's parts are put together, in the compute dtype, or else every device would look up all tokens.
        table_WD = shard(self.embedding.astype(self.dtype), "act_vocab", "act_embed")
        x_BTD = jnp.take(table_WD, tokens_BT, axis=0)
        return shard(x_BTD, "batch", "length", "act_embed")


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
