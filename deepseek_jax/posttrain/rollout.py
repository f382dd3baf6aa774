"""From what the engine generated to what an update takes, and the guard that both have the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax.infer.requests import Generation
from deepseek_jax.models.cached import LayerWeights, unstack
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.mesh import use_mesh
from deepseek_jax.posttrain.policy import Rollouts
from deepseek_jax.types import Array


def pack(
    prompts: Sequence[Sequence[int]], generations: Sequence[Generation], advantages: Any, length: int, pad_id: int = 0
) -> Rollouts:
    """Rows of one completion each, padded behind it; with experts and token sets where the engine recorded them. Arrays are
    numpy's.

    Args:
        prompts: token ids of each completion's prompt.
        generations: the completions, ended.
        advantages: float [B], or [B, T].
        length: T: places of a row; prompt and completion have at most one more token.
        pad_id: what padding is; it may be the end token, since the mask does not look at ids.

    Raises: ValueError for a row that does not fit, a completion that has not ended, an empty prompt, or a record that
        some completions have and others lack.
    """
    B = len(generations)
    if len(prompts) != B:
        raise ValueError(f"{len(prompts)} prompts for {B} completions")
    tokens = np.full((B, length + 1), pad_id, np.int32)
    mask = np.zeros((B, length), bool)
    sampler = np.zeros((B, length), np.float32)
    for i, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
        begin, end = len(prompt), len(prompt) + len(generation.tokens)
        if generation.finish_reason not in ("stop", "length"):
            raise ValueError(f"completion {i} has not ended: finish_reason = {generation.finish_reason!r}")
        if not begin:
            raise ValueError(f"prompt {i} is empty: its first token would have no place to be predicted at")
        if end > length + 1:
            raise ValueError(f"completion {i} has {end} tokens with its prompt, more than length + 1 = {length + 1}")
        tokens[i, :end] = [*prompt, *generation.tokens]
        mask[i, begin - 1 : end - 1] = True
        sampler[i, begin - 1 : end - 1] = generation.sampled_logprobs
    arrays: Any = dict(  # numpy's: an update places them
        tokens=tokens,
        mask=mask,
        advantages=np.asarray(advantages, np.float32).reshape(B, -1),
        sampler_logprobs=sampler,
        # Place i of both is of the pass over token i: its experts, and the set that token i + 1 came from.
        experts=_records("experts", [g.experts for g in generations], [0] * B, length, -1),
        kept=_records("kept", [g.kept for g in generations], [len(prompt) - 1 for prompt in prompts], length, 0),
    )
    return Rollouts(**arrays)


def _records(name: str, rows: list[Any], begins: list[int], length: int, fill: int) -> np.ndarray | None:
    """Recorded arrays [n, …] as one [B, length, …], each from its place on; None where there are none."""
    if all(row is None for row in rows):
        return None
    if lacking := [i for i, row in enumerate(rows) if row is None]:
        raise ValueError(f"completion {lacking[0]} has no {name}, which others have: record them of all or of none")
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, rows[0].dtype)
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        out[i, begin : begin + len(row)] = row
    return out


def checksum(weights: LayerWeights) -> dict[str, int]:
    """A number for each leaf of an engine's weights, by its path: the sum of its bits, modulo 2³².

    The same weights have the same numbers in whatever layout.
    """
    return _named(_bits(weights))


def require_same(model: DeepSeek, variables: Any, weights: LayerWeights, mesh: Mesh | None = None) -> None:
    """Raises ValueError, naming leaves, where a sampler's weights are not the trainer's: stale, zeroed or missing.

    Args:
        model: the model.
        variables: of the trainer.
        weights: of the sampler: what `unstack` made of some variables.
        mesh: that `weights` lie on, where it is not the ambient one.
    """
    ours = _named(_bits_unstacked(model, weights.looped, variables))
    with use_mesh(mesh):
        theirs = checksum(weights)
    if missing := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"the sampler and the trainer differ in their leaves: {', '.join(missing[:5])}")
    if stale := [name for name in ours if ours[name] != theirs[name]]:
        raise ValueError(
            f"{len(stale)} of {len(ours)} leaves of the sampler are not the trainer's, {', '.join(stale[:3])} among them: "
            f"give the sampler the new weights before it generates"
        )


def _named(bits: Any) -> dict[str, int]:
    return {jax.tree_util.keystr(path): int(x) for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(bits))}


@jax.jit
def _bits(tree: Any) -> Any:
    def one(leaf: Array) -> Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
        return jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(one, tree)


@partial(jax.jit, static_argnums=(0, 1))
def _bits_unstacked(model: DeepSeek, looped: bool, variables: Any) -> Any:
    return _bits(unstack(model, variables, looped=looped))
