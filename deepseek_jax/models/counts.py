"""Parameters of a member, counted on its abstract variables: no array is made, so the 671B model takes a second."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig, MoE
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import degree


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters."""

    main: int
    """The main model: embedding, layers, norms, head."""
    mtp: int
    """What the multi-token modules add; their embedding and head are the main model's."""
    active: int
    """Main-model parameters that one token passes through, both vocabulary matrices included."""
    active_without_embedding: int
    """The same without the input embedding, of which a token reads one row."""
    router_bias: int
    """Selection biases of the main model, which no gradient touches."""
    mtp_router_bias: int
    """Selection biases of the multi-token modules."""

    @property
    def total(self) -> int:
        """Main model and multi-token modules."""
        return self.main + self.mtp


def abstract_variables(config: ModelConfig) -> Any:
    """Variables of `DeepSeek(config)` as boxed `ShapeDtypeStruct`s: `Weight` leaves carry the logical axes."""
    ambient = jax.sharding.get_abstract_mesh()
    sequences = (
        1 if ambient.empty else ambient.size
    )  # shapes of weights do not depend on them, but a mesh must divide them
    tokens = jax.ShapeDtypeStruct((sequences, 2 * degree("length")), jnp.int32)
    return jax.eval_shape(lambda key, ids: DeepSeek(config).init_boxed(key, ids), jax.random.key(0), tokens)


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_params(config: ModelConfig) -> Counts:
    """Count by abstract evaluation."""
    variables = abstract_variables(config)
    params, router = variables["params"], variables.get("router", {})
    mtp = _size(params.get("mtp", {}))
    main = _size(params) - mtp
    idle = 0
    if isinstance(config.ffn, MoE) and config.num_moe_layers:
        one_expert = 3 * config.hidden_size * config.ffn.moe_intermediate_size
        idle = config.num_moe_layers * one_expert * (config.ffn.n_routed_experts - config.ffn.num_experts_per_tok)
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    mtp_bias = _size(router.get("mtp", {}))
    return Counts(
        main=main,
        mtp=mtp,
        active=main - idle,
        active_without_embedding=main - idle - embedding,
        router_bias=_size(router) - mtp_bias,
        mtp_router_bias=mtp_bias,
    )
