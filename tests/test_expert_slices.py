"""Experts of several slices: a token crosses once for each slice with experts of its own, and the sums are one device's."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro
from marks import needs_8, study
from spread import assert_experts_equal_one_device

import deepseek_jax as dsj
from deepseek_jax.config import MoE
from deepseek_jax.layers.expert_parallel import Exchange, parallel_experts
from deepseek_jax.layers.expert_slices import plan_slices, slices_of_token
from deepseek_jax.layers.experts import routed_experts
from deepseek_jax.layers.router import select_experts
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.rules import named_sharding, tree_shardings
from deepseek_jax.planner.advice import changes

B, T, D, F, E, X = 8, 8, 16, 8, 16, 4

pytestmark = needs_8


def routes(seed: int, n_group: int, topk_group: int, tokens: int = B * T) -> np.ndarray:
    """[tokens, X]: V3's choice by random scores."""
    gate = MoE(
        intermediate_size=0, moe_intermediate_size=F, n_routed_experts=E, n_shared_experts=0, num_experts_per_tok=X,
        first_k_dense_replace=0, scoring_func="sigmoid", topk_method="noaux_tc", n_group=n_group, topk_group=topk_group,
    )  # fmt: skip
    scores = jnp.asarray(np.random.default_rng(seed).random((1, tokens, E)))
    return np.asarray(select_experts(scores, None, gate))[0]


def draw(seed: int, groups: tuple[int, int]) -> tuple[jax.Array, ...]:
    """Tokens, routes, gate weights, the three matrices, and a cotangent."""
    normal, indices = np.random.default_rng(seed).standard_normal, routes(seed, *groups).reshape(B, T, X)
    weights = np.random.default_rng(seed).random((B, T, X)) + 0.1
    arrays = (normal((E, D, F)), normal((E, D, F)), normal((E, F, D)), normal((B, T, D)))
    x, *arrays = (jnp.asarray(a, jnp.float32) for a in (normal((B, T, D)), weights, *arrays))
    return x, jnp.asarray(indices), *arrays


