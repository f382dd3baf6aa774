"""Reward models: the backbone with a scalar in place of the vocabulary, read where an answer has ended.

V2 (arXiv 2405.04434, section 4) trains its reward models from the chat model with a pairwise or a pointwise loss; R1
(arXiv 2501.12948) a helpful one from pairs, which looks at the summary alone, and a safety one from labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from deepseek_jax import storage
from deepseek_jax.chat.rows import LeftOut
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ModelConfig, require
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.infer.load import template_of
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.rules import degree, named_sharding
from deepseek_jax.posttrain.begin import abstract_model
from deepseek_jax.posttrain.dpo import correct
from deepseek_jax.posttrain.policy import variables_of
from deepseek_jax.posttrain.preference_batches import Batch
from deepseek_jax.posttrain.preference_data import Answer, Encoder, Reads
from deepseek_jax.posttrain.preference_step import Gradient, PreferenceState, Scores
from deepseek_jax.posttrain.rewards.item import Item
from deepseek_jax.serialize import from_dict
from deepseek_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A judge of answers. R1's: helpful `RewardModel(reads="summary")`, 66K pairs, batch 256, lr 6e-6, 1 epoch, 8192 tokens;
    safety `RewardModel(kind="pointwise")`, 106K labels."""

    kind: Literal["pairwise", "pointwise", "regression"] = "pairwise"
    """What it learns: which of two answers is preferred (Bradley and Terry), the probability that an answer's label is 1,
    or an answer's number."""
    reads: Reads = "all"
    """What it looks at beside the question: the whole answer, or what comes behind its thoughts."""

    def __post_init__(self) -> None:
        kinds = ("pairwise", "pointwise", "regression")
        require(self.kind in kinds, "RewardModel", "kind", self.kind, f"must be one of {', '.join(kinds)}")
        require(self.reads in ("all", "summary"), "RewardModel", "reads", self.reads, "must be 'all' or 'summary'")


def reward_loss(config: RewardModel, score_BA: Array, label_B: Array) -> Array:
    """Loss of each example: float [B].

    Pairwise −log σ(r_chosen − r_rejected); pointwise the cross-entropy of label and σ(r); regression ½ (r − label)².
    """
    if config.kind == "pairwise":
        return -jax.nn.log_sigmoid(score_BA[:, 0] - score_BA[:, 1])
    score_B = score_BA[:, 0]
    if config.kind == "pointwise":
        return -label_B * jax.nn.log_sigmoid(score_B) - (1 - label_B) * jax.nn.log_sigmoid(-score_B)
    return jnp.square(score_B - label_B) / 2


def make_head(config: RewardModel, model: ModelConfig, seed: int) -> dict[str, Array]:
    """`score` [D], normal with variance 1 / (D + 1) (Stiennon et al. 2020); `b_score` [], 0, where no difference cancels it."""
    D, dtype = model.hidden_size, jnp.dtype(model.param_dtype)
    score = jax.random.normal(jax.random.key(seed), (D,), at_least_float32(dtype)) / np.sqrt(D + 1)
    bias = {} if config.kind == "pairwise" else {"b_score": jnp.zeros((), dtype)}
    return {"score": score.astype(dtype), **bias}


def rewards_of(model: DeepSeek, variables: Any, head: dict[str, Array], tokens_RT: Array, last_R: Array) -> Array:
    """Score of each row, read from the state of the token at `last_R`: float32 or wider [R].

    What stands behind that token is not seen from it.
    """
    hidden_RTD = model.apply(variables, tokens_RT, method="hidden").hidden
    state_RD = jnp.take_along_axis(hidden_RTD, last_R[:, None, None], axis=1)[:, 0]
    wide = at_least_float32(state_RD.dtype)
    return state_RD.astype(wide) @ head["score"].astype(wide) + head.get("b_score", jnp.zeros((), wide)).astype(wide)


def _scores(model: DeepSeek, params: Any, router: Any, head: Any, batch: Batch) -> Array:
    tokens = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    scores = rewards_of(model, variables_of(params, router), head, tokens, batch.last.reshape(-1))
    return scores.reshape(batch.last.shape)


@lru_cache(maxsize=16)
def reward_scores(model: DeepSeek) -> Scores:
    """The function `(state, batch) -> {"score": [B, A]}`."""
    return lambda state, batch: {"score": _scores(model, state.params, state.router, state.head, batch)}


@lru_cache(maxsize=16)
def reward_gradient(model: DeepSeek, config: RewardModel) -> Gradient:
    """The function `(state, batch, examples) -> (gradient, metrics)`: shares of a batch of so many, which add up."""

    def gradient(state: PreferenceState, batch: Batch, examples: int) -> tuple[Any, dict[str, Array]]:
        def objective(trained: dict[str, Any]) -> tuple[Array, dict[str, Array]]:
            score_BA = _scores(model, trained["params"], state.router, trained["head"], batch)
            loss = reward_loss(config, score_BA, batch.labels).sum() / examples
            metrics = {"loss": loss, "score": score_BA.mean(axis=1).sum() / examples}
            if config.kind == "pairwise":
                margin_B = score_BA[:, 0] - score_BA[:, 1]
                metrics |= {"margin": margin_B.sum() / examples, "accuracy": correct(margin_B).sum() / examples}
            elif config.kind == "pointwise":
                metrics["accuracy"] = ((score_BA[:, 0] > 0) == (batch.labels > 0.5)).sum() / examples
            return loss, metrics

        return jax.grad(objective, has_aux=True)({"params": state.params, "head": state.head})

    return gradient


