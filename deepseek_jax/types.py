"""Shapes' legend and the outputs that travel between rooms.

Dimension letters, used as suffixes of local names and in einsums:

    B batch · T query tokens · S key tokens · D model width · N query heads · K key/value heads
    H head dim (P without rope, R with rope, V of the values) · Q query rank · C key/value rank
    F feed-forward width · E experts · X experts per token · G expert groups · L layers · W vocabulary
    M rows of a grouped matmul (its K and N are the inner and outer widths)
"""

import jax
from flax import struct

Array = jax.Array


@struct.dataclass
class RouterStats:
    """What the routers of a stack of L layers did: outputs of the forward pass, never hidden state.

    Padding (segment 0) and positions whose multi-token target lies outside the document are left out everywhere.
    """

    load: Array
    """Float32 [L, E]: token-expert pairs selected by each expert, before any token is dropped."""
    balance_loss: dict[str, Array]
    """Name -> float32 [L, B]: weighted balance loss of each sequence; keys `expert`, `device`, `communication`, `sequence`."""
    entropy: Array
    """Float32 [L]: mean entropy, in nats, of the normalised affinities of a token."""
    dropped: Array
    """Float32 [L]: token-expert pairs dropped for capacity."""
    overflow: Array
    """Float32 [L]: token-expert pairs left out because the shard of their expert had no place for them."""
    valid_sequences: Array
    """Float32 [L, B]: 1 where the sequence holds at least one counted token."""
    experts: Array | None = None
    """Int32 [L, B, T, X]: the experts of every token; in cached inference alone."""


@struct.dataclass
class HiddenOutput:
    """Result of `DeepSeek.hidden`: everything before the output head."""

    hidden: Array
    """[B, T, D], after the final norm, in the compute dtype."""
    mtp_hidden: Array
    """[depth, B, T, D], after each multi-token module's norm; depth 0 where the model has none."""
    router: dict[str, RouterStats]
    """`moe_layers` and `mtp`, like the top level of the router collection; empty for a dense model."""


@struct.dataclass
class ModelOutput:
    """Result of `DeepSeek.__call__`."""

    logits: Array
    """Float32 [B, T, W]; `[:, i]` predicts token i + 1."""
    mtp_logits: Array
    """Float32 [depth, B, T, W]; `[k - 1, :, i]` predicts token i + k + 1."""
    router: dict[str, RouterStats]
    """As in `HiddenOutput`."""
