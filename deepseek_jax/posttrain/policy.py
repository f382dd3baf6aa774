"""The policy's own log-probabilities, and one update from rewards: the trainer's side of GRPO."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh

from deepseek_jax.config import ModelConfig
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import sharded_shapes
from deepseek_jax.posttrain.objective import PolicyLoss, PolicyMetrics, policy_loss
from deepseek_jax.posttrain.update import applied, summed
from deepseek_jax.training.config import AdamW
from deepseek_jax.training.loss import cross_entropy_sum, from_chunks, in_chunks, kept_logits
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.types import Array


@struct.dataclass
class Rollouts:
    """Completions, a row each, in the shape that an update takes."""

    tokens: Array
    """Int32 [B, T + 1]: prompt, completion, padding."""
    mask: Array
    """Bool [B, T]: place i counts where token i + 1 was sampled by the policy; made while sampling, never from ids."""
    advantages: Array
    """Float [B, T], or [B, 1] where a completion has one."""
    sampler_logprobs: Array
    """Float [B, T]: as the sampler reported, of the distribution that was sampled from."""
    old_logprobs: Array | None = None
    """Float [B, T]: under the policy that is updated from, by the trainer; None: it is the present one."""
    experts: Array | None = None
    """Int16 [B, T, L, X]: those that the sampler ran, −1 in padding (V3.2, keep routing); None: the trainer chooses."""
    kept: Array | None = None
    """Uint8 [B, T, ⌈W / 8⌉]: what top_p, top_k and min_p left to draw from, a bit a token, none in prompt and padding (V3.2,
    keep sampling mask); None: all tokens."""


@struct.dataclass
class PolicyState:
    """What training carries from update to update."""

    step: Array
    """Int32: updates applied."""
    params: Any
    router: Any
    """Selection biases, which reinforcement learning leaves as they are; `{}` where the model has none."""
    opt_state: Any
    reference: Any
    """Parameters that the divergence is measured from; `{}` where the objective has none."""


def variables_of(params: Any, router: Any) -> dict[str, Any]:
    """What `model.apply` takes."""
    return {"params": params, **({"router": router} if router else {})}


def token_logprobs(
    model: DeepSeek, variables: Any, tokens_BT1: Array, temperature: float = 1.0, chunk: int = 512, *,
    experts: Array | None = None, kept: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Log-probability of each token after the first, and entropy before it: [B, T] each, nats, float32 or wider.

    Under the distribution at `temperature`, of the whole vocabulary or of what is `kept` of it, with the routers' choices
    or with `experts`, as in `Rollouts`. The logits of at most `chunk` places of a sequence exist at once. Not for
    gradients: `make_update` has them.
    """
    hidden_BTD = _hidden(model, variables, tokens_BT1, temperature, experts)
    return _logprobs(hidden_BTD, model.apply(variables, method="head_kernel"), tokens_BT1[:, 1:], chunk, kept)


@lru_cache(maxsize=16)
def make_logprobs(model: DeepSeek, temperature: float, chunk: int) -> Any:
    """`token_logprobs` jitted: (variables, rollouts) -> log-probabilities and entropies."""

    @jax.jit
    def logprobs(variables: Any, rollouts: Rollouts) -> tuple[Array, Array]:
        return token_logprobs(
            model, variables, rollouts.tokens, temperature, chunk, experts=rollouts.experts, kept=rollouts.kept
        )

    return logprobs


def _hidden(model: DeepSeek, variables: Any, tokens_BT1: Array, temperature: float, experts: Array | None) -> Array:
    # Padding stands behind the completion, where no counted token sees it.
    hidden = model.apply(variables, tokens_BT1[:, :-1], experts=experts, method="hidden").hidden
    return hidden if temperature == 1 else (hidden / temperature).astype(hidden.dtype)


def _logprobs(hidden_BTD: Array, w_DW: Array, targets_BT: Array, chunk: int, kept: Array | None) -> tuple[Array, Array]:
    wide = at_least_float32(hidden_BTD.dtype)

    def one(piece: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        hidden, targets, kept = piece
        logits = jnp.einsum("btd,dw->btw", hidden, w_DW.astype(hidden.dtype), preferred_element_type=wide)
        logp = jax.nn.log_softmax(kept_logits(logits, kept), axis=-1)
        entropy = -(jnp.exp(logp) * jnp.where(logp == -jnp.inf, 0, logp)).sum(axis=-1)
        return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0], entropy

    parts = jax.tree.map(partial(in_chunks, chunk=chunk), (hidden_BTD, targets_BT, kept))
    return jax.tree.map(partial(from_chunks, places=targets_BT.shape[1]), lax.map(one, parts))


def init_policy(optimizer: AdamW, variables: Any, *, reference: bool) -> PolicyState:
    """The state of training that begins with these variables, which it takes a copy of; the reference is a copy too."""

    def copied(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)

    params = copied(variables["params"])
    return PolicyState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        router=copied(variables.get("router", {})),
        opt_state=make_optimizer(optimizer, lambda step: jnp.zeros(())).init(params),
        reference=copied(params) if reference else {},
    )


