"""The model: embedding, leading dense layers, MoE layers, final norm, head, multi-token prediction modules."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from deepseek_jax.config import GQA, ModelConfig, MoE
from deepseek_jax.layers.balance import exempt_sequences
from deepseek_jax.layers.context import Context, valid_after_shift
from deepseek_jax.layers.embedding import Embedding, Head, logits
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.rope import rope_tables
from deepseek_jax.models.block import Block, stacked
from deepseek_jax.models.mtp import MTPModule
from deepseek_jax.models.pipelined import pipelined_stack
from deepseek_jax.parallel.pipeline import Pipeline, stages_of_mesh
from deepseek_jax.parallel.ring import check_length, natural, zigzag
from deepseek_jax.parallel.rules import degree, unbox
from deepseek_jax.types import Array, HiddenOutput, ModelOutput, RouterStats


class Entry(NamedTuple):
    """What comes before the long stack of layers, and what `DeepSeek.leave` reads besides their result."""

    x: Array
    """[B, T, D], what comes into the stack."""
    context: Context
    following: Array | None
    """[depth, B, T, D], embeddings of the tokens k places on; None where there are no multi-token modules."""
    valid: Array | None
    """Bool [depth, B, T]: places with a target at that depth."""


class DeepSeek(nn.Module):
    """Any member of the family.

    `init(key, tokens)` gives `{"params": …}` and, for V3-style gates, `{"router": …}`: the selection biases, which
    `apply` only reads. Positions whose target lies past the end of the sequence or document have logits that mean
    nothing.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        kwargs: dict[str, Any] = dict(param_dtype=c.param_dtype, stddev=c.initializer_range)
        self.embed = Embedding(c.vocab_size, c.hidden_size, c.dtype, **kwargs)
        if c.num_dense_layers:
            self.dense_layers = stacked(Block, c, c.num_dense_layers, (nn.broadcast,))(c, moe=False)
        if c.num_moe_layers:
            # The context, no cache, and each layer's own of the recorded experts [B, T, L, X].
            in_axes = (nn.broadcast, nn.broadcast, 2)
            self.moe_layers = stacked(Block, c, c.num_moe_layers, in_axes)(c, moe=True)
        self.final_norm = RMSNorm(c.rms_norm_eps, c.param_dtype)
        if not c.tie_word_embeddings:
            self.head_weight = Head(c.vocab_size, c.hidden_size, name="head", **kwargs)
        if c.num_nextn_predict_layers:
            self.mtp = stacked(MTPModule, c, c.num_nextn_predict_layers, (0, 0, nn.broadcast))(c)

    if TYPE_CHECKING:  # linen's own annotation allows for a tuple, which only `mutable` gives

        def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """linen's `init`, with plain arrays for leaves; `init_boxed` keeps the logical axes."""
        return unbox(self.init_boxed(*args, **kwargs))

    @nn.nowrap
    def init_boxed(self, *args: Any, **kwargs: Any) -> Any:
        """Variables whose leaves are `Weight` boxes with the logical axes of their dims."""
        return super().init(*args, **kwargs)

    def __call__(
        self, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None, train: bool = False
    ) -> ModelOutput:
        """Logits of every position, of the main model and of each multi-token module.

        Args:
            tokens: integer [B, T] ids.
            positions: int32 [B, T] for rope; 0 … T − 1 by default.
            segment_ids: int32 [B, T]; a token sees its own segment alone, 0 is padding. None: one document a row.
            train: apply what only training does (V2's token dropping).

        Raises:
            ValueError: arguments of the wrong shape or dtype.
        """
        out = self.hidden(tokens, positions, segment_ids, train)
        return ModelOutput(
            logits=self.head(out.hidden),
            mtp_logits=jax.vmap(self.head)(out.mtp_hidden) if len(out.mtp_hidden) else self._no_depth(tokens),
            router=out.router,
        )

    def hidden(
        self, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None, train: bool = False,
        experts: Array | None = None, zigzag_out: bool = False, pipeline: Pipeline | None = None,
    ) -> HiddenOutput:  # fmt: skip
        """Everything before the head; arguments as in `__call__`, and three more.

        `experts`: integer [B, T, L, X], as the engine records them (`Generation.experts`): each token's experts in each of
        the L MoE layers, in place of the routers' choice; gate weights and their gradients are the present router's. A
        token with a −1 in a layer chooses there itself. Multi-token modules always choose.

        `zigzag_out`: where the mesh splits sequences, leave the states in the order of `parallel.ring.zigzag`, in which they
        are computed; whoever compares them with targets puts these in order instead.

        `pipeline`: runs the MoE layers (without any, the dense ones) as a pipeline where the ambient mesh has stages; not
        with `experts`.
        """
        c = self.config
        if experts is not None:
            experts = self._recorded(experts, tokens)
        entry, router = self.enter(tokens, positions, segment_ids, train), {}
        x_BTD = entry.x
        if pipeline is not None and stages_of_mesh() > 1:
            x_BTD, router = self._pipelined(pipeline, x_BTD, entry.context, experts)
        elif c.num_moe_layers:
            x_BTD, (router["moe_layers"], _) = self.moe_layers(x_BTD, entry.context, None, experts)
        elif c.num_dense_layers:
            x_BTD, _ = self.dense_layers(x_BTD, entry.context)
        out = self.leave(entry._replace(x=x_BTD))
        hidden_BTD, mtp_hidden = out.hidden, out.mtp_hidden
        if not zigzag_out:
            hidden_BTD = natural(hidden_BTD, "batch", "length", "act_embed")
            if c.num_nextn_predict_layers:
                mtp_hidden = natural(mtp_hidden, "none", "batch", "length", "act_embed")
        return HiddenOutput(hidden=hidden_BTD, mtp_hidden=mtp_hidden, router={**router, **out.router})

    def enter(
        self, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None, train: bool = False
    ) -> Entry:
        """What comes before the long stack of layers, the MoE layers (without any, the dense ones): embeddings, a MoE
        model's leading dense layers. Arguments as in `__call__`."""
        c = self.config
        context = self._context(tokens, positions, segment_ids, train)
        x_BTD = self.embed(_split(tokens))
        if c.num_dense_layers and c.num_moe_layers:
            x_BTD, _ = self.dense_layers(x_BTD, context)
        if not c.num_nextn_predict_layers:
            return Entry(x_BTD, context, None, None)
        shifts = range(1, c.num_nextn_predict_layers + 1)
        # Ids are shifted, not embeddings: those of the next shard's tokens would have to be sent.
        following = jnp.stack([self.embed(_split(jnp.roll(tokens, -k, axis=1))) for k in shifts])
        present = _present(tokens, segment_ids)
        valid = jnp.stack([_split(valid_after_shift(present, segment_ids, k)) for k in shifts])
        return Entry(x_BTD, context, following, valid)

    def leave(self, entry: Entry) -> HiddenOutput:
        """What comes after the stack, `entry.x` being its result: final norm, multi-token modules. The statistics are those
        of the latter; places are in the order of `parallel.ring.zigzag`."""
        hidden_BTD = self.final_norm(entry.x)
        if not self.config.num_nextn_predict_layers:
            nothing = jnp.zeros((0, *hidden_BTD.shape), hidden_BTD.dtype)
            return HiddenOutput(hidden=hidden_BTD, mtp_hidden=nothing, router={})
        _, (mtp_hidden, stats, _) = self.mtp(hidden_BTD, entry.following, entry.valid, entry.context)
        router = {} if stats is None else {"mtp": stats}
        return HiddenOutput(hidden=hidden_BTD, mtp_hidden=mtp_hidden, router=router)

    def begin(self, tokens: Array, positions: Array, fresh: bool) -> tuple[Array, Context]:
        """What comes before the layers in cached inference (models/cached.py): embedded tokens, and the layers' context."""
        if degree("length") > 1:
            raise ValueError(
                f"MeshConfig.context = {degree('length')}: inference with caches splits no sequence, make it 1 and raise "
                f"data, fsdp or tensor"
            )
        context = self._context(tokens, positions, None, False)
        return self.embed(tokens), replace(context, positions=positions, fresh=fresh)

    def finish(self, x: Array) -> Array:
        """What comes after the layers: the final norm."""
        return self.final_norm(x)

    def head(self, hidden: Array) -> Array:
        """Logits of a hidden state: [B, T, D] -> float32 [B, T, W]."""
        return logits(hidden, self.head_kernel())

    def head_kernel(self) -> Array:
        """The head's weight [D, W], for losses that multiply by it in chunks."""
        return self.embed.embedding.T if self.config.tie_word_embeddings else self.head_weight()

    def _pipelined(
        self, pipeline: Pipeline, x: Array, context: Context, experts: Array | None
    ) -> tuple[Array, dict[str, RouterStats]]:
        if experts is not None:
            raise ValueError(f"{pipeline} with recorded experts is not built: leave the pipeline out")
        if not self.config.num_moe_layers:
            x, _ = pipelined_stack(self.config, pipeline, self.dense_layers.variables, x, context, moe=False)
            return x, {}
        x, stats = pipelined_stack(self.config, pipeline, self.moe_layers.variables, x, context, moe=True)
        assert stats is not None
        return x, {"moe_layers": stats}

    def _recorded(self, experts: Array, tokens: Array) -> Array:
        c = self.config
        if not isinstance(c.ffn, MoE):
            raise ValueError(f"experts = {experts.dtype} {experts.shape}: {c.name} has none")
        shape = (*tokens.shape, c.num_moe_layers, c.ffn.num_experts_per_tok)
        if experts.shape != shape or not jnp.issubdtype(experts.dtype, jnp.signedinteger):
            raise ValueError(f"experts must be signed integers {shape}, not {experts.dtype} {experts.shape}")
        return zigzag(experts, "batch", "length", "none", "none")

    def _no_depth(self, tokens: Array) -> Array:
        return jnp.zeros((0, *tokens.shape, self.config.vocab_size), jnp.promote_types(self.config.dtype, jnp.float32))

    def _context(self, tokens: Array, positions: Array | None, segment_ids: Array | None, train: bool) -> Context:
        c = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, T], not {tokens.dtype} {tokens.shape}")
        for name, given in (("positions", positions), ("segment_ids", segment_ids)):
            if given is not None and (given.shape != tokens.shape or not jnp.issubdtype(given.dtype, jnp.integer)):
                raise ValueError(f"{name} must be integers {tokens.shape} like tokens, not {given.dtype} {given.shape}")
        if tokens.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"sequence of {tokens.shape[1]} tokens is longer than {c.name}'s "
                f"max_position_embeddings = {c.max_position_embeddings}"
            )
        check_length(tokens.shape[1], degree("length"), "tokens of a sequence")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        rotated = c.attention.head_dim if isinstance(c.attention, GQA) else c.attention.qk_rope_head_dim
        cos, sin = rope_tables(c.rope, rotated, _split(positions), c.dtype)
        exempt = None
        if train and isinstance(c.ffn, MoE) and c.ffn.capacity_factor is not None:
            exempt = exempt_sequences(tokens, c.ffn.capacity_exempt_share)
        return Context(
            cos=cos,
            sin=sin,
            segment_ids=None if segment_ids is None else _split(segment_ids),
            valid=_split(_present(tokens, segment_ids)),
            exempt=exempt,
        )


def _split(x_BT: Array) -> Array:
    """[B, T] as the layers see it: each device's sequences, and its part of them."""
    return zigzag(x_BT, "batch", "length")


def _present(tokens: Array, segment_ids: Array | None) -> Array:
    """Bool [B, T]: what is not padding."""
    return jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0


__all__ = ["DeepSeek", "HiddenOutput", "ModelOutput", "RouterStats"]
