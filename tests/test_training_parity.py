"""Loss, gradient, optimizer and schedule against tests/literal: the formulas written out, differentiated by stepping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro
from helpers import run_config as dsj_run
from literal.model import run
from literal.training import adamw_step, balance_loss, clipped, main_loss, mtp_loss, multi_step_rate, shifted_loss
from parity import random_variables, relative
from test_parity import PACKED, V2_TRAINING, V3_TRAINING

import deepseek_jax as dsj
from deepseek_jax.data.config import DataConfig
from deepseek_jax.training.config import AdamW
from deepseek_jax.training.loss import loss_parts, make_totals
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedule import MultiStep, rates

WEIGHT = 0.3


def batch_of(config: dsj.ModelConfig) -> dict[str, np.ndarray]:
    """Packed documents with padding, and tokens that are not to be learned."""
    draw = np.random.default_rng(21)
    return {
        "tokens": draw.integers(0, config.vocab_size, PACKED.shape, dtype=np.int32),
        "segment_ids": PACKED,
        "loss_mask": (draw.random(PACKED.shape) < 0.8).astype(np.int32),
    }


def literal_objective(config: dsj.ModelConfig, variables, batch) -> tuple[float, float, list[float], float]:
    """Total, main, multi-token loss of every depth, balance."""
    tokens, segments, mask = batch["tokens"], batch["segment_ids"], batch["loss_mask"]
    out = run(config, variables, tokens[:, :-1], segment_ids=segments[:, :-1])
    depth = config.num_nextn_predict_layers
    main = main_loss(out.logits, tokens, segments, mask)
    mtp = [shifted_loss(out.mtp_logits[k - 1], tokens, k + 1, segments, mask) for k in range(1, depth + 1)]
    balance = balance_loss(out.router)
    total = main + balance + (mtp_loss(out.mtp_logits, tokens, WEIGHT, segments, mask) if depth else 0.0)
    return total, main, mtp, balance


def our_objective(config: dsj.ModelConfig, batch):
    """(params, router) -> total and parts, by the library."""
    run_config = dsj.RunConfig(
        model=config, schedule=MultiStep(peak=1e-3), steps=10, batch_size=4, seq_len=PACKED.shape[1] - 1,
        mtp_loss_weight=WEIGHT, loss_chunk=5, data=DataConfig(vocab_size=config.vocab_size),
    )  # fmt: skip
    depth = config.num_nextn_predict_layers

    def objective(params, router):
        totals = make_totals(batch, depth, jnp.float64)
        return loss_parts(run_config, params, router, batch, totals, WEIGHT, train=False)

    return objective


@pytest.mark.parametrize(
    "config",
    [V2_TRAINING, V3_TRAINING],
    ids=lambda config: config.name,
)
def test_loss_and_gradient_equal_the_literal_model(config):
    """Value of every part, and the derivative along a direction in each kind of parameter, by central differences."""
    config = dataclasses.replace(config, vocab_size=260, dtype="float64", param_dtype="float64")
    batch, variables = batch_of(config), random_variables(config, 31)
    total, main, mtp, balance = literal_objective(config, variables, batch)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, variables["params"])
        router = jax.tree.map(jnp.asarray, variables.get("router", {}))
        step = jax.jit(jax.value_and_grad(our_objective(config, batch), has_aux=True))
        (our_total, parts), gradient = step(params, router)
        gradient = jax.tree.map(np.asarray, gradient)
    assert relative(parts.main, np.float64(main)) < 1e-10
    assert relative(parts.mtp, np.array(mtp)) < 1e-10
    assert relative(parts.balance, np.float64(balance)) < 1e-10
    assert relative(our_total, np.float64(total)) < 1e-10

    draw, size = np.random.default_rng(41), 1e-6
    slopes = dict(jax.tree_util.tree_leaves_with_path(gradient))
    groups: dict[str, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        groups.setdefault(kind_of([entry.key for entry in path]), []).append((path, leaf, leaf.copy()))
    assert set(groups) >= {"embedding and head", "norms", "attention", "router", "feed-forward"}
    for kind, leaves in groups.items():
        directions = [draw.normal(size=leaf.shape) / np.sqrt(leaf.size) for _, leaf, _ in leaves]
        at = []
        for sign in (1, -1):
            for (_, leaf, original), direction in zip(leaves, directions, strict=True):
                leaf[...] = original + sign * size * direction
            at.append(literal_objective(config, variables, batch)[0])
        for _, leaf, original in leaves:
            leaf[...] = original
        ours = sum((slopes[path] * direction).sum() for (path, _, _), direction in zip(leaves, directions, strict=True))
        assert ours == pytest.approx((at[0] - at[1]) / (2 * size), rel=2e-5, abs=1e-8), kind


def kind_of(names: list[str]) -> str:
    """Parameters that are moved together, so that a few runs of the literal model check every gradient."""
    if names[-1] == "scale":
        return "norms"
    if names[0] in ("embed", "head"):
        return "embedding and head"
    for name, kind in (("attention", "attention"), ("router", "router"), ("ffn", "feed-forward")):
        if name in names:
            return kind
    return names[-1]


def test_optimizer_equals_the_literal_one():
    """Clipping by the norm of all gradients, Adam, decay that is decoupled and spares norms and biases."""
    config, schedule, steps = AdamW(clip_norm=0.7), MultiStep(peak=3e-2, warmup_steps=2), 8
    table = rates(dsj_run(micro("llm"), schedule=schedule, steps=steps))[:, 0]
    draw = np.random.default_rng(51)
    params = {
        "attention": {"w_q": draw.normal(size=(3, 4)), "b_q": draw.normal(size=4)},
        "norm": {"scale": draw.normal(size=3)},
        "head": {"w": draw.normal(size=(4, 2))},
    }
    decay = {"w_q": 0.1, "b_q": 0.0, "scale": 0.0, "w": 0.1}
    flat = [(path[-1].key, leaf.copy()) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    moments = [(np.zeros_like(leaf), np.zeros_like(leaf)) for _, leaf in flat]
    with jax.enable_x64(True):
        optimizer = make_optimizer(config, lambda step: jnp.asarray(table)[step])
        ours = jax.tree.map(jnp.asarray, params)
        state = optimizer.init(ours)
        for step in range(steps):
            gradients = [draw.normal(0, 0.1 if step % 2 else 1.0, size=leaf.shape) for _, leaf in flat]
            updates, state = optimizer.update(
                jax.tree.unflatten(jax.tree.structure(params), map(jnp.asarray, gradients)), state, ours
            )
            ours = jax.tree.map(jnp.add, ours, updates)
            gradients, _ = clipped(gradients, 0.7)
            rate = multi_step_rate(step, 3e-2, 2, steps, ((0.8, 0.316), (0.9, 0.1)))
            for n, (name, leaf) in enumerate(flat):
                new, *moments[n] = adamw_step(
                    leaf, gradients[n], *moments[n], step + 1, rate, 0.9, 0.95, 1e-8, decay[name]
                )
                flat[n] = (name, new)
            for (name, expected), leaf in zip(flat, jax.tree.leaves(ours), strict=True):
                np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=f"{name} after step {step}")


def test_schedule_equals_the_literal_one():
    schedule = MultiStep(peak=4.2e-4, warmup_steps=20)
    table = rates(dsj_run(micro("llm"), schedule=schedule, steps=200))[:, 0]
    for step in range(200):
        expected = multi_step_rate(step, 4.2e-4, 20, 200, ((0.8, 0.316), (0.9, 0.1)))
        assert table[step] == pytest.approx(expected, rel=1e-12), step
    assert multi_step_rate(19, 4.2e-4, 20, 200, ()) == 4.2e-4
    assert multi_step_rate(0, 4.2e-4, 0, 200, ()) == 4.2e-4