def abstract_policy(model: ModelConfig, optimizer: AdamW, mesh: Mesh, *, reference: bool) -> PolicyState:
    """`init_policy`'s state as `ShapeDtypeStruct`s with their shardings on a mesh."""
    make = partial(init_policy, optimizer, reference=reference)
    return sharded_shapes(mesh, jax.eval_shape(make, abstract_variables(model)))


def begin_policy(optimizer: AdamW, variables: Any, shapes: PolicyState, *, reference: bool) -> PolicyState:
    """`init_policy`'s state in the shards of `shapes`, which `abstract_policy` gave."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return jax.jit(partial(init_policy, optimizer, reference=reference), out_shardings=shardings)(variables)


Update = Callable[[PolicyState, Rollouts, Array], tuple[PolicyState, dict[str, Any]]]


@lru_cache(maxsize=16)
def make_update(
    model: DeepSeek, loss: PolicyLoss, optimizer: AdamW, *, temperature: float = 1.0, chunk: int = 512, pieces: int = 1
) -> Update:
    """The jitted function `(state, rollouts, learning rate) -> (state, metrics)` of one update on the policy.

    Without `Rollouts.old_logprobs` the policy is updated from itself: π_old is the state's own parameters, so the ratio
    is 1 and the gradient is that of the advantages. The state's memory is reused.

    `Rollouts.experts` route the policy; the reference chooses its own. `Rollouts.kept` narrows both: a divergence is
    between distributions of the same tokens, and the entropy is that of the narrowed one.

    Args:
        model: the model.
        loss: the objective.
        optimizer: its constants.
        temperature: that the rollouts were sampled at.
        chunk: places of a sequence whose logits exist at once.
        pieces: in how many the rollouts are worked off, one after the other; the update does not depend on it.
    """

    @partial(jax.jit, donate_argnums=0)
    def update(state: PolicyState, rollouts: Rollouts, learning_rate: Array) -> tuple[PolicyState, dict[str, Any]]:
        mask = rollouts.mask
        completions = jnp.maximum(mask.any(axis=1).sum(), 1)
        count = jnp.maximum(mask.sum(), 1)

        def piece(part: Rollouts) -> tuple[Any, dict[str, Array]]:
            reference = None
            if loss.kl:
                reference, _ = token_logprobs(
                    model, variables_of(state.reference, state.router), part.tokens, temperature, chunk, kept=part.kept
                )

            def objective(params: Any) -> tuple[Array, tuple[Array, PolicyMetrics, Array, Array]]:
                variables = variables_of(params, state.router)
                hidden = _hidden(model, variables, part.tokens, temperature, part.experts)
                w_DW, targets = model.apply(variables, method="head_kernel"), part.tokens[:, 1:]
                logp, entropy = lax.stop_gradient(_logprobs(hidden, w_DW, targets, chunk, part.kept))

                def of_logp(x: Array) -> tuple[Array, PolicyMetrics]:
                    return policy_loss(
                        loss, x, logp if part.old_logprobs is None else part.old_logprobs, part.advantages, part.mask,
                        reference, part.sampler_logprobs,
                        completions=completions, tokens=count,
                    )  # fmt: skip

                (value, metrics), slope = jax.value_and_grad(of_logp, has_aux=True)(logp)
                # The chain rule by hand: Σ slope · log p has the loss's gradient, and its logits exist in chunks alone.
                total = cross_entropy_sum(hidden, w_DW, targets, -slope, chunk, part.kept)
                return total, (value, metrics, logp, entropy)

            grads, (value, metrics, logp, entropy) = jax.grad(objective, has_aux=True)(state.params)
            before = logp if part.old_logprobs is None else part.old_logprobs  # what is learned meanwhile is no drift
            drift = jnp.where(part.mask, jnp.abs(before - part.sampler_logprobs), 0)
            share = part.mask.sum() / count  # of the tokens, for means over tokens
            rows = part.mask.any(axis=1).sum() / completions
            of_rows = rows if loss.ratio == "sequence" else share
            return grads, {
                "loss": value,
                "entropy": jnp.where(part.mask, entropy, 0).sum() / count,
                "kl": metrics.kl * share,
                "ratio": metrics.ratio * of_rows,
                "clipped_low": metrics.clipped_low * of_rows,
                "clipped_high": metrics.clipped_high * of_rows,
                "off_policy_masked": metrics.masked * rows,
                "sampler_drift_mean": drift.sum() / count,
                "sampler_drift_max": drift.max(),
            }

        grads, metrics = summed(piece, rollouts, pieces, largest=("sampler_drift_max",))
        return applied(optimizer, state, state.params, grads, metrics, learning_rate, lambda params: {"params": params})

    return update