@pytest.mark.parametrize("slices, groups", [(2, (4, 2)), (4, (4, 2)), (4, (8, 3)), (8, (4, 2)), (4, (1, 1))])
def test_a_token_travels_once_to_every_slice_with_experts_of_its_own(slices, groups):
    M = 24
    indices_LMX = routes(0, *groups, tokens=slices * M).reshape(slices, M, X)
    wanted = [[set(token // (E // slices)) for token in tokens] for tokens in indices_LMX]
    most = slices_of_token(groups, X, slices)
    runs, arrives_LML = plan_slices(jnp.asarray(indices_LMX), E, M * most, slices * M)
    for s, t in np.ndindex(slices, slices):
        assert runs.sizes[s, t] == sum(t in token for token in wanted[s])
        np.testing.assert_array_equal(arrives_LML[s, :, t], [t in token for token in wanted[s]])
    assert np.asarray(runs.sizes).sum() == sum(len(token) for tokens in wanted for token in tokens)
    assert arrives_LML.sum(axis=2).max() <= most
    if groups[0] % slices == 0:
        assert most == min(slices, X, groups[1])


LAYOUTS = [
    ("ragged", {"slice": 2, "expert": 2, "fsdp": 2}, (4, 2), 1, None),
    ("ragged", {"slice": 4, "expert": 2}, (4, 2), 2, 4.0),
    ("ring", {"slice": 2, "expert": 2, "tensor": 2}, (2, 1), 1, None),
    study("ragged", {"slice": 8}, (4, 2), 1, None),
    study("ring", {"slice": 4, "expert": 2}, (1, 1), 2, 8.0),
    study("ragged", {"slice": 2, "expert": 2, "context": 2}, (8, 3), 1, None),
]


@pytest.mark.parametrize("way, layout, groups, parts, factor", LAYOUTS)
def test_values_and_gradients_equal_one_device(way, layout, groups, parts, factor):
    x, indices, *rest, cotangent = draw(1, groups)
    exchange = Exchange(way=way, across_slices=True, groups=groups, gather_parts=parts, buffer_factor=factor)
    assert_experts_equal_one_device(x, indices, rest, cotangent, exchange, layout)


@pytest.mark.parametrize("layout", [{"slice": 2, "expert": 2}, {"slice": 4, "expert": 1}])
def test_decoding_gives_the_same_sums(layout):
    x, indices, *rest, _ = draw(4, (4, 2))
    x, indices, weights, *matrices = x[:, :1], indices[:, :1], rest[0][:, :1], *rest[1:]
    run = partial(parallel_experts, exchange=Exchange(across_slices=True, groups=(4, 2)), decoding=True)
    with use_mesh(make_mesh(MeshConfig(data=1, **layout), jax.devices()[:4])):
        out, left = jax.jit(run)(x, indices, weights, *matrices)
    assert left == 0
    wanted = routed_experts(x[:, 0], indices[:, 0], weights[:, 0], *matrices)
    np.testing.assert_allclose(out[:, 0], wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", ["ragged", "ring"])
def test_what_finds_no_place_is_left_out_and_counted(way):
    """All tokens to the four experts of the first of four devices: it has places for a quarter of the pairs."""
    x, _, weights, *matrices, _ = draw(2, (2, 1))
    indices = jnp.broadcast_to(jnp.arange(X), (B, T, X))
    exchange = Exchange(way=way, across_slices=True, groups=(2, 1))

    def run(factor, x):
        way = replace(exchange, buffer_factor=factor)
        return parallel_experts(x, indices, weights, *matrices, exchange=way, decoding=False)

    with use_mesh(make_mesh(MeshConfig(data=1, slice=2, expert=2), jax.devices()[:4])):
        whole, none = jax.jit(partial(run, None))(x)
        some, left = jax.jit(partial(run, 1.0))(x)
        roomy, too = jax.jit(partial(run, 4.0))(x)
    assert none == too == 0 and left == B * T * X * 3 / 4
    np.testing.assert_allclose(roomy, whole, rtol=1e-5, atol=1e-5)
    if way == "ragged":  # the second slice's tokens find no place at the first; of those there the first sender's do
        np.testing.assert_allclose(some, whole.at[B // 4 :].set(0), rtol=1e-5, atol=1e-5)
    else:
        assert not some[B // 2 :].any() and np.abs(some[: B // 2]).sum(axis=-1).all()


def test_no_more_rows_cross_slices_than_tokens_may_go_to():
    """In the compiled program, forward and backward: what crosses slices is `topk_group` rows a token, and routes."""
    groups, slices, M = (4, 2), 4, B * T // 8
    x, indices, *rest, cotangent = draw(3, groups)
    exchange = Exchange(across_slices=True, groups=groups, buffer_factor=1.0)

    def loss(x, weights, *matrices):
        out, _ = parallel_experts(x, indices, weights, *matrices, exchange=exchange, decoding=False)
        return (out * cotangent).sum()

    mesh = make_mesh(MeshConfig(data=1, slice=slices, expert=2), jax.devices()[:8])
    with use_mesh(mesh):
        x = jax.device_put(x, named_sharding(mesh, ("batch", "length", "none"), x.shape))
        text = jax.jit(jax.grad(loss, range(5))).lower(x, *rest).compile().as_text() or ""
    collective = r"= (.*?) (?:all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
    # In the words of jax 0.10, and of later ones.
    over_slices = (
        r".*replica_groups=(?:\{\{0,2,4,6\},\{1,3,5,7\}\}|\[2,4\]<=\[4,2\]T\(1,0\)|mesh\[[^\]]*\] \{'slice'\})"
    )
    rows, others = [], []
    for line in text.splitlines():
        if found := re.search(collective + over_slices, line):
            shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", found[1])]
            rows.append(sum(math.prod(shape[:-1]) for shape in shapes if shape[-1] == D))
            others.append(sum(math.prod(shape) for shape in shapes if shape[-1] != D))
    assert sum(row > 0 for row in rows) >= 4, "out and back, and the gradients of both"
    # The emulation sends even runs and a quarter more at once; the other rounds are there for uneven ones.
    assert max(rows) <= slices * -(-5 * groups[1] * M // (4 * slices)) < slices * M
    assert max(others) <= slices * M * X


def test_one_slice_costs_nothing():
    x, indices, *rest, _ = draw(5, (4, 2))
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2), jax.devices()[:4])):
        plain, across = (
            str(jax.make_jaxpr(partial(parallel_experts, exchange=exchange, decoding=False))(x, indices, *rest))
            for exchange in (Exchange(), Exchange(across_slices=True, groups=(4, 2)))
        )
    assert re.sub(r"0x\w+", "", plain) == re.sub(r"0x\w+", "", across)


def test_a_mesh_that_does_not_divide_the_experts_is_refused():
    config = micro("v3", expert_across_slices=True)
    mesh = make_mesh(MeshConfig(data=1, slice=8, expert=1), jax.devices()[:8])
    experts = replace(config.ffn, n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"experts.*expert_of_slice' of 12 is not divisible by slice = 8; choose"):
        tree_shardings(mesh, abstract_variables(replace(config, ffn=experts)))


def test_a_plan_counts_the_slices():
    """Each slice stores its part; a token crosses to `topk_group` slices at most, and gradients of experts to none."""

    def of(*fields: str):
        mesh, whole = "slice=4,fsdp=64,expert=8", ("expert_buffer_factor=1.5", *fields)
        return dsj.plan("deepseek-v3", "v5p:8x8x8", mesh, remat="full", moments="bfloat16", slices=4, fields=whole)

    def kept(plan) -> int:
        return next(b.bytes for b in plan.memory.buffers if b.name == "parameters: experts")

    def over_network(plan) -> dict[str, float]:
        return {c.name: c.bytes for c in plan.traffic if c.link == "network"}

    copies, own = of(), of("expert_across_slices=True")
    assert kept(own) == kept(copies) / 4 and own.memory.peak < copies.memory.peak
    assert "--set expert_across_slices=True" in [change.what for change in changes(copies.request)]
    assert set(over_network(copies)) == {"gradients summed over slice"}
    assert over_network(own)["gradients summed over slice"] < over_network(copies)["gradients summed over slice"] / 4
    # 58 layers and the module; out and back, both again for the gradients, once more for the recomputation. Four of eight
    # groups, which lie by two in each of four slices, and a quarter of what is sent stays. Routes: numbers, weights, gradients.
    tokens, visits, remote = 59 * 4096, 4, 3 / 4
    sent = tokens * 7168 * 2 * visits * remote * 5
    assert over_network(own)["tokens to slices and back"] == sent + tokens * 8 * 3 * 16
    assert next(c for c in own.traffic if c.name == "tokens to experts and back").link == "ici"
    assert "each of 4 slices its own" in str(own)