@dataclass(frozen=True)
class Judge:
    """A reward model that scores completions; made by `open_reward_model`."""

    config: RewardModel
    encoder: Encoder
    model: DeepSeek
    mesh: Mesh
    score: Callable[[Array, Array], Array]
    """(tokens [R, T], last [R]) -> scores [R], on the mesh."""
    rows: int
    """Completions that are scored at once."""

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """A score each: pairwise r, which has no zero point; pointwise the probability that the label is 1; regression the
        number. A completion that was cut off is scored as if it had ended there. NaN, which a scorer counts as a failure,
        where the conversation is longer than the model's positions, or the template has no place for it."""
        answers = [self._encoded(item) for item in items]
        found = np.full(len(items), np.nan)
        order = sorted((i for i, a in enumerate(answers) if a is not None), key=lambda i: len(_ids(answers[i])))
        for first in range(0, len(order), self.rows):
            part = order[first : first + self.rows]
            longest = len(_ids(answers[part[-1]]))
            # Few lengths, so that few programs are compiled.
            T = min(max(64, 1 << (longest - 1).bit_length()), self.model.config.max_position_embeddings)
            tokens, last = (
                np.full((self.rows, T), self.encoder.tokenizer.pad_id, np.int32),
                np.zeros(self.rows, np.int32),
            )
            for row, i in enumerate(part):
                ids = _ids(answers[i])
                tokens[row, : len(ids)], last[row] = ids, len(ids) - 1
            with use_mesh(self.mesh):
                placed = (
                    jax.device_put(x, named_sharding(self.mesh, ("batch", "none")[: x.ndim], x.shape, "completions"))
                    for x in (tokens, last)
                )
                found[part] = np.asarray(self.score(*placed))[: len(part)]
        if self.config.kind == "pointwise":
            found = np.exp(-np.logaddexp(0, -found))
        return found.tolist()

    def _encoded(self, item: Item) -> Answer | None:
        answer = {"role": "assistant", "content": item.completion}
        try:
            encoded = self.encoder([{"role": "user", "content": item.problem.prompt}], answer)
        except (LeftOut, ValueError):
            return None
        return encoded if len(encoded.ids) <= self.model.config.max_position_embeddings else None


def _ids(answer: Answer | None) -> np.ndarray:
    assert answer is not None
    return answer.ids


def open_reward_model(path: str | os.PathLike[str], mesh: Mesh | None = None, *, rows: int = 8) -> Judge:
    """The reward model that `dsj.prefer` trained, from its last good checkpoint: what `rewards.ModelReward` asks.

    Args:
        path: its run folder.
        mesh: where it computes, in shards; None: on the first device.
        rows: completions that are scored at once, at least.

    Raises: ValueError for a folder that is not a reward model's run, or has no checkpoint yet.
    """
    folder = storage.path(path)
    manifest = folder / "manifest.json"
    config = json.loads(manifest.read_text(encoding="utf-8"))["config"] if manifest.exists() else {}
    learn = config.get("prefer", {}).get("learn", {})
    if learn.get("type") != "RewardModel":
        what = "no run folder" if not manifest.exists() else "the run of another kind of model"
        raise ValueError(f"{folder} is {what}: give the folder of a run of prefer with learn=RewardModel(…)")
    kind = from_dict(RewardModel, {name: value for name, value in learn.items() if name != "type"})
    model = from_dict(ModelConfig, config["model"])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    tokenizer = load_tokenizer(folder)
    with use_mesh(mesh):
        head = jax.eval_shape(lambda: make_head(kind, model, 0))
        replicated = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=named_sharding(mesh, ("none",) * x.ndim, x.shape)
            ),
            head,
        )
        with Store(folder / "checkpoints", read_only=True) as store:
            step = store.latest_good()
            if step is None:
                raise ValueError(f"{folder} has no checkpoint yet: let the run reach its first one")
            state, _ = store.restore_params({**abstract_model(model, mesh), "head": replicated}, step)
        head = state.pop("head")
        split = degree("batch")
    module = DeepSeek(model)
    score = jax.jit(lambda *arrays: rewards_of(module, *arrays), out_shardings=named_sharding(mesh, ("none",), (1,)))
    encoder = Encoder(tokenizer, template_of(folder, tokenizer), kind.reads)
    return Judge(
        kind, encoder, module, mesh, lambda tokens, last: score(state, head, tokens, last), -(-rows // split) * split
    )
